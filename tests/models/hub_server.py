"""A hub in this process: the few addresses of Hugging Face's that downloads and uploads ask for."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories by name and revision, each a table of files; `asked` holds the files that were downloaded."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.asked: list[str] = []
        self.url = ""

    def put(self, repo: str, files: dict[str, bytes], revision: str = "main") -> None:
        self.repos.setdefault(repo, {})[revision] = files

    def put_folder(self, repo: str, folder: Path, revision: str = "main") -> None:
        self.put(repo, {path.name: path.read_bytes() for path in folder.iterdir()}, revision)

    def commit(self, repo: str, revision: str) -> str:
        content = repr(sorted(self.repos[repo][revision].items())).encode()
        return hashlib.sha1(repo.encode() + content).hexdigest()

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """Files at a branch or commit."""
        for branch, files in self.repos[repo].items():
            if revision in (branch, self.commit(repo, branch)):
                return files
        return None


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def answer(self, body: object = None, code: int = 200, **headers: str) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(code)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def missing(self, what: str) -> None:
            self.answer({"error": what}, 404, X_Error_Code=what)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            words = unquote(urlsplit(self.path).path).strip("/").split("/")
            if words[:2] == ["api", "models"]:
                repo, rest = "/".join(words[2:4]), words[4:]
            else:
                repo, rest = "/".join(words[:2]), words[2:]
            if repo not in hub.repos:
                return self.missing("RepoNotFound")
            revision = rest[1] if len(rest) > 1 else "main"
            files = hub.files(repo, revision)
            if files is None:
                return self.missing("RevisionNotFound")
            branch = next(name for name, one in hub.repos[repo].items() if one is files)
            commit = hub.commit(repo, branch)
            if rest[:1] == ["resolve"]:
                name = "/".join(rest[2:])
                if name not in files:
                    return self.missing("EntryNotFound")
                hub.asked.append(name)
                return self.answer(files[name], X_Repo_Commit=commit, ETag=f'"{hashlib.sha1(files[name]).hexdigest()}"')
            if rest[:1] == ["tree"]:
                rows = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                return self.answer(rows)
            siblings = [{"rfilename": name} for name in files]
            return self.answer({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "private": False})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            words = unquote(urlsplit(self.path).path).strip("/").split("/")
            if words == ["api", "repos", "create"]:
                given = json.loads(body)
                repo = f"{given.get('organization') or 'me'}/{given['name']}"
                hub.repos.setdefault(repo, {}).setdefault("main", {})
                return self.answer({"url": f"{hub.url}/{repo}", "id": repo})
            if words == ["api", "validate-yaml"]:
                return self.answer({"errors": [], "warnings": []})
            repo, action, revision = "/".join(words[2:4]), words[4], words[5]
            if action == "branch":
                hub.repos[repo].setdefault(revision, {})
                return self.answer({})
            if action == "preupload":
                paths = [row["path"] for row in json.loads(body)["files"]]
                kinds = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
                return self.answer({"files": kinds})
            for line in body.decode().splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    hub.repos[repo][revision][row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            commit = hub.commit(repo, revision)
            url = f"{hub.url}/{repo}/commit/{commit}"
            return self.answer({"success": True, "commitOid": commit, "commitUrl": url})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
