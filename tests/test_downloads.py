"""What is told of a download, tenth by tenth, from a real server on loopback and from bars fed by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, Repo
from huggingface_hub import constants

from headscale import downloads
from headscale.hub import snapshot


def bar(said: list[str], total: int = 1000, desc: str = "model.safetensors") -> Any:
    def download(tqdm_class: object = None) -> None: ...

    made = downloads.told_by(said.append, "`owner/model`", total, download)["tqdm_class"]
    return made(total=total, unit="B", unit_scale=True, desc=desc)


def test_every_tenth_is_told_once_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "TOLD_BYTES", 100)
    said: list[str] = []
    found = bar(said)
    monkeypatch.setattr(downloads.time, "monotonic", lambda: found.began + found.n / 50)  # 50 bytes a second
    for _ in range(100):
        found.update(10)
    assert said == [f"`owner/model`: {t}0 %, about {(1000 - 100 * t) / 50:.0f} s left" for t in range(1, 10)]


def test_small_downloads_and_other_bars_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert downloads.told_by(said.append, "it", 1000, lambda tqdm_class=None: None) == {}
    monkeypatch.setattr(downloads, "TOLD_BYTES", 100)
    assert downloads.told_by(said.append, "it", 1000, lambda: None) == {}  # an older hub library
    bar(said, desc="Downloading bytes").update(900)
    assert said == []


def test_a_full_copy_tells_and_shows_no_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(downloads, "TOLD_BYTES", 1000)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for part in range(4):
        (folder / f"extra{part}.json").write_text("[" + "1," * 200_000 + "1]")
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}" + bytes(3_000_000))
    said: list[str] = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HubServer({"owner/model": Repo(folder)}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        snapshot("owner/model", cache_dir=tmp_path / "cache", offline=False, on_progress=said.append)
    tenths = [
        int(found[1]) for line in said if (found := re.fullmatch(r"`owner/model`: (\d+) %, about \d+ s left", line))
    ]
    assert tenths == sorted(set(tenths))
    assert tenths
    assert capfd.readouterr() == ("", "")
