"""The verbs against a hub on loopback: only what is needed is fetched, and refusals are one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer, Repo
from tiny_models import tiny_checkpoint

pytest.importorskip("torch")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    large = tiny_checkpoint("modernbert", tmp_path / "large")
    reference = tiny_checkpoint("bert", tmp_path / "reference")
    private = Repo(tiny_checkpoint("bert", tmp_path / "private"), token="hf_other")
    with HubServer({"lab/large": Repo(large), "bert-base-uncased": Repo(reference), "lab/private": private}) as server:
        yield server


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    rows = [f"w{5 + i} w{40 + i}\tw{40 + i} w{60 + i % 30} w{5 + i}" for i in range(32)]
    (tmp_path / "pairs.tsv").write_text("\n".join(rows) + "\n")
    return str(tmp_path / "pairs.tsv")


def headscale(hub: HubServer, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(folder / "hf"),
        "HF_TOKEN": "",
        "HEADSCALE_CACHE": str(folder / "cache"),
    }
    return subprocess.run(
        [sys.executable, "-m", "headscale", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=folder,
        env=environment,
    )


def test_weights_only_fetches_head_tensors_alone(hub: HubServer, tmp_path: Path) -> None:
    done = headscale(hub, tmp_path, "inspect", "lab/large", "--weights-only", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["results"][0]
    assert len(result["revision"]) == 40
    weights = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert result["bytes_read"] < weights / 2
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


def test_calibrate_and_save_from_the_hub(hub: HubServer, tmp_path: Path, pairs: str) -> None:
    done = headscale(
        hub, tmp_path, "calibrate", "lab/large", "--pairs", pairs, "--match", "constant", "--save", "out", "--json"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["results"][0]
    assert result["reference"] == "bert-base-uncased"
    assert result["scale"] == 1 / 16
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "out" / "headscale.json").read_text())["source"]["name"] == "lab/large"


@pytest.mark.parametrize("name", ["lab/private", "lab/missing"])
def test_refusals(hub: HubServer, tmp_path: Path, pairs: str, name: str) -> None:
    done = headscale(hub, tmp_path, "calibrate", name, "--pairs", pairs, "--save", "out")
    assert done.returncode == 3
    assert done.stdout == ""
    assert f"`{name}`" in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
