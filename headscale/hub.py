"""Checkpoints on the Hugging Face hub: in the cache, by byte range, or as a full local copy."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape as glob_escape
from json import loads
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from headscale.downloads import told_by
from headscale.errors import HeadscaleError, NotFoundError, UnreadableError
from headscale.files import LocalFiles, join_name, left_out, locate_weights, model_folder
from headscale.ranges import RangeReader, Remote, follow, transport_errors

# What the hub accepts: an optional owner, then a name (its documented rule for repository ids).
_REPO_ID = re.compile(r"(?:[\w.-]{1,96}/)?[\w.-]{1,96}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# A repository's description with file sizes is a few hundred kilobytes at most.
_MAX_INFO_BYTES = 64 << 20
# Smaller files are fetched without a word.
_QUIET_BYTES = 1 << 20

Tell = Callable[[str], None]


def cached_snapshot(
    repo: str, *, revision: str | None = None, cache_dir: str | Path | None = None
) -> tuple[Path, str] | None:
    """The cached copy of a hub id as (directory, commit), None unless all its weights are there.

    Reads the cache's folders only: no network, and nothing of huggingface_hub but its constants.
    """
    from huggingface_hub import constants

    _check_id(repo)
    folder = Path(cache_dir or constants.HF_HUB_CACHE).expanduser() / f"models--{repo.replace('/', '--')}"
    commit = revision or constants.DEFAULT_REVISION
    if not _COMMIT.fullmatch(commit) and ".." not in Path(commit).parts:
        reference = folder / "refs" / commit
        commit = reference.read_text().strip() if reference.is_file() else ""
    snapshot = folder / "snapshots" / commit
    if not commit or not snapshot.is_dir():
        return None
    files = LocalFiles(snapshot)
    inside = model_folder(files)
    found = locate_weights(files, inside)
    complete = found is not None and all(files.has(join_name(inside, name)) for name in found[1])
    return (snapshot, commit) if complete else None


def commit_of(repo: str, *, revision: str | None = None) -> str:
    """The commit of a hub id, from the cache or in one request; no file of the repository is read.

    Raises:
        NotFoundError: as for `open_checkpoint`.
    """
    cached = cached_snapshot(repo, revision=revision)
    return HubFiles(repo, revision=revision).commit if cached is None else cached[1]


class HubFiles:
    """The files of one hub repository at one commit; weights are read in ranges, small files through the cache.

    Raises:
        NotFoundError: no such id or revision, gated, offline or out of reach.
    """

    root: Path | None = None

    def __init__(
        self,
        repo: str,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        offline: bool | None = None,
        token: str | bool | None = None,
        on_progress: Tell | None = None,
    ) -> None:
        from huggingface_hub import constants

        _check_id(repo)
        self.repo, self.revision, self._cache_dir, self._token = repo, revision, cache_dir, token
        self._tell: Tell = on_progress or (lambda _: None)
        self.endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT
        self._remotes: dict[str, Remote] = {}
        if constants.HF_HUB_OFFLINE if offline is None else offline:
            raise _offline(repo)
        from huggingface_hub.utils import build_hf_headers  # brings its HTTP client, which takes longer than a head

        with self._translating():
            self._headers: dict[str, str] = build_hf_headers(token=token, library_name="headscale")
        info = self._describe()
        self.commit: str = info["sha"]
        self.gated: bool = bool(info.get("gated"))
        self._sizes: dict[str, int | None] = {entry["rfilename"]: entry.get("size") for entry in info["siblings"]}
        self._tell(f"reading `{repo}` at {self.commit[:8]} from {urlsplit(self.endpoint).netloc}")

    def has(self, name: str) -> bool:
        """Whether the repository has the file at this commit."""
        return name in self._sizes

    def names(self, folder: str) -> tuple[str, ...]:
        """Names of the files directly in a folder, sorted."""
        prefix = f"{folder}/" if folder else ""
        inside = (name.removeprefix(prefix) for name in self._sizes if name.startswith(prefix))
        return tuple(sorted(name for name in inside if "/" not in name))

    def all_names(self) -> tuple[str, ...]:
        """Every file of the repository, with its folder."""
        return tuple(sorted(self._sizes))

    def size(self, name: str) -> int:
        """Size of a file in bytes, asked for when the listing does not say."""
        from huggingface_hub import get_hf_file_metadata

        size = self._sizes[name]
        if size is None:
            with self._translating():
                size = get_hf_file_metadata(self._url(name), token=self._token).size
            if size is None:
                raise UnreadableError(f"the hub does not say how large `{name}` of `{self.repo}` is", self._download)
            self._sizes[name] = size
        return size

    def path(self, name: str) -> Path:
        """A whole file in the hub cache, fetched first if it is not there; large ones are announced."""
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        where = {"revision": self.commit, "cache_dir": self._cache_dir}
        cached = try_to_load_from_cache(self.repo, name, **where)
        if isinstance(cached, str):
            return Path(cached)
        if self.size(name) >= _QUIET_BYTES:
            self._tell(f"downloading `{name}` of `{self.repo}` ({human_size(self.size(name))}) into the hub cache")
        told = told_by(self._tell, f"`{name}`", self.size(name), hf_hub_download)
        with self._translating(), _no_bars():
            return Path(hf_hub_download(self.repo, name, token=self._token, endpoint=self.endpoint, **where, **told))

    def reader(self, name: str, start: int, end: int, what: str) -> RangeReader:
        """A reader of one byte range; `what` is announced with its size, an empty one is not."""
        if what:
            whole = f"{human_size(end - start)} of {human_size(self.size(name))}"
            self._tell(f"fetching {what} from `{self.repo}` ({whole})")
        if name not in self._remotes:
            label = f"{name}` of `{self.repo}"
            self._remotes[name] = Remote(
                self._url(name), self._headers, label, self.size(name), self._download, self._explain
            )
        return RangeReader(self._remotes[name], start, end)

    @property
    def _download(self) -> str:
        return f"`hf download {self.repo}`"

    def _url(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return str(hf_hub_url(self.repo, name, revision=self.commit, endpoint=self.endpoint))

    def _describe(self) -> dict[str, Any]:
        """The repository's commit and files, with sizes, in one request."""
        from huggingface_hub import constants
        from huggingface_hub.utils import hf_raise_for_status

        revision = quote(self.revision or constants.DEFAULT_REVISION, safe="")
        url = f"{self.endpoint}/api/models/{self.repo}/revision/{revision}?blobs=true"
        raw = bytearray()
        with self._translating(), follow(url, self._headers) as (response, chunks, _):
            hf_raise_for_status(response)
            for chunk in chunks:
                raw += chunk
                if len(raw) > _MAX_INFO_BYTES:
                    break
        try:
            info = loads(raw)
            if not _COMMIT.fullmatch(info["sha"]) or not isinstance(info["siblings"], list):
                raise ValueError("no commit or file list")
        except (ValueError, TypeError, KeyError) as error:
            raise UnreadableError(
                f"`{urlsplit(self.endpoint).netloc}` does not answer as the hub does",
                "check `HF_ENDPOINT` and any proxy",
            ) from error
        return dict(info)

    @contextmanager
    def _translating(self) -> Iterator[None]:
        try:
            yield
        except transport_errors() as error:
            raise self._explain(error) from error

    def _explain(self, error: BaseException) -> HeadscaleError:
        return explain(error, self.repo, self.revision, self.endpoint)


