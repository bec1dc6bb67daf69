"""Measure and calibrate the MLM-head scale of a backbone before training a SPLADE retriever on it."""

from __future__ import annotations

__version__ = "0.1.0"
