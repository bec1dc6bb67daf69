"""Cells on a Ray cluster: one task each, its files sent back to the driver, which alone writes them.

No file system is shared: texts travel to the workers, and so do backbones that are folders on the driver; a worker
writes into a folder of its own and answers with the finished cell's files. Ray runs a cell again where its worker or
node died; where the cell itself failed, it is kept as failed, as everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headscale import __version__, cells
from headscale.errors import HeadscaleError, UsageError
from headscale.grid import Configuration, Outcome, attempt, failed
from headscale.trials import Bench, Corpus, folder_of, identity_of, source_of

LOCAL = "local"  # Ray's own word for a cluster on this machine that ends with the program


@dataclass(frozen=True)
class Order:
    """What all cells of one sweep share.

    Args:
        headscale: the driver's version; a worker with another one runs nothing.
        sweep: its own name, with which a worker's memory of an earlier one ends.
        threads: of torch.
    """

    headscale: str
    sweep: str
    threads: int


@dataclass(frozen=True)
class Answer:
    """What a task sends back.

    Args:
        headscale: the worker's version.
        status, message, hint: of the outcome.
        files: of the cell's folder, by name; none where nothing was run.
    """

    headscale: str
    status: str = "done"
    message: str = ""
    hint: str = ""
    files: dict[str, str] = field(default_factory=dict)


@dataclass
class RayCluster:
    """An executor whose cells are tasks of a Ray cluster.

    Args:
        address: of its head ("HOST:PORT"), "auto" for the one that this machine belongs to, or "local" for one of
            this machine's own cores that ends with the sweep.
        threads: of torch in each cell, and the CPUs that Ray sets aside for it.
        gpus: that Ray sets aside for each cell; a fraction shares one.
        retries: how often a cell is run again whose worker or node died.
        bench: texts that are in memory.
        tell: told in a sentence what is waited for.

    Raises:
        UsageError: Ray is not installed.
        HeadscaleError: there is no cluster at the address, or its workers have another version of headscale.
    """

    address: str
    threads: int = 1
    gpus: float = 0.0
    retries: int = 3
    bench: Bench = field(default_factory=Bench)
    tell: Callable[[str], None] | None = None

    def __call__(self, configurations: Sequence[Configuration], run: Path) -> Iterator[Outcome]:
        """Run the cells; whatever ends the iteration ends the tasks."""
        if not configurations:
            return
        ray = require_ray()
        with _connected(ray, self.address):
            self._check_resources(ray)
            options = {"num_cpus": self.threads, "num_gpus": self.gpus, "max_retries": self.retries}
            task = ray.remote(**options)(run_on_worker)
            parcels = _Parcels(ray, self.bench, self.address)
            order = Order(__version__, secrets.token_hex(4), self.threads)
            running = {task.remote(one, parcels.of(one), order): one for one in configurations}
            try:
                while running:
                    # A limit, so that Ctrl-C is heard while nothing is finished.
                    for done in ray.wait(list(running), timeout=1.0)[0]:
                        yield _outcome(ray, done, running.pop(done), run)
            finally:
                for reference in running:
                    ray.cancel(reference, force=True)

    def _check_resources(self, ray: Any) -> None:
        """Say so where no node of the cluster has what a cell needs: one may still join."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        wanted = {"CPU": self.threads, "GPU": self.gpus}
        if self.tell is not None and not any(
            all(node.get(kind, 0) >= amount for kind, amount in wanted.items()) for node in nodes
        ):
            self.tell(
                f"warning: no node of the cluster has {self.threads} CPUs and {self.gpus:g} GPUs: waiting for one"
            )


