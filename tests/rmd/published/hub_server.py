"""A hub on this machine: the four routes that the client asks, with faults on demand."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What the server answers from.

    Attributes:
        folders: "owner/name" -> its files.
        gated: names that answer as gated.
        cut: files whose transfer is cut in the middle, as (path, times left).
        asked: every request line so far.
    """

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        self.gated: set[str] = set()
        self.cut: dict[str, int] = {}
        self.asked: list[str] = []
        self.url = ""


@contextmanager
def serving(folders: dict[str, Path]) -> Iterator[Hub]:
    """A hub with these repositories, each at :data:`COMMIT`, which "main" and "v1" name too."""
    hub = Hub(folders)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            name = (api or file)[1] if api or file else ""  # type: ignore[index]
            if name in hub.gated:
                return self._send(403, b"{}", body, {"X-Error-Code": "GatedRepo"})
            if name not in hub.folders:
                return self._send(401, b"{}", body, {"X-Error-Code": "RepoNotFound"})
            revision = api[3] if api else file[2] if file else ""
            if revision not in (COMMIT, "main", "v1"):
                return self._send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
            root = hub.folders[name]
            if api and api[2] == "revision":
                return self._send(200, json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode(), body)
            if api:
                found = sorted(path for path in root.rglob("*") if path.is_file())
                entries = [
                    {"type": "file", "path": p.relative_to(root).as_posix(), "size": p.stat().st_size, "oid": _etag(p)}
                    for p in found
                ]
                return self._send(200, json.dumps(entries).encode(), body)
            assert file is not None
            place = root / file[3]
            if not place.is_file():
                return self._send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
            return self._file(place, file[3], body)

        def _file(self, place: Path, relative: str, body: bool) -> None:
            content = place.read_bytes()
            headers = {"ETag": f'"{_etag(place)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            start = int(match[1]) if (match := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if body and hub.cut.get(relative, 0) > 0:
                hub.cut[relative] -= 1
                self.send_response(206 if start else 200)
                for key, value in {**headers, "Content-Length": str(len(content) - start)}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(content[start : start + max((len(content) - start) // 2, 1)])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
                return
            self._send(206 if start else 200, content[start:], body, headers)

        def _send(self, code: int, content: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:40]
