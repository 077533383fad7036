# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""A stand-in, in memory, for the part of the Hub's HTTP API that `push_to_hub` and `from_pretrained` use."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


COMMIT = "0" * 40


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
        content = found and self.server.repos.get(found[1], {}).get(found[2])
        if content is None:
            return self.answer({}, 404, {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha256(content).hexdigest()
        self.answer(content, headers={"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def do_PUT(self):
        self.server.uploads[self.path.removeprefix("/upload/")] = self.body()
        self.answer({})

    def do_POST(self):
        body, path = self.body(), self.path.removeprefix("/api/")
        if path == "repos/create":
            request = json.loads(body)
            name = f"{request['organization']}/{request['name']}"
            self.server.repos.setdefault(name, {})
            self.answer({"name": name, "url": f"{self.server.url}/{name}"})
        elif "/preupload/" in path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in files}
            self.answer(
                {"files": [{"path": name, "uploadMode": modes[name], "shouldIgnore": False} for name in files]}
            )
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for item in objects:
                item["actions"] = {"upload": {"href": f"{self.server.url}/upload/{item['oid']}"}}
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            repo = path.removeprefix("models/").split("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.server.repos[repo][value["path"]] = self.server.uploads[value["oid"]]
            url = f"{self.server.url}/{repo}/commit/{COMMIT}"
            self.answer({"success": True, "commitOid": COMMIT, "commitUrl": url})
        elif path == "validate-yaml":
            self.answer({"errors": [], "warnings": []})
        else:
            self.answer({}, 404, {"X-Error-Code": "EntryNotFound"})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, content: bytes | dict, status: int = 200, headers: dict[str, str] | None = None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        """Silent."""


@contextmanager
def hub_server():
    """Runs the stand-in in a thread; yields it. `url` is its address, `repos` maps a repository to its files."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.repos, server.uploads = {}, {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
