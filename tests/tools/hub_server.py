"""A stand-in for the hub, on the loopback: the part of its protocol that huggingface_hub speaks to send files.

The hub itself, and beside it, at a port of its own, the store that large files go to: whole ones to a signed address
without any token (LFS), or chunks with a token of its own (Xet). Notes every request, and fails where a test says so.
"""

import base64
import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_" + "averysecrettoken" * 2
STORE_TOKEN = "of the store alone"
LARGE = (".safetensors", ".png", ".model")


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=lambda: ["0" * 40])

    def oid(self, name: str) -> str | None:
        """The id of a file's content as the hub gives it: a large file's sha256, else git's own."""
        if name not in self.files:
            return None
        content = self.files[name]
        if name.endswith(LARGE):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class FakeHub:
    """``url`` is what HF_ENDPOINT is to name."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        """Hub or store, method and path, and the Authorization header of each request."""
        self.role = "write"
        self.fails: dict[str, int] = {}
        """Status to answer with, by a part of method and path."""
        self.before_answer: Callable[[str], None] = lambda request: None
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, name)) for name in ("hub", "store")]
        self.url, self.store_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        for server in self._servers:
            Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def sent(self, part: str) -> list[str]:
        return [request for _, request, _ in self.requests if part in request]

    def answer(self, request: str, authorization: str | None, body: bytes) -> tuple[int, Any]:
        """Status and content of what the hub says."""
        if authorization != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        for pattern, function in ROUTES:
            match = re.fullmatch(pattern, request.split("?", maxsplit=1)[0])
            if match:
                return function(self, *match.groups(), body=body)
        return 404, {"error": f"{request} is not known here"}

    def who(self, body: bytes) -> tuple[int, Any]:
        return 200, {"name": "ann", "type": "user", "auth": {"accessToken": {"role": self.role}}}

    def create(self, body: bytes) -> tuple[int, Any]:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repositories:
            return 409, {"error": "exists", "url": f"{self.url}/{name}"}
        # One name in huggingface_hub 1.x, another in 2.x.
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.repositories[name] = Repository(private)
        return 200, {"url": f"{self.url}/{name}"}

    def info(self, name: str, body: bytes) -> tuple[int, Any]:
        repository = self.repositories.get(name)
        if repository is None:
            return 404, {"error": "Repository not found"}
        files = [{"rfilename": file} for file in repository.files]
        answer = {"id": name, "modelId": name, "private": repository.private, "siblings": files}
        return 200, answer | {"sha": repository.commits[-1], "tags": [], "downloads": 0}

    def check_card(self, body: bytes) -> tuple[int, Any]:
        return 200, {"errors": [], "warnings": []}

    def preupload(self, name: str, body: bytes) -> tuple[int, Any]:
        repository, answers = self.repositories[name], []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            answers.append(answer | {"oid": repository.oid(file["path"])})
        return 200, {"files": answers}

    def batch(self, name: str, body: bytes) -> tuple[int, Any]:
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"href": f"{self.store_url}/{asked['oid']}"}
            verify = {"href": f"{self.url}/{name}.git/info/lfs/verify"}
            actions = {} if asked["oid"] in self.large else {"actions": {"upload": upload, "verify": verify}}
            objects.append({**asked, **actions})
        return 200, {"transfer": "basic", "objects": objects}

    def verify(self, name: str, body: bytes) -> tuple[int, Any]:
        asked = json.loads(body)
        return (200, {}) if len(self.large.get(asked["oid"], b"")) == asked["size"] else (422, {"error": "size"})

    def store_access(self, name: str, body: bytes) -> tuple[int, Any]:
        expires = int(time.time()) + 3600
        return 200, {"accessToken": STORE_TOKEN, "exp": expires, "casUrl": self.store_url}

    def store(self, request: str, body: bytes) -> tuple[int, Any]:
        """What the store says; of Xet's interface only the first version, which its client goes back to."""
        path = request.partition(" ")[2]
        if request.startswith("PUT"):
            self.large[path.lstrip("/")] = body
        elif path.startswith("/v1/xorbs/"):
            content = _unpacked(body)
            self.large[hashlib.sha256(content).hexdigest()] = content
            return 200, {"was_inserted": True}
        elif path.startswith("/v1/shards"):
            return 200, {"result": 1}
        else:
            return 404, {}
        return 200, {}

    def commit(self, name: str, body: bytes) -> tuple[int, Any]:
        repository = self.repositories[name]
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                repository.files[value["path"]] = self.large[value["oid"]]
        repository.commits.append(f"{len(repository.commits):040x}")
        oid = repository.commits[-1]
        return 200, {"commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"}


NAME = r"([^/ ]+/[^/ ]+?)"
ROUTES: tuple[tuple[str, Callable[..., tuple[int, Any]]], ...] = (
    (r"GET /api/whoami-v2", FakeHub.who),
    (r"POST /api/repos/create", FakeHub.create),
    (r"POST /api/validate-yaml", FakeHub.check_card),
    (rf"GET /api/models/{NAME}(?:/revision/main)?", FakeHub.info),
    (rf"POST /api/models/{NAME}/preupload/main", FakeHub.preupload),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", FakeHub.batch),
    (rf"POST /{NAME}\.git/info/lfs/verify", FakeHub.verify),
    (rf"GET /api/models/{NAME}/xet-write-token/main", FakeHub.store_access),
    (rf"POST /api/models/{NAME}/commit/main", FakeHub.commit),
)


def _unpacked(xorb: bytes) -> bytes:
    """The content of Xet's chunks that could not be compressed, one file's: a header of 8 bytes before each."""
    content = b""
    while xorb:
        version, scheme, length = xorb[0], xorb[4], int.from_bytes(xorb[1:4], "little")
        assert (version, scheme) == (0, 0), "only what is stored as it is can be read here"
        content, xorb = content + xorb[8 : 8 + length], xorb[8 + length :]
    return content


def _handler(hub: FakeHub, server: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self._body()
            request, authorization = f"{self.command} {self.path}", self.headers.get("Authorization")
            hub.requests.append((server, request, authorization))
            hub.before_answer(request)
            status, content = 200, {}
            failing = next((status for part, status in hub.fails.items() if part in request), None)
            if failing:
                status, content = failing, {"error": "as the test says"}
            elif server == "store":
                status, content = hub.store(request, body)
            else:
                status, content = hub.answer(request, authorization, body)
            answer = json.dumps(content).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        do_GET = do_POST = do_PUT = _serve  # noqa: N815

        def log_message(self, *args: Any) -> None:
            pass

    return Handler
