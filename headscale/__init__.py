"""Measure and calibrate the MLM-head scale of a backbone before training a SPLADE retriever on it.

The verbs are functions: `inspect`, `calibrate`, `profile`, `trial`, `evaluate`. Each takes a hub id, a directory or a
loaded model, and returns frozen records whose `to_dict()` gives plain JSON values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from headscale.activations import Encoding
    from headscale.api import Loading, calibrate, inspect, profile, trial
    from headscale.arms import Plan
    from headscale.calibration import Choice
    from headscale.collection import read_collection
    from headscale.evaluation import evaluate
    from headscale.pooling import SpladeHead, max_logits, splade_pool
    from headscale.texts import Pair, read_pairs
    from headscale.trials import planned

_HOMES = {
    "Choice": "headscale.calibration",
    "Encoding": "headscale.activations",
    "Loading": "headscale.api",
    "Pair": "headscale.texts",
    "Plan": "headscale.arms",
    "SpladeHead": "headscale.pooling",
    "calibrate": "headscale.api",
    "evaluate": "headscale.evaluation",
    "inspect": "headscale.api",
    "max_logits": "headscale.pooling",
    "planned": "headscale.trials",
    "profile": "headscale.api",
    "read_collection": "headscale.collection",
    "read_pairs": "headscale.texts",
    "splade_pool": "headscale.pooling",
    "trial": "headscale.api",
}

__all__ = [
    "Choice",
    "Encoding",
    "Loading",
    "Pair",
    "Plan",
    "SpladeHead",
    "__version__",
    "calibrate",
    "evaluate",
    "inspect",
    "max_logits",
    "planned",
    "profile",
    "read_collection",
    "read_pairs",
    "splade_pool",
    "trial",
]


def __getattr__(name: str) -> Any:
    """Import a verb when it is first used, so that importing headscale costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'headscale' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
