"""A small Hub on this machine: its HTTP API as huggingface-hub uses it, repos held in memory.

What it knows: who one is, repos that are made, private or not, branches and tags, files in git or
by their hash (git LFS, in one piece or in parts), commits, trees, and files in whole or in part.
It refuses as the Hub does: what one may not see does not exist.
"""

import base64
import contextlib
import hashlib
import http.server
import itertools
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

USER, ORGANISATION = "someone", "lab"
TOKEN = "hf_" + "Secret" * 6
READ_ONLY = "hf_" + "Reader" * 6


class Cut(Exception):
    """The connection ends here, without an answer."""


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    kind: str = "model"
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, revision: str) -> str:
        """The commit of a branch, a tag or a commit; "" if there is none."""
        known = {**{name: name for name in self.commits}, **self.tags, **self.branches}
        return known.get(revision, "")

    def add(self, branch: str, files: dict[str, bytes], message: str) -> str:
        content = json.dumps([message, sorted(files), len(self.commits)]).encode()
        name = hashlib.sha1(content).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        self.messages.append(message)
        return name


@dataclass
class Hub:
    """State and switches; what was asked of it."""

    endpoint: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # large files by SHA-256
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)  # method, path
    tokens: set[str] = field(default_factory=set)  # that were sent here
    received: int = 0  # bytes of large files
    large: int = 10_000  # bytes from which a file is large
    part: int = 0  # large files come in parts of so many bytes (0: in one)
    # Part of a path -> after how many bytes of the file the connection is cut, each time.
    cuts: dict[str, int] = field(default_factory=dict)
    # (method, part of a path) -> the status that answers, with the token that came as its text.
    echoes: dict[tuple[str, str], int] = field(default_factory=dict)

    def put(self, name: str, files: dict[str, bytes], **how) -> Repo:
        """A repo that is there already."""
        repo = self.repos[name] = Repo(**how)
        for content in files.values():
            if len(content) >= self.large:
                self.objects[hashlib.sha256(content).hexdigest()] = content
        repo.add("main", files, "put here")
        return repo

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[name]
        return repo.commits[repo.commit(revision)]

    def writes(self) -> list[tuple[str, str]]:
        return [(method, path) for method, path in self.asked if method not in ("GET", "HEAD")]

    def cut_after(self, path: str) -> int | None:
        return next((count for part, count in self.cuts.items() if part in path), None)


class Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two packets

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.route = [unquote(part) for part in url.path.strip("/").split("/")]
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        self.hub.asked.append((self.command, url.path))
        own = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.token = own
        self.hub.tokens |= {own} if own else set()
        try:
            for (method, part), status in self.hub.echoes.items():
                if method == self.command and part in self.path:
                    self.body()
                    came = self.headers.get("Authorization")
                    return self.error(status, message=f"what came: {came}")
            if own and own not in (TOKEN, READ_ONLY):
                return self.error(401, message="Invalid credentials in Authorization header")
            if self.command in ("GET", "HEAD"):
                self.get()
            elif self.command == "PUT":
                self.put_object()
            else:
                self.post(self.body())
        except Cut:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def get(self) -> None:
        route = self.route
        if route[:2] == ["api", "whoami-v2"]:
            if not self.token:
                return self.error(401, message="Invalid username or password.")
            return self.json({"type": "user", "name": USER, "orgs": [{"name": ORGANISATION}]})
        if route[0] == "api" and len(route) >= 4:
            kind, name, rest = route[1].removesuffix("s"), "/".join(route[2:4]), route[4:]
            repo = self.visible(name, kind)
            if repo is None:
                return None
            if rest == ["refs"]:
                return self.json({"branches": refs(repo.branches, "heads"), "converts": [],
                                  "tags": refs(repo.tags, "tags")})  # fmt: skip
            commit = repo.commit(rest[1] if rest else "main")
            if not commit:
                return self.error(404, "RevisionNotFound")
            if rest[:1] == ["tree"]:
                files = repo.commits[commit]
                return self.json([self.entry(path, files[path]) for path in sorted(files)])
            return self.json(
                {
                    "id": name,
                    "sha": commit,
                    "private": repo.private,
                    "siblings": [{"rfilename": path} for path in sorted(repo.commits[commit])],
                }
            )
        if len(route) >= 5 and route[2] == "resolve":
            repo = self.visible("/".join(route[:2]), "model")
            return None if repo is None else self.resolve(repo, route[3], "/".join(route[4:]))
        return self.error(404)

    def post(self, body: bytes) -> None:
        route = self.route
        if route[0] == "objects":  # a large file has come in parts
            return self.complete(route[1], json.loads(body))
        if not self.token:
            return self.error(401, message="Invalid username or password.")
        if self.token == READ_ONLY:
            return self.error(403, message="your token is for reading")
        if route == ["api", "repos", "create"]:
            return self.create(json.loads(body))
        if route[0] == "api" and route[-1] == "validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if route[-3:] == ["lfs", "objects", "batch"]:
            return self.batch(json.loads(body))
        name, verb, revision = "/".join(route[2:4]), route[4], "/".join(route[5:])
        repo = self.visible(name, "model")
        if repo is None:
            return None
        if verb == "branch":
            if revision in repo.branches:
                return self.error(409, message="Reference already exists")
            repo.branches[revision] = repo.commit(json.loads(body).get("startingPoint", "main"))
            return self.json({})
        if revision not in repo.branches:
            return self.error(404, "RevisionNotFound")
        if verb == "preupload":
            return self.json({"files": [self.mode(file) for file in json.loads(body)["files"]]})
        assert verb == "commit"
        return self.commit(name, repo, revision, [json.loads(line) for line in body.splitlines()])

    def create(self, wish: dict) -> None:
        owner = wish.get("organization") or USER
        name = f"{owner}/{wish['name']}"
        if owner not in (USER, ORGANISATION):
            return self.error(403, message=f"You have no right to make repos under {owner}")
        if name in self.hub.repos:
            return self.error(409, message="You already created this model repo")
        repo = self.hub.repos[name] = Repo(private=wish.get("visibility") == "private")
        repo.add("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return self.json({"url": f"{self.hub.endpoint}/{name}"})

    def mode(self, file: dict) -> dict:
        large = file["size"] >= self.hub.large
        mode = "lfs" if large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def batch(self, wish: dict) -> None:
        answers = []
        for one in wish["objects"]:
            answer = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.objects:
                url, header = f"{self.hub.endpoint}/objects/{one['oid']}", {}
                if self.hub.part:
                    count = -(-one["size"] // self.hub.part)
                    header = {str(n): f"{url}?part={n}" for n in range(1, count + 1)}
                    header["chunk_size"] = str(self.hub.part)
                answer["actions"] = {"upload": {"href": url, "header": header}}
            answers.append(answer)
        return self.json({"transfer": "basic", "objects": answers})

    def put_object(self) -> None:
        """Large files are stored elsewhere than the Hub, by signed addresses: with no token."""
        name, part = self.route[1], int(self.query.get("part", 0))
        limit = self.hub.cut_after(f"{name}?part={part}")
        content = self.body(limit)
        if part:
            self.hub.parts[name, part] = content
        elif not self.store(name, content):
            return self.error(400, message="not the bytes that were promised")
        return self.empty(200, ETag=f'"{hashlib.md5(content).hexdigest()}"')

    def complete(self, name: str, done: dict) -> None:
        numbers = [part["partNumber"] for part in done["parts"]]
        if not self.store(name, b"".join(self.hub.parts[name, number] for number in numbers)):
            return self.error(400, message="not the bytes that were promised")
        return self.json({})

    def store(self, name: str, content: bytes) -> bool:
        if hashlib.sha256(content).hexdigest() != name:
            return False
        self.hub.objects[name] = content
        return True

    def commit(self, name: str, repo: Repo, branch: str, lines: list[dict]) -> None:
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.branches[branch]):
            return self.error(412, message="A commit has happened since. Please refresh.")
        files = dict(repo.commits[repo.branches[branch]])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.error(400, message=f"{value['path']} was never uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = repo.add(branch, files, header["summary"])
        url = f"{self.hub.endpoint}/{name}/commit/{commit}"
        return self.json({"commitUrl": url, "commitOid": commit})

    def resolve(self, repo: Repo, revision: str, path: str) -> None:
        commit = repo.commit(revision)
        if not commit:
            return self.error(404, "RevisionNotFound")
        content = repo.commits[commit].get(path)
        if content is None:
            return self.error(404, "EntryNotFound")
        begin = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        limit = self.hub.cut_after(path) if self.command == "GET" else None
        sent = content[begin:]
        self.start(206 if begin else 200, len(sent), headers)
        if self.command == "GET":
            self.wfile.write(sent if limit is None else sent[: max(0, limit - begin)])
        if limit is not None:
            self.wfile.flush()
            raise Cut

    def entry(self, path: str, content: bytes) -> dict:
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"type": "file", "path": path, "size": len(content), "oid": git}
        if len(content) >= self.hub.large:
            name = hashlib.sha256(content).hexdigest()
            entry |= {"oid": name[:40], "lfs": {"oid": name, "size": len(content)}}
            entry["lfs"]["pointerSize"] = 130
        return entry

    def visible(self, name: str, kind: str) -> Repo | None:
        """The repo, if it is there for whoever asks; if not, that was answered."""
        repo = self.hub.repos.get(name)
        if repo is None or repo.kind != kind or (repo.private and not self.token):
            self.error(404 if self.token else 401, "RepoNotFound", "Repository not found")
            return None
        if repo.gated:
            self.error(403, "GatedRepo", "Access to this model is restricted")
            return None
        return repo

    def body(self, limit: int | None = None) -> bytes:
        """What was sent, large files counted; cut off after limit bytes."""
        content = bytearray()
        for piece in self.pieces():
            kept = piece if limit is None else piece[: limit - len(content)]
            content += kept
            if self.command == "PUT":
                self.hub.received += len(kept)
            if limit is not None and len(content) >= limit:
                raise Cut
        return bytes(content)

    def pieces(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            piece = self.rfile.read(min(left, 4096))
            left -= len(piece)
            yield piece

    def json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.start(200, len(content), {"Content-Type": "application/json"})
        if self.command != "HEAD":
            self.wfile.write(content)

    def error(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        content = json.dumps({"error": message or code or "Not found"}).encode()
        headers = {key: value for key, value in headers.items() if value}
        self.start(status, len(content), headers | {"Content-Type": "application/json"})
        if self.command != "HEAD":
            self.wfile.write(content)

    def empty(self, status: int, **headers: str) -> None:
        self.start(status, 0, headers)

    def start(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in itertools.chain(headers.items(), [("Content-Length", str(length))]):
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True  # a client may keep its connection

    def handle_error(self, request: object, address: object) -> None:
        """A client that has gone is no fault of the server; anything else is shown."""
        import sys

        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, address)


def refs(names: dict[str, str], what: str) -> list[dict]:
    return [
        {"name": name, "ref": f"refs/{what}/{name}", "targetCommit": commit}
        for name, commit in names.items()
    ]


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """The Hub, while inside."""
    hub = Hub()
    server = Server(("127.0.0.1", 0), type("Served", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def environment(endpoint: str, home: object, token: str = "") -> dict[str, str]:
    """Of a process that knows this Hub, by HF_ENDPOINT, and no other."""
    hidden = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN", "HF_HUB_OFFLINE"}
    found = {key: value for key, value in os.environ.items() if key.upper() not in hidden}
    found |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return found | ({"HF_TOKEN": token} if token else {})


def use(monkeypatch, endpoint: str, home, token: str = "") -> None:
    """The same for this process, in which huggingface-hub was imported already."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    for key, value in environment(endpoint, home, token).items():
        monkeypatch.setenv(key, value)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    if not token:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    close_session()  # it remembers proxies
