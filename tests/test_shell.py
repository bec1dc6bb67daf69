"""What surrounds the commands: completion as bash asks for it, versions, licence, citation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from headscale import __version__
from headscale.cli import run

ROOT = Path(__file__).parent.parent
PROGRAM = shutil.which("headscale", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(PROGRAM is None or shutil.which("bash") is None, reason="needs the installed program and bash")
def test_completion_installed_for_bash_completes(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": f"{Path(str(PROGRAM)).parent}:{os.environ['PATH']}"}

    def bash(script: str) -> str:
        done = subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, timeout=120, check=True, env=environment
        )
        return done.stdout

    assert "completion installed" in bash("headscale --install-completion; true")
    for typed, expected in {"headscale ins": "inspect", "headscale trial --trac": "--track"}.items():
        words = typed.split()
        script = (
            f"source ~/.bashrc; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; "
            '_headscale_completion headscale; echo "${COMPREPLY[@]}"'
        )
        assert bash(script).split() == [expected]


def test_env_as_json(capsys: Any) -> None:
    assert run(["env", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["results"]
    assert found["headscale"] == __version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


def test_licence_and_citation_are_those_of_the_package() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0" in text
    assert metadata.metadata("headscale")["License-Expression"] == "Apache-2.0"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what the format requires
    assert (citation["version"], citation["license"]) == (__version__, "Apache-2.0")
