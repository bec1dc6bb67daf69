"""How far a download has come and how long it still takes, told a line a tenth in place of the hub's own bars."""

from __future__ import annotations

import inspect
import io
import time
from collections.abc import Callable
from typing import Any

# Smaller downloads are over before anyone asks: five seconds at 100 Mbit/s.
TOLD_BYTES = 64 << 20

Tell = Callable[[str], None]


def told_by(tell: Tell, what: str, total: int, function: Callable[..., Any]) -> dict[str, Any]:
    """The argument that makes a download of huggingface_hub tell; none where it is small or takes no such argument.

    Args:
        tell: told in a sentence.
        what: is downloaded.
        total: its bytes.
        function: of huggingface_hub, that will be called.
    """
    if total < TOLD_BYTES or "tqdm_class" not in inspect.signature(function).parameters:
        return {}
    return {"tqdm_class": _telling(tell, what, total)}


def _telling(tell: Tell, what: str, total: int) -> type[Any]:
    from tqdm import tqdm

    class Telling(tqdm):  # type: ignore[type-arg]
        """A bar that nobody sees, and whose tenths are told."""

        said = 0

        def __init__(self, *values: Any, **options: Any) -> None:
            super().__init__(*values, **{**options, "file": io.StringIO(), "disable": False})
            # Of two bars in bytes one counts what arrives in compressed pieces: the other one is the files.
            self.began = time.monotonic()
            self.counts = options.get("unit") == "B" and not str(options.get("desc", "")).startswith("Downloading")

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            tenth = int(10 * self.n / total)
            if self.counts and self.said < tenth < 10:
                self.said = tenth
                rate = self.n / max(1e-9, time.monotonic() - self.began)
                tell(f"{what}: {tenth}0 %, about {(total - self.n) / rate:.0f} s left")
            return shown

    return Telling
