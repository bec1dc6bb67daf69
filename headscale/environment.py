"""Versions and machine, for bug reports and for the provenance of results; nothing heavy is imported."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any

from headscale import __version__

_PACKAGES = (
    "torch",
    "transformers",
    "sentence-transformers",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "numpy",
    "scipy",
    "pandas",
    "matplotlib",
    "ir-measures",
    "bm25s",
)


def environment() -> dict[str, Any]:
    """Versions of headscale, Python and the packages that results depend on; None for what is not installed."""
    return {
        "headscale": __version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform}-{platform.machine()}",
        "cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def describe() -> dict[str, Any]:
    """The environment flat, with device, threads and cache folders, for a person to read."""
    import torch

    from headscale.docstrings import cache_dir

    known = environment()
    packages = known.pop("packages")
    return {
        **known,
        **packages,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "mps": torch.backends.mps.is_available(),
        "cache": str(cache_dir()),
    }


def launched_processes() -> int:
    """How many processes `torchrun`, or what sets the same variables, has started together; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys() else 1


def launched_rank() -> int:
    """Which of them this is, the first being 0."""
    return int(os.environ["RANK"]) if launched_processes() > 1 else 0


def _version(name: str) -> str | None:
    """From the first lines of the metadata: parsing all of it, as `metadata.version` does, takes 4 ms a package."""
    try:
        text = metadata.distribution(name).read_text("METADATA") or ""
    except metadata.PackageNotFoundError:
        return None
    headers = text.partition("\n\n")[0].splitlines()
    stated = next((line for line in headers if line.startswith("Version:")), "")
    return stated.removeprefix("Version:").strip() or metadata.version(name)
