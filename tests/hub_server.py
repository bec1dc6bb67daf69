"""A server on loopback that speaks as much of the Hugging Face hub's protocol as a model or a dataset needs.

Repositories are local directories; those of datasets have names that begin with `datasets/`. Large files live on a
second "storage" address (another origin, as signed storage addresses do), where ranges are served and no authorization
may arrive. Faults are switched on per server.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit

CHUNK = 64 << 10


@dataclass
class Faults:
    """What goes wrong, and how often."""

    gated: bool = False  # files answer 401 (403 with a token) and GatedRepo; the description stays public
    refuse: int = 0  # every file answers this status
    busy: int = 0  # so many file requests answer 503 first
    break_after: int = 0  # a response body ends after so many bytes ...
    breaks: int = 0  # ... so many times
    ignore_range: bool = False  # 200 and the whole file
    wrong_range: bool = False  # 206 of another part
    circle: bool = False  # the storage address redirects to itself
    expire_after: int = 0  # a storage address answers 403 after so many uses
    seconds_per_chunk: float = 0.0
    not_a_hub: bool = False  # the description is an HTML page


@dataclass
class Repo:
    """One repository: a directory at one commit, under the names that it answers to."""

    directory: Path
    commit: str = ""
    token: str = ""  # private: needs this token
    sizes: bool = True  # whether the listing carries sizes

    def __post_init__(self) -> None:
        self.commit = self.commit or hashlib.sha1(str(self.directory).encode()).hexdigest()

    def files(self) -> list[str]:
        """Every file, relative, with slashes."""
        found = (path for path in self.directory.rglob("*") if path.is_file())
        return sorted(path.relative_to(self.directory).as_posix() for path in found)


@dataclass
class HubServer:
    """Serve repositories while the `with` block lasts; counts requests and bytes of file bodies by path."""

    repos: dict[str, Repo]
    renamed: dict[str, str] = field(default_factory=dict)
    large: int = 1 << 16  # files from this size on are redirected to the storage address
    faults: Faults = field(default_factory=Faults)
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range
    sent: Counter[str] = field(default_factory=Counter)  # body bytes by file name, as handed to the socket
    leaked: list[str] = field(default_factory=list)  # storage paths at which an authorization header arrived

    def __enter__(self) -> HubServer:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._lock = threading.Lock()
        self.connections: set[socket.socket] = set()
        self._uses: Counter[str] = Counter()
        self._signature = 0
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        with self._lock:
            for connection in tuple(self.connections):
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)

    @property
    def endpoint(self) -> str:
        """The hub's own address."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def storage(self) -> str:
        """The storage's address: the same socket, another origin."""
        return f"http://localhost:{self._server.server_port}/storage"

    def sign(self) -> str:
        """A fresh signature for a storage address."""
        with self._lock:
            self._signature += 1
            return str(self._signature)

    def take(self, name: str) -> bool:
        """Use up one occurrence of a counted fault."""
        with self._lock:
            left: int = getattr(self.faults, name)
            setattr(self.faults, name, max(0, left - 1))
            return left > 0

    def use(self, signature: str) -> bool:
        """Whether a signed address is still good."""
        with self._lock:
            self._uses[signature] += 1
            return not self.faults.expire_after or self._uses[signature] <= self.faults.expire_after

    def count(self, name: str, size: int) -> None:
        """Note body bytes."""
        with self._lock:
            self.sent[name] += size


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the client may hang up whenever it has enough
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    """One connection; at most a thousand requests on it."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    timeout = 20  # an idle connection is dropped, so that no thread outlives a test for long

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        try:
            if path.startswith("/storage/"):
                self._storage(path)
            elif match := re.fullmatch(r"/api/datasets/(.+?)/tree/([^/]+)/?(.*)", path):
                self._tree(f"datasets/{match[1]}", match[2], match[3])
            elif match := re.fullmatch(r"/api/(?:models/)?(.+?)/(revision|tree)/([^/]+|refs/pr/\d+)", path):
                self._describe(match[1], match[3], tree=match[2] == "tree")
            elif match := re.fullmatch(r"/api/(?:models/)?(.+)", path):
                self._describe(match[1], "main", tree=False)
            elif match := re.fullmatch(r"/(.+?)/resolve/([^/]+|refs/pr/\d+)/(.+)", path):
                self._resolve(match[1], match[2], match[3])
            else:
                self._error(404, "RepoNotFound")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _repo(self, name: str, revision: str) -> Repo | None:
        if name in self.hub.renamed:
            self._redirect(307, self.path.replace(name, self.hub.renamed[name], 1))
            return None
        repo = self.hub.repos.get(name)
        if repo is None or (repo.token and self.headers.get("Authorization") != f"Bearer {repo.token}"):
            self._error(401 if "Authorization" not in self.headers else 404, "RepoNotFound")
            return None
        if revision not in ("main", repo.commit):
            self._error(404, "RevisionNotFound")
            return None
        return repo

    def _describe(self, name: str, revision: str, *, tree: bool) -> None:
        if self.hub.faults.not_a_hub:
            self._send(200, b"<html>log in to this network</html>", {"Content-Type": "text/html"})
            return
        repo = self._repo(name, revision)
        if repo is None:
            return
        entries = []
        for file in repo.files():
            size = (repo.directory / file).stat().st_size
            if tree:
                entries.append({"type": "file", "path": file, "size": size, "oid": _etag(file, size)})
            else:
                entries.append({"rfilename": file, **({"size": size} if repo.sizes else {})})
        info = {"id": name, "modelId": name, "sha": repo.commit, "siblings": entries, "tags": [], "downloads": 0}
        info |= {"gated": "manual" if self.hub.faults.gated else False, "private": bool(repo.token)}
        body = json.dumps(entries if tree else info).encode()
        self._send(200, body, {"Content-Type": "application/json"})

    def _tree(self, name: str, revision: str, folder: str) -> None:
        """A folder's entries, or with `recursive` everything below it."""
        repo = self._repo(name, revision)
        if repo is None:
            return
        prefix = f"{folder.rstrip('/')}/" if folder.rstrip("/") else ""
        below = [file for file in repo.files() if file.startswith(prefix)]
        if not below:
            self._error(404, "EntryNotFound")
            return
        parts = {file: file.removeprefix(prefix).split("/") for file in below}
        deep = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
        folders = {prefix + "/".join(p[:n]) for p in parts.values() for n in range(1, len(p)) if deep or n == 1}
        entries = [{"type": "directory", "path": path, "size": 0, "oid": _etag(path, 0)} for path in sorted(folders)]
        for file in (file for file, p in parts.items() if deep or len(p) == 1):
            size = (repo.directory / file).stat().st_size
            entries.append({"type": "file", "path": file, "size": size, "oid": _etag(file, size)})
        self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repo = self._repo(name, revision)
        if repo is None:
            return
        path = repo.directory / file
        if self.hub.faults.gated:
            self._error(403 if "Authorization" in self.headers else 401, "GatedRepo")
        elif self.hub.faults.refuse:
            self._error(self.hub.faults.refuse, "")
        elif not path.is_file():
            self._error(404, "EntryNotFound", {"X-Repo-Commit": repo.commit})
        elif self.command == "GET" and self.hub.take("busy"):
            self._error(503, "", {"Retry-After": "0"})
        else:
            size = path.stat().st_size
            marks = {"X-Repo-Commit": repo.commit, "ETag": f'"{_etag(file, size)}"', "Accept-Ranges": "bytes"}
            if size < self.hub.large:
                self._file(path, marks)
                return
            marks |= {"X-Linked-Size": str(size), "X-Linked-ETag": f'"{_etag(file, size)}"'}
            self._redirect(302, f"{self.hub.storage}/{self.hub.sign()}/{name}/{file}", marks)

    def _storage(self, path: str) -> None:
        signature, where = path.removeprefix("/storage/").split("/", 1)
        if "Authorization" in self.headers:
            self.hub.leaked.append(path)
        if self.hub.faults.circle:
            self._redirect(302, self.path)
        elif not self.hub.use(signature):
            self._error(403, "")
        else:
            name = max((name for name in self.hub.repos if where.startswith(f"{name}/")), key=len)
            self._file(self.hub.repos[name].directory / where.removeprefix(f"{name}/"), {})

    def _file(self, path: Path, headers: dict[str, str]) -> None:
        size = path.stat().st_size
        start, end, status = 0, size, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and not self.hub.faults.ignore_range:
            start, end, status = int(asked[1]), min(size, int(asked[2] or size - 1) + 1), 206
            if start >= size:
                self._error(416, "", {"Content-Range": f"bytes */{size}"})
                return
            start -= 1 if self.hub.faults.wrong_range and start else 0
            headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{size}"}
        self._head(status, end - start, {**headers, "Content-Type": "application/octet-stream"})
        if self.command == "GET":
            self._body(path, start, end)

    def _body(self, path: Path, start: int, end: int) -> None:
        stop = end
        if self.hub.faults.break_after and end - start > self.hub.faults.break_after and self.hub.take("breaks"):
            stop = start + self.hub.faults.break_after
        for piece in _pieces(path, start, stop):
            time.sleep(self.hub.faults.seconds_per_chunk)
            self.hub.count(path.name, len(piece))  # before the client can act on it
            self.wfile.write(piece)
        if stop < end:
            self.close_connection = True

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        marks = {"X-Error-Code": code, "X-Error-Message": code} if code else {}
        self._send(status, b"" if self.command == "HEAD" else b'{"error": "no"}', {**marks, **(headers or {})})

    def _redirect(self, status: int, target: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"", {"Location": target, **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._head(status, len(body), headers)
        if self.command == "GET":
            self.wfile.write(body)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(key, value)
        self.end_headers()


def _etag(file: str, size: int) -> str:
    return hashlib.sha256(f"{file}:{size}".encode()).hexdigest()


def _pieces(path: Path, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        for position in range(start, end, CHUNK):
            yield file.read(min(CHUNK, end - position))
