# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""A Hub on this machine, so that pushing and loading are tested with the real client and without a network.

It speaks the part of the Hub's protocol that `push_to_hub` and `from_pretrained` use, keeps everything in
memory, and knows one user. Requests that it does not understand are kept in `unknown`, for tests to look at:
most clients take a 404 for "there is no such file" and go on.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import yaml

USER, TOKEN = "user", "hf_test"
# What the .gitattributes of a new repository on the Hub sends to large file storage, as far as it matters.
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".pkl", ".gz")
LFS_SIZE = 10 * 2**20


class HubError(Exception):
    """An answer that is an error; `code` is what the client tells errors apart by."""

    def __init__(self, status: int, code: str | None, message: str, **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **headers} | ({"X-Error-Code": code} if code else {})


class Blob(NamedTuple):
    """A file of a commit."""

    content: bytes
    lfs: bool

    @property
    def etag(self) -> str:
        """SHA-256 of a large file, else git's name for the content."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


class Commit(NamedTuple):
    """A snapshot of a repository."""

    files: dict[str, Blob]
    message: str


@dataclass
class Repo:
    """A model repository; like the Hub's, it starts with a commit."""

    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", Commit({".gitattributes": Blob(b"", lfs=False)}, "initial commit"))

    def commit(self, branch: str, commit: Commit) -> str:
        """Put a commit on a branch; returns its id."""
        oid = hashlib.sha1(f"{branch} {len(self.commits)} {commit.message}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = commit, oid
        return oid

    def resolve(self, revision: str) -> str:
        """The id of the commit that a branch or a commit's id stands for."""
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    def files(self, revision: str = "main") -> dict[str, Blob]:
        """The files at a revision, by path."""
        return self.commits[self.resolve(revision)].files

    def card(self) -> dict:
        """The metadata at the head of README.md."""
        text = self.files().get("README.md", Blob(b"", lfs=False)).content.decode()
        return _metadata(text) or {}


def _metadata(card: str) -> dict | None:
    """The YAML at the head of a card; None if there is none.

    Raises:
        yaml.YAMLError: if it is not YAML.
    """
    match = re.match(r"---\r?\n(.*?)\n---\s", card, re.DOTALL)
    return None if match is None else yaml.safe_load(match[1])


class HubServer:
    """A Hub at `url`, with its large files at `storage_url`, for as long as the `with` block lasts.

    To the client, these are two hosts, as on the real one: it sends its token to the first only.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.unknown: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        port = self._server.server_address[1]
        self.url, self.storage_url = f"http://127.0.0.1:{port}", f"http://localhost:{port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def find(self, repo_id: str, request: "Request", write: bool = False) -> Repo:
        """The repository, if it is there and the user may see it, or write to it."""
        repo = self.repos.get(repo_id)
        if not request.signed and (write or repo is None or repo.private):
            raise HubError(401, "RepoNotFound", "Invalid username or password.")
        if repo is None:
            raise HubError(404, "RepoNotFound", "Repository not found")
        return repo


class Request(NamedTuple):
    """What a route gets to see of a request."""

    body: bytes
    signed: bool

    @property
    def json(self) -> dict:
        """The body as JSON."""
        return json.loads(self.body or b"{}")


class Response(NamedTuple):
    """What a route answers."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = {}


Route = Callable[..., Response | dict | list]
_ROUTES: list[tuple[str, re.Pattern, Route]] = []


def _route(methods: str, pattern: str) -> Callable[[Route], Route]:
    """Let a function answer requests for paths of that pattern. `{repo}` is an id, other names one quoted
    part."""
    pattern = pattern.replace("{repo}", r"([\w.-]+/[\w.-]+)").replace("{any}", "(.*)")
    compiled = re.compile(re.sub(r"{\w+}", "([^/]+)", pattern))

    def add(function: Route) -> Route:
        _ROUTES.extend((method, compiled, function) for method in methods.split())
        return function

    return add


@_route("GET", "/api/whoami-v2")
def _whoami(hub: HubServer, request: Request) -> dict:
    if not request.signed:
        raise HubError(401, None, "Invalid credentials in Authorization header")
    return {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}


@_route("POST", "/api/repos/create")
def _create_repo(hub: HubServer, request: Request) -> Response | dict:
    if not request.signed:
        raise HubError(401, None, "Invalid username or password.")
    if (request.json.get("organization") or USER) != USER:
        raise HubError(403, None, "You don't have the rights to create a model under this namespace")
    repo_id = f"{USER}/{request.json['name']}"
    answer = {"url": f"{hub.url}/{repo_id}", "name": repo_id}
    if repo_id in hub.repos:
        return Response(json.dumps(answer).encode(), status=409)
    # Older clients say `private`.
    private = request.json.get("visibility") == "private" or bool(request.json.get("private"))
    hub.repos[repo_id] = Repo(private)
    return answer


@_route("POST", "/api/validate-yaml")
def _validate_card(hub: HubServer, request: Request) -> Response | dict:
    try:
        metadata = _metadata(request.json["content"])
    except yaml.YAMLError as error:
        return Response(json.dumps({"errors": [{"message": str(error)}]}).encode(), status=400)
    warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
    return {"errors": [], "warnings": warnings}


@_route("GET", "/api/models/{repo}")
@_route("GET", "/api/models/{repo}/revision/{revision}")
def _model_info(hub: HubServer, request: Request, repo_id: str, revision: str = "main") -> dict:
    repo = hub.find(repo_id, request)
    return {
        "id": repo_id,
        "private": repo.private,
        "sha": repo.resolve(revision),
        "tags": repo.card().get("tags", []),
        "cardData": repo.card(),
        "siblings": [{"rfilename": path} for path in sorted(repo.files(revision))],
    }


@_route("GET", "/api/models/{repo}/refs")
def _refs(hub: HubServer, request: Request, repo_id: str) -> dict:
    branches = hub.find(repo_id, request).branches.items()
    refs = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches]
    return {"branches": refs, "tags": [], "converts": []}


