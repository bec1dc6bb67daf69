"""`hf:ID` against a hub on loopback: rows stream in, only as much of a dataset is fetched as they need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Faults, HubServer, Repo
from test_cli_hub import headscale

pytest.importorskip("datasets")
pytest.importorskip("torch")

ROWS, SHARDS = 8000, 3
READ = """
import json, sys
from headscale.errors import HeadscaleError
from headscale.texts import read_pairs
for source in sys.argv[1:]:
    try:
        print(json.dumps([[pair.query, pair.document] for pair in read_pairs(source)]))
    except HeadscaleError as error:
        print(json.dumps([type(error).__name__, error.message, error.hint]))
"""


def row(i: int) -> tuple[str, str]:
    return f"question {i} {i * 7919 % 104729:x}", f"answer {i} " + f"{i * 104729 % 999983:x} " * 6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset in three parquet shards of several row groups, found by their names alone."""
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("dataset")
    (folder / "data").mkdir()
    for shard in range(SHARDS):
        rows = [row(i) for i in range(shard * ROWS, (shard + 1) * ROWS)]
        table = pyarrow.table({"query": [q for q, _ in rows], "document": [d for _, d in rows]})
        file = folder / "data" / f"train-{shard:05d}-of-{SHARDS:05d}.parquet"
        parquet.write_table(table, file, row_group_size=1000, compression="none")
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\n")
    return folder


@pytest.fixture
def hub(dataset: Path) -> Iterator[HubServer]:
    private = Repo(dataset, token="hf_other")
    with HubServer({"datasets/lab/questions": Repo(dataset), "datasets/lab/private": private}) as server:
        yield server


def read(hub: HubServer, folder: Path, *sources: str, token: str = "") -> list[list[list[str]]]:
    """What `read_pairs` gives for each source, in a process of its own: the libraries read the address at import."""
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "hf"),
                   "HF_TOKEN": token}  # fmt: skip
    command = [sys.executable, "-c", READ, *sources]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=environment, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_measurement_on_a_dataset_reads_its_first_shard_alone(hub: HubServer, tmp_path: Path) -> None:
    arguments = ("--reference", "bundled:tiny-bert", "--pairs", "hf:lab/questions", "--num-pairs", "32", "--json")
    done = headscale(hub, tmp_path, "inspect", "bundled:tiny-bert", *arguments)
    assert done.returncode == 0, done.stderr
    texts = json.loads(done.stdout)["results"][0]["texts"]
    assert (texts["source"], texts["pairs"]) == ("hf:lab/questions", 32)
    assert {name for name in hub.sent if name.endswith(".parquet")} == {"train-00000-of-00003.parquet"}
    assert not list((tmp_path / "hf").rglob("*.parquet"))


def test_rows_come_in_order_across_shards_and_over_a_broken_line(hub: HubServer, tmp_path: Path) -> None:
    hub.faults = Faults(break_after=200_000, breaks=2)
    first, rows = read(hub, tmp_path, "hf:lab/questions[:5]", "hf:lab/questions")
    expected = [[query, document.strip()] for query, document in map(row, range(SHARDS * ROWS))]
    assert first == expected[:5]
    assert rows == expected
    assert hub.faults.breaks == 0


def test_refusals_are_one_sentence(hub: HubServer, tmp_path: Path) -> None:
    sources = ("hf:lab/private", "hf:lab/missing", "hf:lab/questions:test")
    for source, (kind, message, hint) in zip(sources, read(hub, tmp_path, *sources), strict=True):
        assert kind == "NotFoundError"
        assert f"the dataset `{source}` cannot be read: " in message
        assert "\n" not in message
        assert hint


def test_a_private_dataset_opens_with_its_token_which_the_storage_never_sees(hub: HubServer, tmp_path: Path) -> None:
    (rows,) = read(hub, tmp_path, "hf:lab/private[:2]", token="hf_other")
    assert [query for query, _ in rows] == [row(0)[0], row(1)[0]]
    assert any(path.startswith("/storage/") for _, path, _ in hub.requests)
    assert hub.leaked == []