def require_ray() -> Any:
    """The package.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import ray
    except ImportError:
        raise UsageError("a sweep on a cluster needs Ray", "pip install 'headscale[ray]'") from None
    return ray


@contextlib.contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """A connection for as long as the sweep lasts; one that the caller has is used and left open."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {}
    if address == LOCAL:
        options["include_dashboard"] = False
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unasked
    try:
        _check_reachable(address)
        # What workers print is theirs: stdout is the result alone.
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ImportError, OSError, ValueError, RuntimeError, AssertionError, ray.exceptions.RayError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        raise HeadscaleError(
            f"no Ray cluster can be joined at `{address}`: {reason[:1].lower()}{reason[1:]}",
            "`ray start --head` starts one and prints its address; set `RAY_AUTH_MODE=token` if it asks for a token",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Fail at once where nobody listens: Ray itself tries for more than a minute."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


class _Parcels:
    """What cells need from the driver's disk, put into the cluster's memory once each."""

    def __init__(self, ray: Any, bench: Bench, address: str) -> None:
        self._ray = ray
        self._bench = bench
        self._ships_backbones = address != LOCAL
        self._sent: dict[Any, Any] = {}

    def of(self, configuration: Configuration) -> dict[str, list[Any]]:
        """References in lists, which Ray hands over as they are: a worker fetches what it does not have yet."""
        source, backbone = source_of(configuration), configuration["backbone"]
        found = {"corpus": [self._reference(source, lambda: self._bench.corpus(source))]}
        if self._ships_backbones and Path(backbone).is_dir():
            found["backbone"] = [self._reference(backbone, lambda: _files_below(Path(backbone)))]
        return found

    def _reference(self, key: Any, read: Callable[[], Any]) -> Any:
        if key not in self._sent:
            self._sent[key] = self._ray.put(read())
        return self._sent[key]


def _files_below(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def _outcome(ray: Any, reference: Any, configuration: Configuration, run: Path) -> Outcome:
    """A task's answer, kept in the run folder."""
    try:
        answer: Answer = ray.get(reference)
    except ray.exceptions.RayTaskError as error:  # raised by the worker outside the cell: it cannot run it at all
        reason = str(error.cause or error).strip().rpartition("\n")[2]
        hint = f"headscale {__version__} must be installed on every node of the cluster"
        return failed(configuration, run, f"the cluster's worker cannot run it: {reason}", hint)
    except ray.exceptions.RayError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        return failed(
            configuration, run, f"its worker died more often than it is tried again: {reason}",
            "a smaller batch or more CPUs per cell, if memory was short",
        )  # fmt: skip
    if answer.headscale != __version__:
        raise HeadscaleError(
            f"the cluster's workers have headscale {answer.headscale}, and this is {__version__}",
            f"install headscale {__version__} on every node of the cluster",
        )
    if not answer.files:
        return failed(configuration, run, answer.message, answer.hint)
    folder = folder_of(configuration, run)
    for name in sorted(answer.files, key=lambda name: name == cells.CELL):  # which says that the others are whole
        cells.write_text(folder / name, answer.files[name])
    return Outcome(configuration, answer.status, answer.message, answer.hint)


# --- on a worker ---------------------------------------------------------------------------------------------------


def run_on_worker(configuration: Configuration, parcels: dict[str, list[Any]], order: Order) -> Answer:
    """Run one cell in a folder of this worker's own.

    Args:
        configuration: the cell.
        parcels: references to its texts, and to its backbone's files where those are the driver's.
        order: of the sweep.
    """
    if order.headscale != __version__:
        return Answer(__version__, "failed")
    import torch

    torch.set_num_threads(order.threads)
    bench = _bench(order.sweep)
    try:
        _unpack(configuration, parcels, bench)
    except HeadscaleError as error:
        return Answer(__version__, "failed", error.message, error.hint)
    with tempfile.TemporaryDirectory() as place:
        outcome = attempt(configuration, Path(place), bench)
        folder = folder_of(configuration, Path(place))
        files = {f.name: f.read_text(encoding="utf-8") for f in folder.iterdir()}
    return Answer(__version__, outcome.status, outcome.message, outcome.hint, files)


@functools.lru_cache(maxsize=1)
def _bench(sweep: str) -> Bench:
    """Of this worker's process, which Ray uses again for the next cell of a sweep."""
    return Bench()


def _unpack(configuration: Configuration, parcels: dict[str, list[Any]], bench: Bench) -> None:
    import ray

    source, backbone = source_of(configuration), configuration["backbone"]
    if source not in bench.corpora:
        corpus: Corpus = ray.get(parcels["corpus"][0])
        bench.corpora[source] = corpus
    if "backbone" not in parcels or backbone in bench.backbones or _has(configuration):
        return
    from headscale.backbone import load_backbone

    with tempfile.TemporaryDirectory() as place:
        for name, content in ray.get(parcels["backbone"][0]).items():
            file = Path(place) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        loaded = load_backbone(place, trust_remote_code=configuration["trust_remote_code"])
    loaded.name, loaded.directory = backbone, None
    bench.backbones.clear()
    bench.backbones[backbone] = loaded


def _has(configuration: Configuration) -> bool:
    """Whether this machine has the very folder: one file system, or one machine."""
    with contextlib.suppress(HeadscaleError):
        return bool(identity_of(configuration["backbone"]) == configuration["identity"])
    return False
