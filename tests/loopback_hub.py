"""A hub on 127.0.0.1 that speaks enough of Hugging Face's and ModelScope's protocols for their real clients.

    with LoopbackHub() as hub:
        hub.hf["org/name"] = Repo({"config.json": b"{}"})     Hugging Face: HF_ENDPOINT=hub.url
        hub.ms["org/name"] = Repo({"config.json": b"{}"})     ModelScope:   MODELSCOPE_ENDPOINT=hub.url
        ...
        hub.travelled("hf")                                   names of the files whose bytes were asked for

How the two answer is taken from their clients' sources (huggingface_hub 2.4, modelscope_hub 0.5.1) and, for what
ModelScope says of an unknown revision and of commits, from public code that was tested against it.
"""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Files = dict[str, bytes]


@dataclass
class Repo:
    """A repository: its files now, and what they were at older commits."""

    files: Files
    older: dict[str, Files] = field(default_factory=dict)
    refused: int = 0
    """Status for those who ask for a file: 401 or 403 where it is gated; 0 gives it."""
    announced: dict[str, int] = field(default_factory=dict)
    """Sizes that the list of files claims instead of the true ones."""

    @property
    def commit(self) -> str:
        """The hash of what it holds."""
        digest = hashlib.sha1()
        for name, body in self.files.items():
            digest.update(f"{name}\0{_git_id(body)}\0".encode())
        return digest.hexdigest()

    def push(self, files: Files) -> None:
        """Moves the branch on to other files."""
        self.older[self.commit] = self.files
        self.files = files

    def at(self, revision: str, branch: str) -> Files | None:
        """Its files at a revision; None when there is no such revision."""
        return self.files if revision in (branch, self.commit) else self.older.get(revision)

    def size(self, name: str, body: bytes) -> int:
        """What the list of files says of one."""
        return self.announced.get(name, len(body))


@dataclass(frozen=True)
class Asked:
    """A request that came in."""

    method: str
    path: str
    file: str | None
    range: str | None
    user_agent: str


class LoopbackHub:
    """Both hubs in one server, on a port of its own; stopped when the context ends or by `stop`."""

    def __init__(self) -> None:
        self.hf: dict[str, Repo] = {}
        self.ms: dict[str, Repo] = {}
        self.asked: list[Asked] = []
        self.cut: dict[str, int] = {}
        """File name -> bytes after which the connection is dropped, once."""
        self.broken: set[str] = set()
        """Names of files that are answered with status 500."""
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Takes the hub off the network; its port refuses connections from now on."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def travelled(self, prefix: str) -> list[str]:
        """Files that were sent, by name; `prefix` is hf or ms."""
        return sorted({asked.file for asked in self.sent(prefix) if asked.file})

    def sent(self, prefix: str) -> list[Asked]:
        """Requests for the bytes of a file, in order."""
        return [asked for asked in self.asked if asked.method == "GET" and asked.file and asked.path.startswith(prefix)]


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        path = urllib.parse.unquote(url.path).strip("/")
        parts = path.split("/")
        if parts[:2] == ["api", "v1"]:
            file = query.get("FilePath")
            self._note(f"ms {path}", file)
            self._modelscope(parts[2:], query, file)
        else:
            file = "/".join(parts[4:]) if parts[2:3] == ["resolve"] else None
            self._note(f"hf {path}", file)
            self._huggingface(parts, file)

    def _note(self, path: str, file: str | None) -> None:
        agent = self.headers.get("User-Agent", "")
        self.hub.asked.append(Asked(self.command, path, file, self.headers.get("Range"), agent))

    # --- Hugging Face ---

    def _huggingface(self, parts: list[str], file: str | None) -> None:
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            repo = self.hub.hf.get("/".join(parts[2:4]))
            what, revision = parts[4:6] if len(parts) >= 6 else ("revision", "main")
        elif file is not None:
            repo = self.hub.hf.get("/".join(parts[:2]))
            what, revision = "resolve", parts[3]
        else:
            return self._send(404, b"")
        if repo is None:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        files = repo.at(revision, "main")
        if files is None:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        commit = repo.commit if files is repo.files else revision
        if what == "revision":
            listed = [{"rfilename": n, "size": repo.size(n, b), "blobId": _git_id(b)} for n, b in files.items()]
            return self._json({"id": "/".join(parts[2:4]), "sha": commit, "siblings": listed})
        if what == "tree":
            entries = [{"type": "file", "path": n, "size": len(b), "oid": _git_id(b)} for n, b in files.items()]
            return self._json(entries)
        if repo.refused:
            return self._send(repo.refused, b"", {"X-Error-Code": "GatedRepo"})
        if file not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        return self._bytes(file or "", files[file], {"X-Repo-Commit": commit, "ETag": f'"{_git_id(files[file])}"'})

    # --- ModelScope ---

    def _modelscope(self, parts: list[str], query: dict[str, str], file: str | None) -> None:
        if parts[0] != "models" or len(parts) < 4:
            return self._json({"Code": 200, "Data": {}})
        repo = self.hub.ms.get("/".join(parts[1:3]))
        if repo is None:
            return self._json({"Code": 10010205001, "Message": "record not found", "Success": False}, 404)
        if repo.refused:
            return self._json({"Code": 10010205002, "Message": "access denied", "Success": False}, repo.refused)
        files = repo.at(query.get("Revision", "master"), "master")
        if parts[3:] == ["repo", "files"]:
            entries = None if files is None else [_entry(repo, n, b) for n, b in files.items()]
            return self._json({"Code": 200, "Data": {"Files": entries}, "Message": "success", "Success": True})
        if not files or file not in files:
            return self._json({"Code": 10990101007, "Message": "file not found", "Success": False}, 404)
        return self._bytes(file or "", files[file], {})

    # --- both ---

    def _bytes(self, name: str, body: bytes, headers: dict[str, str]) -> None:
        if name in self.hub.broken and self.command == "GET":
            return self._send(500, b"")
        start = 0
        if (wanted := self.headers.get("Range")) is not None:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers = {**headers, "Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
        keep = self.hub.cut.pop(name, None) if self.command == "GET" else None
        return self._send(206 if wanted else 200, body[start:], {**headers, "Accept-Ranges": "bytes"}, keep)

    def _json(self, tree: Any, status: int = 200) -> None:
        self._send(status, json.dumps(tree).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, keep: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:keep])
        if keep is not None:
            self.close_connection = True


def _git_id(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def _entry(repo: Repo, name: str, body: bytes) -> dict[str, Any]:
    # The file written last names the newest commit; the others were there before it.
    newest = name == list(repo.files)[-1]
    return {
        "Path": name,
        "Name": name.rpartition("/")[2],
        "Type": "blob",
        "Size": repo.size(name, body),
        "Sha256": hashlib.sha256(body).hexdigest(),
        "Revision": repo.commit if newest else "0" * 40,
        "CommittedDate": 1_700_000_000 + newest,
    }
