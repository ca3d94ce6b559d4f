"""A hub on the loopback device that speaks Hugging Face's protocol and ModelScope's, and counts what it is asked."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves folders as repositories.

    Attributes:
        models: Name -> folder of a model.
        datasets: Name -> folder of a data set.
        asked: Paths of all requests.
        damaged: Names of files that arrive with a byte changed.
        gated: Names of models that need consent.
    """

    def __init__(self) -> None:
        self.models: dict[str, Path] = {}
        self.datasets: dict[str, Path] = {}
        self.asked: list[str] = []
        self.damaged: set[str] = set()
        self.gated: set[str] = set()
        super().__init__(("127.0.0.1", 0), _Answers)

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def downloads(self) -> list[str]:
        """Names of the files whose contents were asked for."""
        files = []
        for path in self.asked:
            query = parse_qs(urlsplit(path).query)
            if "/resolve/" in path or "/media/" in path:
                files.append(unquote(urlsplit(path).path).rpartition("/")[2])
            elif "FilePath" in query:
                files.append(query["FilePath"][0])
        return files


class _Answers(BaseHTTPRequestHandler):
    server: HubServer

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        if with_body:
            self.server.asked.append(self.path)
        url = urlsplit(self.path)
        parts, query = unquote(url.path).strip("/").split("/"), parse_qs(url.query)
        if parts[:3] == ["api", "v1", "repos"]:
            self._ai_studio(parts[3:], query)
        elif parts[:2] == ["api", "v1"]:
            self._modelscope(parts[2:], query)
        elif parts[0] == "api":
            self._hugging_face(parts[1:])
        elif "resolve" in parts:
            self._file(parts, with_body=with_body)
        else:
            self._send(404, b"{}")

    def _hugging_face(self, parts: list[str]) -> None:
        """api/models/<owner>/<name>[/revision/<revision>]."""
        name = "/".join(parts[1:3])
        revision = parts[4] if len(parts) > 4 else "main"
        folder = getattr(self.server, parts[0], {}).get(name)
        if folder is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif name in self.server.gated:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif revision not in ("main", "v1", COMMIT):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            files = [{"rfilename": each} for each in _names(folder)]
            self._send_json({"id": name, "sha": COMMIT, "siblings": files})

    def _file(self, parts: list[str], *, with_body: bool) -> None:
        """[datasets/]<owner>/<name>/resolve/<revision>/<file>."""
        kind = "datasets" if parts[0] == "datasets" else "models"
        parts = parts[1:] if kind == "datasets" else parts
        path = getattr(self.server, kind)["/".join(parts[:2])] / "/".join(parts[4:])
        content = path.read_bytes()
        head = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        self._send(200, content, head, with_body=with_body)

    def _modelscope(self, parts: list[str], query: dict[str, list[str]]) -> None:
        """models/<owner>/<name>/repo[/files], or datasets/... with /tree."""
        folder = getattr(self.server, parts[0], {}).get("/".join(parts[1:3]))
        if folder is None or query["Revision"][0] not in ("master", "v1"):
            self._send(404, json.dumps({"Code": 10010205001, "Message": "not found"}).encode())
        elif len(parts) == 5:
            entries: list[dict[str, Any]] = [
                {"Path": "docs", "Type": "tree"},
                {"Path": "../out", "Type": "blob"},
            ]
            for name in _names(folder):
                content = (folder / name).read_bytes()
                digest = hashlib.sha256(content).hexdigest()
                entries.append({"Path": name, "Type": "blob", "Size": len(content), "Sha256": digest})
            self._send_json({"Code": 200, "Data": {"Files": entries}})
        else:
            name = query["FilePath"][0]
            content = (folder / name).read_bytes()
            self._send(200, content[:-1] + b"#" if name in self.server.damaged else content)

    def _ai_studio(self, parts: list[str], query: dict[str, list[str]]) -> None:
        """repos/<owner>/<name>/contents, or .../media/<file>."""
        folder = self.server.models.get("/".join(parts[:2]))
        if folder is None or query.get("ref", ["v1"])[0] != "v1":
            self._send(404, b"{}")
        elif parts[2] == "contents":
            files = [{"path": name, "type": "file", "size": 130} for name in _names(folder)]
            self._send_json([{"path": "docs", "type": "dir"}, *files])
        else:
            self._send(200, (folder / parts[3]).read_bytes())

    def _send_json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(
        self, code: int, content: bytes, head: dict[str, str] | None = None, *, with_body: bool = True
    ) -> None:
        self.send_response(code)
        for name, value in {**(head or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing: requests are counted, not shown."""


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def closed_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """A hub that answers for the length of a block."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