@_route("GET", "/api/models/{repo}/tree/{revision}")
@_route("GET", "/api/models/{repo}/tree/{revision}/{folder}")
def _tree(hub: HubServer, request: Request, repo_id: str, revision: str, folder: str = "") -> list:
    """Always with all subfolders: those who only want one level get more than they asked for."""
    files = hub.find(repo_id, request).files(revision)
    found = {path: blob for path, blob in files.items() if not folder or path.startswith(f"{folder}/")}
    if folder and not found:
        raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
    return [
        {"type": "file", "path": path, "size": len(blob.content), "oid": blob.etag}
        for path, blob in sorted(found.items())
    ]


@_route("POST", "/api/models/{repo}/branch/{branch}")
def _create_branch(hub: HubServer, request: Request, repo_id: str, branch: str) -> Response | dict:
    repo = hub.find(repo_id, request, write=True)
    if branch in repo.branches:
        raise HubError(409, None, f"Reference already exists: {branch}")
    repo.branches[branch] = repo.resolve(request.json.get("startingPoint", "main"))
    return {}


@_route("POST", "/api/models/{repo}/preupload/{revision}")
def _preupload(hub: HubServer, request: Request, repo_id: str, revision: str) -> dict:
    """Tell which files go to large file storage, and which are there already as they are."""
    present = hub.find(repo_id, request, write=True).files(revision)
    answer = []
    for file in request.json["files"]:
        is_large = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE
        mode = {"uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
        oid = {"oid": present[file["path"]].etag} if file["path"] in present else {}
        answer.append({"path": file["path"], **mode, **oid})
    return {"files": answer}


@_route("POST", "/{repo}.git/info/lfs/objects/batch")
def _lfs_batch(hub: HubServer, request: Request, repo_id: str) -> dict:
    hub.find(repo_id, request, write=True)
    objects = []
    for wanted in request.json["objects"]:
        upload = {"href": f"{hub.storage_url}/{wanted['oid']}"}
        verify = {"href": f"{hub.url}/lfs/{wanted['oid']}/verify"}
        new = wanted["oid"] not in hub.large_files
        objects.append({**wanted, "actions": {"upload": upload, "verify": verify}} if new else wanted)
    return {"transfer": "basic", "objects": objects}


@_route("PUT", "/{oid}")
def _lfs_upload(hub: HubServer, request: Request, oid: str) -> dict:
    _check_unsigned(request)
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, None, "The content is not what was announced")
    hub.large_files[oid] = request.body
    return {}


