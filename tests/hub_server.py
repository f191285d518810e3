"""A Hub of one's own: as much of its HTTP interface as fetching a snapshot and uploading a folder use."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

REVISIONS = {"main": "0" * 40, "v2": "2" * 40}


class Handler(BaseHTTPRequestHandler):
    """`server.files` maps a repository's id (datasets/ID for a data set) to its files; `server.asked` is what was asked
    for, in order; `server.public` the repositories that are not private."""

    def log_message(self, *_):
        pass

    def _answer(self, code: int, body: bytes = b"", headers: dict | None = None) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content, code: int = 200) -> None:
        self._answer(code, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _missing(self, kind: str) -> None:
        self._answer(404, b"{}", {"X-Error-Code": kind, "X-Error-Message": "no such thing"})

    def do_GET(self):
        parts = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        self.server.asked.append("/".join(parts))
        if parts[:2] in (["api", "models"], ["api", "datasets"]):
            name, rest = _id(parts[1], parts[2:4]), parts[4:]
            revision = rest[1] if len(rest) > 1 else "main"
            if name not in self.server.files:
                return self._missing("RepoNotFound")
            if revision not in REVISIONS and revision not in REVISIONS.values():
                return self._missing("RevisionNotFound")
            sha, names = REVISIONS.get(revision, revision), self.server.files[name]
            if rest[:1] == ["tree"]:
                files = [{"type": "file", "path": f, "size": len(b), "oid": _sha(b)} for f, b in names.items()]
                return self._json(files)
            siblings = [{"rfilename": file} for file in names]
            return self._json({"id": name, "sha": sha, "siblings": siblings, "private": name not in self.server.public})
        dataset = parts[0] == "datasets"
        parts = parts[dataset:]
        if len(parts) < 5:  # something about the library itself
            return self._missing("EntryNotFound")
        name, sha, file = _id("datasets" if dataset else "models", parts[:2]), parts[3], "/".join(parts[4:])
        body = self.server.files.get(name, {}).get(file)
        if body is None:
            return self._missing("EntryNotFound")
        headers = {"ETag": f'"{_sha(body)}"', "X-Repo-Commit": REVISIONS.get(sha, sha)}
        return self._answer(200, body, headers)

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlparse(self.path).path
        self.server.asked.append(path.strip("/"))
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self._answer(401, b'{"error": "Invalid credentials"}')
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.server.created.append(asked)
            kind = "datasets" if asked.get("type") == "dataset" else "models"
            name = _id(kind, [asked["organization"], asked["name"]])
            if name not in self.server.files and not asked.get("private", asked.get("visibility") == "private"):
                self.server.public.add(name)
            self.server.files.setdefault(name, {})
            return self._json({"url": f"{self.server.url}/{asked['organization']}/{asked['name']}"})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        name = _id(path.split("/")[2], path.split("/")[3:5])
        if "/preupload/" in path:
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return self._json({"files": [one | {"shouldIgnore": False} for one in files]})
        files = self.server.files[name]
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "deletedFile":
                del files[entry["value"]["path"]]
        sha = REVISIONS["main"]
        return self._json({"commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}", "success": True})


def _id(kind: str, name: list[str]) -> str:
    """A repository's name in `server.files`."""
    return "/".join([*(["datasets"] if kind == "datasets" else []), *name])


def _sha(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@contextmanager
def hub(files: dict[str, dict[str, bytes]], public: tuple[str, ...] = ()):
    """The server, with `url`, while the block lasts. Of the repositories in `files` all but `public` are private."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.public, server.asked, server.created = files, set(public), [], []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
