"""The curves on a terminal: what their dots mean, how wide they are, and that stdout never sees them."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from saved_results import training_cell

from headscale.live import Curve, Logs, braille, panel

# The dots of a braille character in the order of their bits (Unicode, block U+2800), as (column, row).
DOTS = {0: (0, 0), 1: (0, 1), 2: (0, 2), 3: (1, 0), 4: (1, 1), 5: (1, 2), 6: (0, 3), 7: (1, 3)}


def dots(lines: tuple[str, ...]) -> set[tuple[int, int]]:
    """Every dot as (column, row from the top), read back from the characters."""
    return {
        (2 * x + DOTS[bit][0], 4 * y + DOTS[bit][1])
        for y, line in enumerate(lines)
        for x, character in enumerate(line)
        for bit in DOTS
        if (ord(character) - 0x2800) >> bit & 1
    }


def curve(count: int = 50, name: str = "one", total: int = 100) -> Curve:
    found = Curve(name, total)
    for i in range(count):
        found.add({"loss_over_ln_n": 100.0 / (1 + i), "active_dims_document": 10.0 + i, "score_sd": 1.0})
    return found


def test_dots_lie_where_the_logarithm_says() -> None:
    """A geometric series is a straight line: from the top left corner to the bottom right one."""
    values = [2.0**-i for i in range(16)]
    found = dots(braille(values, 16, width=8, height=4, low=2.0**-15, high=1.0))
    assert (0, 0) in found
    assert (15, 15) in found
    for column in range(16):
        rows = [row for x, row in found if x == column]
        assert rows == [column]


def test_steps_far_apart_are_joined() -> None:
    found = dots(braille([1.0, 1000.0], 2, width=1, height=4, low=1.0, high=1000.0))
    assert {row for _, row in found} == set(range(16))


def test_what_is_not_positive_and_finite_leaves_a_gap() -> None:
    values = [1.0, math.nan, 0.0, -1.0, math.inf, 1.0]
    assert {x for x, _ in dots(braille(values, 6, width=3, height=1, low=0.5, high=2.0))} == {0, 5}


def test_a_flat_curve_and_none_are_drawn_too() -> None:
    assert len(dots(braille([3.0] * 8, 8, width=4, height=2, low=3.0, high=3.0))) == 8
    assert dots(braille([], 8, width=4, height=2, low=1.0, high=2.0)) == set()


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_a_panel_stays_within_the_terminal(width: int) -> None:
    from rich.console import Console

    out = io.StringIO()
    curves = [curve(name="a name that is much longer than its column is wide, by far"), curve(80), curve(3)]
    Console(file=out, width=width, force_terminal=True, color_system=None).print(panel(curves, width))
    lines = out.getvalue().splitlines()
    assert max(len(line) for line in lines) <= width
    assert "loss [ln N]" in out.getvalue()
    assert "active d [dims]" in out.getvalue()
    assert "score sd" in out.getvalue()
    assert "3 of 100 steps" in out.getvalue()


def test_logs_of_other_processes_are_followed(tmp_path: Path) -> None:
    folder = training_cell(tmp_path, steps=10, unfinished=True)
    logs = Logs([("going", folder, 10), ("waiting", tmp_path / "later", 10)])
    (going,) = logs.curves()
    assert (going.name, going.steps) == ("going", 5)
    assert logs.share() == 0.5
    line = (folder / "steps.jsonl").read_text().splitlines()[0]
    with (folder / "steps.jsonl").open("a") as file:
        file.write(line + "\n" + line[:20])  # one more, and the beginning of another
    logs.looked = -math.inf
    assert logs.curves()[0].steps == 6
    with (folder / "steps.jsonl").open("a") as file:
        file.write(line[20:] + "\n")
    logs.looked = -math.inf
    assert logs.curves()[0].steps == 7
    (folder / "steps.jsonl").write_text(line + "\n")  # begun anew
    logs.looked = -math.inf
    assert logs.curves()[0].steps == 1
    (folder / "cell.json").write_text("{}")  # finished
    logs.looked = -math.inf
    assert logs.curves() == []


CHILD = """
import sys, time
from headscale.render import Voice
voice = Voice(quiet="quiet" in sys.argv)
with voice.progress("calibrated, seed 0") as bar:
    for i in range(40):
        text = f"loss {4 - i / 20:.2f} ln N, stable"
        bar(i + 1, 40, text, {"loss_over_ln_n": 4 - i / 20, "active_dims_document": 90.0, "score_sd": 2.0})
        time.sleep(0.02)
    print("the result", flush=True)
    time.sleep(0.6)
"""


def on_a_terminal(*arguments: str, **environment: str) -> tuple[str, str]:
    """What a child writes to stdout (a pipe) and to stderr (a terminal)."""
    master, slave = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, stderr=slave, text=True,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "PYTHONIOENCODING": "utf-8", **environment},
    )  # fmt: skip
    os.close(slave)
    seen = b""
    with contextlib.suppress(OSError):  # the terminal is gone when the child is
        while data := os.read(master, 65536):
            seen += data
    os.close(master)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    return out, seen.decode(errors="replace")


def test_a_terminal_sees_the_curves_and_stdout_the_result_alone() -> None:
    out, seen = on_a_terminal()
    assert out == "the result\n"
    assert re.search("[⠁-⣿]", seen)
    assert "40 of 40 steps, stable" in seen
    assert "loss [ln N]" in seen
    assert "the result" not in seen
    assert re.search(r"\d:\d\d:\d\d", seen)  # the time left


def test_without_colours_the_curves_stay() -> None:
    _, seen = on_a_terminal(NO_COLOR="1")
    assert re.search("[⠁-⣿]", seen)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", seen)


def test_quiet_says_nothing() -> None:
    assert on_a_terminal("quiet") == ("the result\n", "")


def test_without_a_terminal_a_line_every_tenth() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert done.stdout == "the result\n"
    lines = done.stderr.splitlines()
    assert len(lines) == 11
    assert lines[5].startswith("calibrated, seed 0: 20/40, loss 3.05 ln N, stable, about ")
    assert lines[5].endswith(" s left")


def test_a_point_is_what_a_step_record_holds(tmp_path: Path) -> None:
    from headscale.live import QUANTITIES

    folder = training_cell(tmp_path, steps=4, unfinished=True)
    assert set(QUANTITIES) <= json.loads((folder / "steps.jsonl").read_text().splitlines()[0]).keys()