def snapshot(
    repo: str,
    *,
    revision: str | None = None,
    target: str | Path | None = None,
    cache_dir: str | Path | None = None,
    offline: bool | None = None,
    token: str | bool | None = None,
    on_progress: Tell | None = None,
) -> Path:
    """A full local copy of a checkpoint: one format of the weights, and every other small file.

    Args:
        repo: a hub id.
        revision: branch, tag or commit.
        target: a directory to fill; by default the hub cache.
        cache_dir, offline, token, on_progress: as for `open_checkpoint`.

    Returns:
        The directory. Offline, or out of reach, it is the cached copy if that has all its weights.

    Raises:
        NotFoundError: as for `open_checkpoint`.
    """
    try:
        files = HubFiles(
            repo, revision=revision, cache_dir=cache_dir, offline=offline, token=token, on_progress=on_progress
        )
    except NotFoundError as error:
        cached = cached_snapshot(repo, revision=revision, cache_dir=cache_dir)
        if cached is None or target is not None or not isinstance(error, _Unreachable):
            raise
        return cached[0]
    return _fetch(files, target)


class _Unreachable(NotFoundError):
    """Offline, or no connection: a cached copy would do."""


def explain(error: BaseException, repo: str, revision: str | None, endpoint: str) -> HeadscaleError:
    """Say what a failed hub request means, and what to do about it."""
    from huggingface_hub import errors as hub

    if isinstance(error, HeadscaleError):
        return error
    if isinstance(error, hub.LocalEntryNotFoundError) and error.__cause__ is not None:
        return explain(error.__cause__, repo, revision, endpoint)  # the download's own wrapping of what happened
    if isinstance(error, hub.OfflineModeIsEnabled):
        return _offline(repo)
    if isinstance(error, hub.GatedRepoError):
        return NotFoundError(
            f"`{repo}` is gated and this account has no access to its files",
            f"accept its licence at {endpoint}/{repo} and run `hf auth login`",
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return NotFoundError(f"`{repo}` has no revision `{revision or 'main'}`", "check the branch, tag or commit")
    if isinstance(error, hub.RepositoryNotFoundError):
        return NotFoundError(
            f"the hub has no model `{repo}`, or it is private",
            "check the spelling (there is no such directory either); if it is private, run `hf auth login`",
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, hub.EntryNotFoundError) and status == 404:
        return NotFoundError(f"a file of `{repo}` has gone from the hub", "try again, or give another `--revision`")
    if status in (401, 403):
        return NotFoundError(f"the hub refuses access to `{repo}` ({status})", "run `hf auth login` with a valid token")
    if status is not None:
        return NotFoundError(f"the hub answered {status} for `{repo}`", "try again later")
    return _Unreachable(
        f"`{repo}` is not in the cache and `{urlsplit(endpoint).netloc}` cannot be reached ({type(error).__name__})",
        "check the network and any proxy, or give a local directory",
    )


def human_size(size: int) -> str:
    """A size in decimal units, as the hub shows it."""
    value, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _offline(repo: str) -> _Unreachable:
    return _Unreachable(
        f"`{repo}` is not in the cache and the hub is switched off (offline)",
        f"run `hf download {repo}` while online, unset `HF_HUB_OFFLINE`, or give a local directory",
    )


def _check_id(repo: str) -> None:
    if not _REPO_ID.fullmatch(repo) or ".." in repo or "--" in repo:
        raise NotFoundError(f"`{repo}` is neither an existing path nor a hub id", "a hub id looks like `owner/name`")


@contextmanager
def _no_bars() -> Iterator[None]:
    """The hub's own progress bars off for a while: what is fetched is told through `on_progress`."""
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield  # the user has decided
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _fetch(files: HubFiles, target: str | Path | None) -> Path:
    from huggingface_hub import snapshot_download

    wanted = _wanted(files)
    total = sum(files.size(name) for name in wanted)
    files._tell(f"downloading {len(wanted)} files of `{files.repo}` ({human_size(total)} in all, less what is cached)")
    with files._translating(), _no_bars():
        return Path(
            snapshot_download(
                files.repo,
                revision=files.revision,  # not the commit: the cache is to know the branch afterwards
                cache_dir=files._cache_dir,
                local_dir=target,
                token=files._token,
                endpoint=files.endpoint,
                allow_patterns=[glob_escape(name) for name in wanted],
                **told_by(files._tell, f"`{files.repo}`", total, snapshot_download),
            )
        )


def _wanted(files: HubFiles) -> list[str]:
    folder = model_folder(files)
    found = locate_weights(files, folder)
    if found is None:
        raise NotFoundError(
            f"the repository `{files.repo}` holds no model weights", "give one with `model.safetensors`"
        )
    used = {join_name(folder, name) for name in (found[0], *found[1]) if name}
    return [name for name in files.all_names() if not left_out(name, folder, used)]