@_route("GET", "/{oid}")
def _lfs_download(hub: HubServer, request: Request, oid: str) -> Response:
    _check_unsigned(request)
    return Response(hub.large_files[oid], headers={"ETag": f'"{oid}"'})


def _check_unsigned(request: Request) -> None:
    """The storage's links say who may follow them; it refuses a token, too."""
    if request.signed:
        raise HubError(400, None, "Only one auth mechanism allowed")


@_route("POST", "/lfs/{oid}/verify")
def _lfs_verify(hub: HubServer, request: Request, oid: str) -> dict:
    if len(hub.large_files.get(oid, b"")) != request.json["size"]:
        raise HubError(404, None, "Object does not exist")
    return {}


@_route("POST", "/api/models/{repo}/commit/{revision}")
def _commit(hub: HubServer, request: Request, repo_id: str, revision: str) -> dict:
    repo = hub.find(repo_id, request, write=True)
    files, message = dict(repo.files(revision)), ""
    for line in request.body.splitlines():
        key, value = (json.loads(line)[name] for name in ("key", "value"))
        if key == "header":
            message = value["summary"]
        elif key == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile" and value["oid"] in hub.large_files:
            files[value["path"]] = Blob(hub.large_files[value["oid"]], lfs=True)
        elif key == "deletedFile":
            del files[value["path"]]
        else:
            raise HubError(400, None, f"Cannot commit {key} {value}")
    oid = repo.commit(revision, Commit(files, message))
    return {"commitUrl": f"{hub.url}/{repo_id}/commit/{oid}", "commitOid": oid}


@_route("GET HEAD", "/{repo}/resolve/{revision}/{any}")
def _resolve(hub: HubServer, request: Request, repo_id: str, revision: str, path: str) -> Response:
    """A file, or for a large one a redirect to where it is, with what the client wants to know of it."""
    repo = hub.find(repo_id, request)
    oid = repo.resolve(revision)
    headers = {"X-Repo-Commit": oid}
    blob = repo.commits[oid].files.get(path)
    if blob is None:
        raise HubError(404, "EntryNotFound", "Entry not found", **headers)
    if not blob.lfs:
        return Response(blob.content, headers={**headers, "ETag": f'"{blob.etag}"'})
    linked = {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
    return Response(b"", 302, {**headers, **linked, "Location": f"{hub.storage_url}/{blob.etag}"})


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, finds its route, writes the answer."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        body = self._read_body()
        path = urlsplit(self.path).path
        with self.hub.lock:
            self.hub.requests.append((self.command, unquote(path)))
            try:
                answer = self._run_route(path, body)
            except HubError as error:
                text = json.dumps({"error": str(error)}).encode()
                answer = Response(text, error.status, error.headers)
        if not isinstance(answer, Response):
            answer = Response(json.dumps(answer).encode())
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _run_route(self, path: str, body: bytes) -> Response | dict | list:
        token = self.headers.get("Authorization")
        if token not in (None, f"Bearer {TOKEN}"):
            raise HubError(401, None, "Invalid credentials in Authorization header")
        for method, pattern, route in _ROUTES:
            match = pattern.fullmatch(path)
            if method == self.command and match:
                return route(self.hub, Request(body, token is not None), *map(unquote, match.groups()))
        self.hub.unknown.append((self.command, path))
        raise HubError(404, None, f"This server does not know {self.command} {path}")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, *args) -> None:
        """Tests look at `requests`."""
