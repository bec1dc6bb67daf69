"""The program: its commands, its exit codes, and what is said when something goes wrong.

Commands parse, call and render, and nothing else; each imports what it needs when it runs.
"""

from __future__ import annotations

import gc
import sys
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import Annotated

import typer
from typer.models import CommandInfo

from headscale import __version__, encoding_commands, measuring_commands, report_commands, training_commands
from headscale.environment import launched_rank
from headscale.errors import HeadscaleError, UsageError
from headscale.options import Debug, Json, Quiet
from headscale.render import Voice
from headscale.shell import app, begin, state

__all__ = [
    "app",
    "encoding_commands",
    "main",
    "measuring_commands",
    "report_commands",
    "run",
    "training_commands",
]  # importing them registers them


# Objects between two collections. Imports make hundreds of thousands that stay; Python's 700 looks through them again
# and again, a tenth of the time of `inspect --weights-only` (benchmarks/inspect_weights.py).
_COLLECT_EVERY = 50_000


def main() -> None:
    """Run the program and leave with its exit code."""
    gc.set_threshold(_COLLECT_EVERY, 20, 20)
    sys.exit(run())


def run(arguments: list[str] | None = None) -> int:
    """Run the program on arguments; returns the exit code (0, 1, 2, 3 or 130)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    state.update(debug=False, saved=None, silent=False, command=arguments[0] if "--json" in arguments else None)
    try:
        code = _program(arguments)(args=arguments, standalone_mode=False)
    except typer.BadParameter as error:
        return _fail(UsageError(error.format_message().rstrip(".").replace("'", "`"), "see `headscale --help`"))
    except typer.Abort:
        return _interrupted()
    except KeyboardInterrupt:
        return _interrupted()
    except HeadscaleError as error:
        return _fail(error)
    except BrokenPipeError:  # `| head`: nothing to say, nobody to say it to
        with suppress(OSError):
            sys.stdout.close()
        return 0
    except Exception as error:
        return _unexpected(error)
    if code == 130:
        return _interrupted()
    return int(code or 0)


def _program(arguments: list[str]) -> typer.Typer:
    """The program, with the one command that is called where one is: building all of them takes as long as some run."""
    called = [c for c in app.registered_commands if c.callback is not None and _name(c) in arguments[:1]]
    program = copy(app)
    program.registered_commands = called or app.registered_commands
    return program


def _name(command: CommandInfo) -> str:
    return command.name or getattr(command.callback, "__name__", "").replace("_", "-")


def _fail(error: HeadscaleError) -> int:
    if state["debug"]:
        raise error
    # Another process says it, and its exit code counts; all have the same arguments.
    if state["silent"] or (launched_rank() > 0 and isinstance(error, UsageError)):
        return 0
    voice = Voice(errors=[])
    voice.error(error)
    if state["command"]:  # `--json` prints one object whatever happens
        from headscale.render import write_document

        write_document(state["command"], [], voice.errors or [])
    return error.exit_code


def _unexpected(error: Exception) -> int:
    usage = getattr(error, "format_message", None)
    if usage is not None and hasattr(error, "exit_code"):  # typer's own usage errors
        message = str(usage()).rstrip(".")
        return _fail(UsageError(message[:1].lower() + message[1:], "see `headscale --help`"))
    if state["debug"]:
        raise error
    kind = type(error).__name__
    return _fail(
        HeadscaleError(f"something unforeseen went wrong: {kind}: {error}", "run it again with `--debug` and report it")
    )


def _interrupted() -> int:
    if state["silent"]:
        return 0
    saved = state["saved"]
    where = f"what was finished is in `{saved}`; the same command goes on from there" if saved else "nothing was kept"
    print(f"\ninterrupted: {where}", file=sys.stderr)
    return 130


def _show_version(value: bool) -> None:
    if value:
        print(f"headscale {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where figure and results go.")] = Path(
        "headscale-demo"
    ),
    seeds: Annotated[int, typer.Option(min=1, max=10, help="Trainings of each arm, paired.")] = 1,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show the whole story, offline.

    Inspect, calibrate and train the bundled backbones on a CPU, in minutes.
    """
    voice = begin("the demo: inspect, calibrate and train the two bundled backbones", quiet, debug, output)
    from headscale.demo import run_demo

    raise typer.Exit(run_demo(output, voice, seeds=seeds, as_json=as_json))


@app.command()
def env(as_json: Json = False) -> None:
    """Print versions and device.

    With cache folder and threads, for bug reports.
    """
    from headscale.environment import describe
    from headscale.render import full

    found = describe()
    if as_json:
        from headscale.render import write_document

        write_document("env", [found], [])
        return
    for name, value in found.items():
        print(f"{name}\t{full(value)}")


# --- what the commands share ---------------------------------------------------------------------------------------
