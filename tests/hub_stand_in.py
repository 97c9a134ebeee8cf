"""A hub of model repositories on this machine: directories, served as huggingface_hub asks for them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def served(root: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub of the repositories `root/<owner>/<name>`, and the files that were fetched so far."""
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, body: bool) -> None:
            path = self.path.partition("?")[0].strip("/")
            if path.startswith("api/models/"):
                repository = root / Path(*path.split("/")[2:4])
                files = [{"type": "file", "path": f.name, "size": 1, "oid": COMMIT} for f in repository.glob("*")]
                return self._send(200, json.dumps(files).encode(), body)
            repository, _, file = path.partition("/resolve/main/")
            if not (root / repository).is_dir():
                return self._send(404, b"", body, "RepoNotFound")
            if not (root / repository / file).is_file():
                return self._send(404, b"", body, "EntryNotFound")
            if body:
                fetched.append(file)
            return self._send(200, (root / repository / file).read_bytes(), body)

        def _send(self, status: int, data: bytes, body: bool, error: str | None = None) -> None:
            self.send_response(status)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("Content-Length", str(len(data)))
            if error is not None:
                self.send_header("X-Error-Code", error)
            self.end_headers()
            if body:
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
