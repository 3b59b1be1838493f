"""A stand-in for the Hugging Face hub on loopback: one model, the few requests that a download makes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHUNK = 2**16  # bytes
OTHER = "89abcdef0123456789abcdef0123456789abcdef"


class Hub:
    """One model.

    Args:
        repo: its id.
        folder: the content of `main`, as `COMMIT`.
        token: the token that a request must carry; None for a public model.

    `downloaded` has the name of every file that was requested in full or from some byte on; `ranges` the requests of
    weight files. `drop[name] = n` ends the connection after n bytes of a file, as often as `drops` says.
    `on_download(name)` is called before a file is sent.
    """

    def __init__(self, repo: str, folder: Path, token: str | None = None) -> None:
        self.repo, self.token = repo, token
        self.commits = {COMMIT: folder}
        self.main = COMMIT
        self.downloaded: list[str] = []
        self.ranges: list[tuple[str, str | None]] = []
        self.drop: dict[str, int] = {}
        self.drops = 0
        self.on_download: Callable[[str], None] = lambda name: None
        self.address = ""

    def run(self, cache: Path, code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run code in a process whose hub is this one: the address is read when huggingface_hub is imported."""
        variables = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and k != "HF_TOKEN"}
        variables |= {"HF_ENDPOINT": self.address, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
        variables |= {"MLX_RESONANCE_BLAS": "off", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
        # A broken connection leaves full chunks on the disk; the default of 10 MB is larger than the files here.
        chunks = f"import huggingface_hub.constants as c; c.DOWNLOAD_CHUNK_SIZE = {CHUNK}\n"
        command = [sys.executable, "-c", chunks + code, *map(str, arguments)]
        return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)

    def command(self, cache: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `mlx-resonance`."""
        code = "import sys; sys.argv[0] = 'mlx-resonance'; from mlx_resonance.cli import main; main()"
        return self.run(cache, code, *arguments, **environment)


@contextmanager
def serve(repo: str, folder: Path, token: str | None = None) -> Iterator[Hub]:
    """Serve a folder as the model with that id."""
    hub = Hub(repo, folder, token)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.answer(b"Repository not found", {"X-Error-Code": "RepoNotFound"}, status=401)
            found = re.fullmatch(rf"/api/models/{repo}(?:/(revision|tree)/(\w+))?(?:/.*)?", path)
            commit = self.commit_of(found[2] or "main") if found else None
            if found and commit:
                names = sorted(file.name for file in hub.commits[commit].iterdir())
                body: Any = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in names], "tags": []}
                if found[1] == "tree":
                    sizes = {name: (hub.commits[commit] / name).stat().st_size for name in names}
                    body = [{"type": "file", "path": n, "size": size, "oid": commit} for n, size in sizes.items()]
                return self.answer(json.dumps(body).encode())
            found = re.fullmatch(rf"/{repo}/resolve/(\w+)/([^/]+)", path)
            commit = self.commit_of(found[1]) if found else None
            if found and commit and (hub.commits[commit] / found[2]).is_file():
                return self.send(hub.commits[commit] / found[2], commit)
            self.answer(b"Repository not found", {"X-Error-Code": "RepoNotFound"}, status=404)

        def commit_of(self, revision: str) -> str | None:
            commit = hub.main if revision == "main" else revision
            return commit if commit in hub.commits else None

        def send(self, path: Path, commit: str) -> None:
            content = path.read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
            asked = self.headers.get("Range")
            status, part = 200, content
            if asked and (found := re.fullmatch(r"bytes=(\d+)-(\d*)", asked)):
                start = int(found[1])
                part = content[start : int(found[2]) + 1 if found[2] else None]
                headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
                status = 206
            if self.command == "GET":
                if path.suffix == ".safetensors":
                    hub.ranges.append((path.name, asked))
                if not asked or asked.endswith("-"):
                    hub.downloaded.append(path.name)
                    hub.on_download(path.name)
                if path.name in hub.drop and hub.drops > 0 and (not asked or asked.endswith("-")):
                    hub.drops -= 1
                    headers["Content-Length"] = str(len(part))
                    part = content[: hub.drop[path.name]][len(content) - len(part) :]
            self.answer(part, headers, status)

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
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
