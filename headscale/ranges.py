"""HTTP byte ranges over huggingface_hub's own session: redirects by hand, broken connections resumed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin, urlsplit

from headscale.errors import HeadscaleError, UnreadableError

MAX_REDIRECTS = 10
# Breaks in a row that one range may survive; a server that breaks more often than that is down.
MAX_BREAKS = 5
# So many bytes between two breaks and the count starts afresh: a slow line may still finish a large tensor.
PROGRESS_BYTES = 8 << 20
# A server without byte ranges sends the file from its start: so much may be skipped to reach the header, no more.
MAX_SKIP_BYTES = 1 << 20
# Seconds before a second try; doubled for each further one.
PAUSE = 0.1
_REDIRECTS = {301, 302, 303, 307, 308}
_BUSY = {408, 429, 500, 502, 503, 504}
# requests drops what it holds of a chunk when the line breaks, so chunks are small there.
_CHUNK = 16 << 10
_Origin = tuple[str, str | None, int | None]


class _Busy(OSError):
    """The server asks to come back later."""

    def __init__(self, status: int, wait: float) -> None:
        super().__init__(f"HTTP {status}")
        self.wait = wait


@dataclass
class Remote:
    """One file on a server: where it is, what to send along, how large it should be.

    `moved` remembers where the redirects ended, so that later ranges go there at once.
    """

    url: str
    headers: Mapping[str, str]
    label: str
    size: int
    hint: str
    explain: Callable[[Exception], HeadscaleError]
    moved: str = field(default="", init=False)


class RangeReader:
    """Reads one byte range of a remote file from front to back; `received` counts what came over the wire."""

    def __init__(self, remote: Remote, start: int, end: int) -> None:
        self._rest = memoryview(b"")
        self.received = 0
        self._chunks = self._stream(remote, start, end)

    def readinto(self, buffer: memoryview) -> None:
        """Fill the buffer with the next bytes, or raise `UnreadableError`."""
        filled = 0
        while filled < len(buffer):
            if not self._rest:
                self._rest = memoryview(next(self._chunks))
            count = min(len(self._rest), len(buffer) - filled)
            buffer[filled : filled + count] = self._rest[:count]
            self._rest, filled = self._rest[count:], filled + count

    def close(self) -> None:
        """Close the connection, finished or not."""
        self._chunks.close()

    def _stream(self, remote: Remote, start: int, end: int) -> Generator[bytes, None, None]:
        position, breaks, mark = start, 0, start
        while position < end:
            wait, before = 0.0, position
            cause: BaseException | None = None
            try:
                with _opened(remote, position, end) as (skip, chunks):
                    for chunk in chunks:
                        self.received += len(chunk)
                        piece = chunk[skip : skip + end - position]
                        skip = max(0, skip - len(chunk))
                        position += len(piece)
                        yield piece
                        if position >= end:
                            return
            except transport_errors() as error:
                wait, cause = getattr(error, "wait", 0.0), error
            breaks, mark = (1 if position - mark >= PROGRESS_BYTES else breaks + 1), position
            if breaks > MAX_BREAKS:
                raise _gave_up(remote, position, breaks, cause) from cause
            # a line that delivered something is tried again at once, a silent one after longer and longer pauses
            time.sleep(min(10.0, wait or (PAUSE / 2 if position > before else PAUSE * 2**breaks)))


def _gave_up(remote: Remote, position: int, breaks: int, cause: BaseException | None) -> UnreadableError:
    fault = f"the server answered {cause}" if isinstance(cause, _Busy) else "the connection broke"
    return UnreadableError(
        f"{fault} {breaks} times in a row while reading `{remote.label}`, last at byte {position}",
        f"try again later, or download it whole: {remote.hint}",
    )


def transport_errors() -> tuple[type[BaseException], ...]:
    """What a failing connection raises: the HTTP library under huggingface_hub differs by its version."""
    from huggingface_hub.errors import HfHubHTTPError

    bases = [base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"]
    return (OSError, *bases)


@contextmanager
def get(url: str, headers: Mapping[str, str]) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """One streamed GET, no redirect followed, as (response, its chunks)."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    session, timeout = get_session(), constants.HF_HUB_DOWNLOAD_TIMEOUT
    sent = {**headers, "Accept-Encoding": "identity"}
    if callable(getattr(session, "stream", None)):  # httpx, huggingface_hub 1 and later
        with session.stream("GET", url, headers=sent, timeout=timeout, follow_redirects=False) as response:
            yield response, response.iter_raw()
    else:  # requests
        with session.get(url, headers=sent, timeout=timeout, allow_redirects=False, stream=True) as response:
            yield response, response.iter_content(_CHUNK)


