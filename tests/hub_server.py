"""A small hub on this machine, speaking the part of the hub's HTTP API that we use.

Serves folders as repositories, can cut a download short, and takes uploads in. Not
covered: logins (any token will do), branches, the xet protocol.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_SMALL = 10_000  # bytes; larger uploads go the way of large files


class Hub:
    """State of the server."""

    def __init__(self) -> None:
        self.url = ""
        self.down = False  # hang up on everybody
        self.repos: dict[str, Path] = {}  # id -> folder
        self.cut: dict[str, int] = {}  # file name -> bytes after which to hang up, once
        self.ranges: list[tuple[str, str]] = []  # (file, Range header) of downloads
        self.requested: list[str] = []  # "GET /path"
        self.uploaded: dict[str, bytes] = {}  # file -> content
        self.large: dict[str, bytes] = {}  # sha256 -> content


@contextmanager
def running() -> Iterator[Hub]:
    """A hub in a thread of this process."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""

    def _answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if not isinstance(body, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def parse_request(self) -> bool:
        """As usual, unless the hub is down, also for connections that were open before."""
        self.close_connection = True
        return not self.hub.down and super().parse_request()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.hub.requested.append(f"{self.command} {path}")
        for repo, folder in self.hub.repos.items():
            if path.startswith(f"/api/models/{repo}"):
                return self._about(repo, folder, path.removeprefix(f"/api/models/{repo}"))
            if path.startswith(f"/{repo}/resolve/"):
                _, _, name = path.removeprefix(f"/{repo}/resolve/").partition("/")
                return self._file(folder / name)
        return self._answer(404, {"error": "no"}, X_Error_Code="RepoNotFound")

    def _about(self, repo: str, folder: Path, rest: str) -> None:
        if rest.startswith("/revision/") and rest[10:] not in ("main", COMMIT):
            return self._answer(404, {"error": "no"}, X_Error_Code="RevisionNotFound")
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if rest.startswith("/tree/"):
            rows = [
                {
                    **{"type": "file", "path": str(f.relative_to(folder))},
                    **{"size": f.stat().st_size, "oid": _digest(f)[:40]},
                }
                for f in files
            ]
            return self._answer(200, rows)
        siblings = [
            {"rfilename": str(f.relative_to(folder)), "size": f.stat().st_size} for f in files
        ]
        about = {"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "tags": []}
        return self._answer(200, {**about, "siblings": siblings, "downloads": 0, "likes": 0})

    def _file(self, file: Path) -> None:
        common = {"X_Repo_Commit": COMMIT}
        if not file.is_file():
            return self._answer(404, b"", X_Error_Code="EntryNotFound", **common)
        data = file.read_bytes()
        common |= {"ETag": f'"{_digest(file)}"', "Accept_Ranges": "bytes"}
        wanted = self.headers.get("Range")
        status = 200
        if self.command == "GET":
            self.hub.ranges.append((file.name, wanted or ""))
        if wanted:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            common["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data, status = data[start:], 206
        cut = self.hub.cut.pop(file.name, None) if self.command == "GET" else None
        if cut is None:
            return self._answer(status, data, **common)
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in common.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data[:cut])
        self.wfile.flush()
        self.close_connection = True
        return None

    def do_POST(self) -> None:
        path = unquote(self.path.partition("?")[0])
        body = self._body()
        self.hub.requested.append(f"POST {path}")
        if path == "/api/repos/create":
            given = json.loads(body)
            repo = "/".join(filter(None, [given.get("organization"), given["name"]]))
            return self._answer(200, {"url": f"{self.hub.url}/{repo}", "name": repo})
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] > _SMALL else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    **{key: item[key] for key in ("oid", "size")},
                    "actions": {"upload": {"href": f"{self.hub.url}/put/{item['oid']}"}},
                }
                for item in json.loads(body)["objects"]
            ]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            for line in body.decode().splitlines():
                self._commit(json.loads(line))
            repo, _, _ = path.removeprefix("/api/models/").partition("/commit/")
            url = f"{self.hub.url}/{repo}/commit/{COMMIT}"
            return self._answer(200, {"commitUrl": url, "commitOid": COMMIT})
        return self._answer(404, {"error": "no"})

    def _commit(self, entry: dict[str, Any]) -> None:
        value = entry["value"]
        if entry["key"] == "file":
            self.hub.uploaded[value["path"]] = base64.b64decode(value["content"])
        elif entry["key"] == "lfsFile":
            self.hub.uploaded[value["path"]] = self.hub.large[value["oid"]]

    def do_PUT(self) -> None:
        self.hub.requested.append(f"PUT {self.path}")
        body = self._body()
        self.hub.large[hashlib.sha256(body).hexdigest()] = body
        self._answer(200)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
