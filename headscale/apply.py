"""Write a constant into a checkpoint on disk, and prove it by reloading what was written."""

from __future__ import annotations

from headscale.rescaling import MODES, rescale_

__all__ = ["MODES", "rescale_"]
