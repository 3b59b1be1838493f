"""A stand-in for the Hugging Face hub on loopback: one model, the few requests that a download makes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(repo: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder as a model of that id. Gives the address, and the list of file names that were downloaded."""
    downloaded: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path.startswith(f"/api/models/{repo}/tree/"):
                names = sorted(file.name for file in folder.iterdir())
                entries = [
                    {"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": COMMIT} for n in names
                ]
                self.answer(json.dumps(entries).encode())
            elif path in (f"/api/models/{repo}", f"/api/models/{repo}/revision/main"):
                siblings = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                self.answer(json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings, "tags": []}).encode())
            elif path.startswith(f"/{repo}/resolve/") and (folder / path.split("/")[-1]).is_file():
                name = path.split("/")[-1]
                if self.command == "GET":
                    downloaded.append(name)
                content = (folder / name).read_bytes()
                self.answer(content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT})
            else:
                self.answer(b"Repository not found", {"X-Error-Code": "RepoNotFound"}, status=404)

        def answer(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", downloaded
    finally:
        server.shutdown()
        server.server_close()