@contextmanager
def follow(url: str, headers: Mapping[str, str]) -> Iterator[tuple[Any, Iterator[bytes], str]]:
    """A streamed GET through redirects, as (response, chunks, final address).

    The authorization goes to the first address' origin only: signed storage addresses must not see it.
    """
    origin = _origin(url)
    for _ in range(MAX_REDIRECTS):
        with ExitStack() as stack:
            response, chunks = stack.enter_context(get(url, _allowed(headers, origin, url)))
            target = response.headers.get("Location")
            if response.status_code in _REDIRECTS and target:
                url = urljoin(url, target)
                continue
            yield response, chunks, url
            return
    raise UnreadableError(f"`{urlsplit(url).hostname}` redirects in a circle", "check `HF_ENDPOINT`")


@contextmanager
def _opened(remote: Remote, start: int, end: int) -> Iterator[tuple[int, Iterator[bytes]]]:
    """The bytes from `start` on, as (bytes to skip first, chunks); a stale signed address is renewed once."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import hf_raise_for_status

    asked = {**remote.headers, "Range": f"bytes={start}-{end - 1}"}
    if remote.moved:
        with get(remote.moved, _allowed(asked, _origin(remote.url), remote.moved)) as (response, chunks):
            if response.status_code in {200, 206}:
                yield _check_range(remote, response, start, end), chunks
                return
        remote.moved = ""
    with follow(remote.url, asked) as (response, chunks, final):
        if response.status_code in _BUSY:
            raise _Busy(response.status_code, _seconds(response.headers.get("Retry-After")))
        if response.status_code == 416:
            raise _shorter(remote)
        try:
            hf_raise_for_status(response)
        except HfHubHTTPError as error:
            raise remote.explain(error) from error
        remote.moved = final
        yield _check_range(remote, response, start, end), chunks


def _check_range(remote: Remote, response: Any, start: int, end: int) -> int:
    """How many bytes to skip: 0 when the range was honoured, the start when a small one was not."""
    if response.status_code == 206:
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start:
            raise UnreadableError(
                f"the server sent another part of `{remote.label}` than asked for", f"download it whole: {remote.hint}"
            )
        if match[3] != "*" and int(match[3]) != remote.size:
            raise _shorter(remote)
        return 0
    if start > MAX_SKIP_BYTES:
        raise UnreadableError(
            f"the server of `{remote.label}` ignores byte ranges, and would send all {remote.size} bytes",
            "download it whole first: " + remote.hint,
        )
    return start


def _shorter(remote: Remote) -> UnreadableError:
    return UnreadableError(
        f"`{remote.label}` is not {remote.size} bytes long on the server that holds it, as the hub says",
        "try again later, or another revision",
    )


def _allowed(headers: Mapping[str, str], origin: _Origin, url: str) -> dict[str, str]:
    home = _origin(url) == origin
    return {key: value for key, value in headers.items() if home or key.lower() not in {"authorization", "cookie"}}


def _origin(url: str) -> _Origin:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _seconds(text: str | None) -> float:
    """A `Retry-After` in seconds; a date, or nothing, counts as no wish."""
    return float(text) if text and text.isdecimal() else 0.0
