"""A Hub of our own on the loopback interface: what `huggingface_hub` asks of one, with faults on demand.

Repositories live in memory. A commit is applied whole or not at all, large files go through the LFS batch
endpoint and come back through a redirect, and errors carry the codes that the client tells apart. Standard
library only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"
LFS_SUFFIXES = (".safetensors", ".bin", ".pth")


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Commit:
    sha: str
    message: str
    files: dict[str, Blob]
    parent: Commit | None = None


@dataclass
class Repo:
    private: bool
    branches: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> Commit:
        parent = self.branches.get(branch)
        listing = json.dumps([parent and parent.sha, message, sorted((p, b.oid) for p, b in files.items())])
        commit = Commit(hashlib.sha1(listing.encode()).hexdigest(), message, files, parent)
        self.branches[branch] = self.commits[commit.sha] = commit
        return commit

    def resolve(self, revision: str) -> Commit | None:
        return self.branches.get(revision) or self.commits.get(revision)


@dataclass
class Fault:
    """What to do with the next ``times`` requests of ``method`` to a ``path`` that matches.

    ``status`` answers with it; ``cut`` sends that many bytes of the body and hangs up; ``short`` announces and
    sends that many bytes fewer than there are; ``hang`` sets ``reached`` and never answers.
    """

    method: str
    path: str
    times: int = 1
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    short: int = 0
    hang: bool = False
    reached: threading.Event = field(default_factory=threading.Event)


class Hub(ThreadingHTTPServer):
    """The server: ``endpoint`` is its address, ``log`` the requests it saw, ``repos`` what it holds."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.storage = f"http://localhost:{self.server_address[1]}/storage"  # another host, as the real one's is
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.lock = threading.RLock()
        self.stopped = threading.Event()

    def fault(self, method: str, path: str, **what) -> Fault:
        self.faults.append(Fault(method, path, **what))
        return self.faults[-1]

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.log)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.repos[repo].branches[revision].files.items()}

    def history(self, repo: str, revision: str = "main") -> list[str]:
        messages, commit = [], self.repos[repo].branches[revision]
        while commit is not None:
            messages.append(commit.message)
            commit = commit.parent
        return messages

    def handle_error(self, request, client_address) -> None:
        """Say nothing: clients are killed and connections cut on purpose."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.stopped.set()
        hub.shutdown()
        hub.server_close()
        thread.join()


class Refused(Exception):  # noqa: N818
    def __init__(self, status: int, code: str = "", message: str = "", headers: dict | None = None) -> None:
        super().__init__(message or code or str(status))
        self.status, self.code, self.message = status, code, message
        self.headers = headers or {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Hub

    def log_message(self, *args) -> None:
        """Keep the test's output clean; ``Hub.log`` has the requests."""

    def answer(self, status: int, body: bytes = b"", headers: dict | None = None, length: int | None = None) -> None:
        short = self.fault.short if self.fault else 0
        body = body[: len(body) - short]
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.cut is not None:
            self.wfile.write(body[: self.fault.cut])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(body)

    def json(self, value: object, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def dispatch(self) -> None:
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        self.server.log.append(f"{self.command} {path}")
        self.fault = self.server.take_fault(self.command, path)
        if self.fault and self.fault.cut is not None and self.command in ("PUT", "POST"):
            self.rfile.read(min(length, self.fault.cut))
            self.close_connection = True
            return
        if self.fault and self.fault.hang:
            self.fault.reached.set()
            self.server.stopped.wait()
            return
        self.body = self.rfile.read(length)
        try:
            if self.fault and self.fault.status:
                raise Refused(self.fault.status, message="fault on demand", headers=self.fault.headers)
            for method, pattern, function in ROUTES:
                if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, path)):
                    with self.server.lock:
                        function(self, **match.groupdict())
                    return
            raise Refused(404, message=f"no such route: {self.command} {path}")
        except Refused as refusal:
            headers = dict(refusal.headers)
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            headers["X-Error-Message"] = refusal.message or refusal.code
            self.fault = None
            self.answer(refusal.status, json.dumps({"error": str(refusal)}).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = dispatch  # noqa: N815

    @property
    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def need_writer(self) -> None:
        if not self.token:
            raise Refused(401, message="Invalid username or password.")
        if self.token != WRITER:
            raise Refused(403, message="You don't have the rights to write here")

    def repo(self, name: str) -> Repo:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and self.token not in (WRITER, READER)):
            raise Refused(404 if self.token else 401, "RepoNotFound", "Repository not found")
        return repo

    def revision(self, repo: str, revision: str) -> Commit:
        commit = self.repo(repo).resolve(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def create(self) -> None:
        self.need_writer()
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or 'writer'}/{wanted['name']}"
        url = f"{self.server.endpoint}/{name}"
        if name in self.server.repos:
            self.json({"error": "You already created this model repo", "url": url}, 409)
            return
        repo = Repo(private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        repo.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        self.server.repos[name] = repo
        self.json({"url": url, "name": name, "id": name})

    def branch(self, repo: str, branch: str) -> None:
        self.need_writer()
        found = self.repo(repo)
        if branch in found.branches:
            raise Refused(409, message="Reference already exists")
        found.branches[branch] = found.branches["main"]
        self.json({})

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        if match is None:
            self.json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
            return
        bad = [line for line in match[1].splitlines() if not re.match(r"\s*(- |[\w-]+:( |$)|#|$)", line)]
        errors = [{"message": f"not YAML: {line}"} for line in bad]
        self.json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, repo: str, revision: str) -> None:
        self.need_writer()
        files = self.revision(repo, revision).files
        answer = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            held = files.get(file["path"])
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": held and held.oid})
        self.json({"files": answer})

    def batch(self, repo: str) -> None:
        self.need_writer()
        self.repo(repo)
        answer = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.objects:
                entry["actions"] = {
                    "upload": {"href": f"{self.server.storage}/{wanted['oid']}", "header": {}},
                    "verify": {
                        "href": f"{self.server.endpoint}/{repo}.git/info/lfs/objects/verify",
                        "header": {},
                    },
                }
            answer.append(entry)
        self.json({"transfer": "basic", "objects": answer})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, message="content does not hash to its name")
        self.server.objects[oid] = self.body
        self.answer(200, headers={"ETag": f'"{oid}"'})

    def verify(self, repo: str) -> None:
        wanted = json.loads(self.body)
        if len(self.server.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refused(404, message="object not found or of another size")
        self.json({})

    def commit(self, repo: str, revision: str) -> None:
        self.need_writer()
        found, parent = self.repo(repo), self.revision(repo, revision)
        if revision not in found.branches:
            raise Refused(404, "RevisionNotFound", "can only commit to a branch")
        files, summary = dict(parent.files), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                summary = value["summary"]
                if value.get("parentCommit") not in (None, parent.sha):
                    raise Refused(412, message="A commit has happened since")
            elif item["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise Refused(400, message=f"LFS object {value['oid']} was never uploaded")
                files[value["path"]] = Blob(self.server.objects[value["oid"]], True)
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refused(400, message=f"unknown operation {item['key']}")
        commit = found.commit(revision, files, summary)
        url = f"{self.server.endpoint}/{repo}/commit/{commit.sha}"
        self.json({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})

    def info(self, repo: str, revision: str = "main") -> None:
        commit = self.revision(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        private = self.server.repos[repo].private
        self.json(
            {
                "_id": "0",
                "id": repo,
                "modelId": repo,
                "sha": commit.sha,
                "private": private,
                "siblings": siblings,
            }
        )

    def tree(self, repo: str, revision: str) -> None:
        files = self.revision(repo, revision).files
        self.json(
            [{"type": "file", "path": path, "oid": blob.oid, "size": len(blob.data)} for path, blob in files.items()]
        )

    def resolve(self, repo: str, revision: str, path: str) -> None:
        commit = self.revision(repo, revision)
        headers = {"X-Repo-Commit": commit.sha}
        blob = commit.files.get(path)
        if blob is None:
            raise Refused(404, "EntryNotFound", "Entry not found", headers)
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.data))}
            self.answer(302, headers={**headers, "Location": f"{self.server.storage}/{blob.oid}"})
            return
        self.content(blob, headers)

    def download(self, oid: str) -> None:
        if self.token:
            raise Refused(400, message="a token was sent to another host")
        if oid not in self.server.objects:
            raise Refused(404, message="no such object")
        self.content(Blob(self.server.objects[oid], True), {})

    def content(self, blob: Blob, headers: dict) -> None:
        headers = {**headers, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted is None:
            self.answer(200, blob.data, headers)
            return
        start, size = int(wanted[1]), len(blob.data)
        if start >= size:
            raise Refused(416, headers={"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        self.answer(206, blob.data[start:], headers)

    def whoami(self) -> None:
        if self.token not in (WRITER, READER):
            raise Refused(401, message="Invalid credentials in Authorization header")
        self.json({"type": "user", "name": "writer", "orgs": [], "auth": {}})


_REPO, _REVISION = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<revision>[\w.-]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<branch>[\w.-]+)", Handler.branch),
    ("POST", rf"/api/models/{_REPO}/preupload/{_REVISION}", Handler.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/{_REVISION}", Handler.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", Handler.batch),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/verify", Handler.verify),
    ("PUT", r"/storage/(?P<oid>\w+)", Handler.upload),
    ("GET", r"/storage/(?P<oid>\w+)", Handler.download),
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("GET", rf"/api/models/{_REPO}", Handler.info),
    ("GET", rf"/api/models/{_REPO}/revision/{_REVISION}", Handler.info),
    ("GET", rf"/api/models/{_REPO}/tree/{_REVISION}", Handler.tree),
    ("GET", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", Handler.resolve),
]
