"""Which device a run takes and why, and how much memory it has taken."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headscale.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DeviceChoice:
    """A device of torch, and the sentence that says why it was taken."""

    name: str
    reason: str


def choose_device(requested: str = "auto", *, precision: str = "fp32") -> DeviceChoice:
    """CUDA where there is a device, else MPS, else the CPU; or what was asked for, if it exists.

    Args:
        requested: "auto", "cuda", "cuda:1", "mps" or "cpu".
        precision: "fp32", "bf16" or "fp16"; one that the device cannot run is an error.

    Raises:
        UsageError: no such device, or a precision it has not.
    """
    choice = _found() if requested == "auto" else _asked(requested)
    if precision == "bf16" and not _has_bf16(choice.name):
        raise UsageError(f"`{choice.name}` has no bf16", "use the precision `fp16` or `fp32`")
    return choice


def _found() -> DeviceChoice:
    import torch

    if torch.cuda.is_available():
        return DeviceChoice("cuda", f"CUDA: {torch.cuda.get_device_name()}")
    if torch.backends.mps.is_available():
        return DeviceChoice("mps", "MPS: no CUDA device was found")
    return DeviceChoice("cpu", f"CPU with {torch.get_num_threads()} threads: no CUDA or MPS device was found")


def _asked(requested: str) -> DeviceChoice:
    import torch

    try:
        device = torch.device(requested)
    except RuntimeError:
        raise UsageError(f"no device is called `{requested}`", "one of auto, cpu, cuda, mps") from None
    missing = (
        (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count())
        or (device.type == "mps" and not torch.backends.mps.is_available())
        or device.type not in ("cpu", "cuda", "mps")
    )
    if missing:
        raise UsageError(f"the device `{requested}` was not found here", f"use `auto`, now {_found().name}")
    return DeviceChoice(requested, "asked for")


def _has_bf16(name: str) -> bool:
    import torch

    return not name.startswith("cuda") or torch.cuda.is_bf16_supported()


def reset_peak_memory(name: str) -> None:
    """Start counting `peak_memory` anew where the device can."""
    import torch

    if name.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(name)


def peak_memory(name: str) -> int:
    """Peak bytes: allocated on a GPU since the reset; resident, of the whole process so far, on a CPU."""
    import torch

    if name.startswith("cuda"):
        return torch.cuda.max_memory_allocated(name)
    if name.startswith("mps"):
        return torch.mps.driver_allocated_memory()
    return _peak_resident()


def _peak_resident() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage's peak would be that of the process that started this one
        line = next((s for s in status.read_text().splitlines() if s.startswith("VmHWM:")), "VmHWM: 0 kB")
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def random_states(name: str) -> list[Tensor]:
    """State of the CPU's generator and of the device's own."""
    import torch

    states = [torch.get_rng_state()]
    if name.startswith("cuda"):
        states.append(torch.cuda.get_rng_state(name))
    elif name.startswith("mps"):
        states.append(torch.mps.get_rng_state())
    return states


def restore_random_states(name: str, states: Sequence[Tensor]) -> None:
    """Put back what `random_states` gave for the same device."""
    import torch

    torch.set_rng_state(states[0])
    if name.startswith("cuda"):
        torch.cuda.set_rng_state(states[1], name)
    elif name.startswith("mps"):
        torch.mps.set_rng_state(states[1])


@contextlib.contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Random numbers from `seed` and deterministic kernels inside; torch's state as before on leaving."""
    import torch

    states = random_states(name)
    modes = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    with warnings.catch_warnings():
        torch.manual_seed(seed)
        if name.startswith("cuda"):  # the CPU kernels used here are deterministic as they are
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(modes[0], warn_only=modes[1])
            restore_random_states(name, states)
