"""A Hugging Face Hub in memory, as far as huggingface_hub's client needs one to push, with faults on demand.

The real client talks to it: `huggingface_hub.set_client_factory(hub.client)`.
"""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

import httpx2
import yaml

URL = "https://hub.test"
LARGE = (".safetensors", ".png", ".bin", ".pt")  # which the Hub keeps by SHA-256, the others as git does
REPOSITORY = r"/api/models/([^/]+/[^/]+)"


@dataclass
class Repo:
    """A repository: its commits, each with all its files; a commit's id is its number."""

    private: bool = False
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b"*.png lfs\n"}])

    @property
    def files(self) -> dict[str, bytes]:
        """Of the newest commit."""
        return self.commits[-1]

    @property
    def head(self) -> str:
        """The newest commit's id."""
        return f"{len(self.commits) - 1:040x}"


class Refused(Exception):  # noqa: N818 - an answer
    """A request that is answered at once."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        headers = {"X-Error-Message": message, "X-Error-Code": code}
        self.answer = httpx2.Response(status, json={"error": message}, headers=headers)


def oid(path: str, content: bytes) -> str:
    """What the Hub calls a content: its SHA-256, or git's name."""
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class MadeUpHub:
    """The Hub.

    Attributes:
        token: the one that is accepted; it may write to the repositories of `ann`.
        repos: by id.
        log: a line for each request, "METHOD path -> status".
        timeouts: what the client would have waited for an answer, in seconds.
        faults: (method, part of the path, what happens), each used once, by the first request that fits: a
            status; an exception, in place of an answer; "lost", all is done, but the answer does not
            arrive; or a function that is called before.
        corrupt: paths whose content is damaged when it is committed.
    """

    def __init__(self) -> None:
        self.token = "hf_LocalTokenThatNobodyMaySee"
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # large files that were uploaded, by SHA-256
        self.log: list[str] = []
        self.timeouts: set[float | None] = set()
        self.faults: list[tuple[str, str, Any]] = []
        self.corrupt: set[str] = set()

    def client(self) -> httpx2.Client:
        return httpx2.Client(transport=httpx2.MockTransport(self.handle), timeout=None)

    @property
    def writes(self) -> list[str]:
        """The log's lines of requests that create, upload or commit."""
        return [line for line in self.log if re.match(r"PUT|POST \S+(create|/commit/|preupload|batch)", line)]

    def overtake(self) -> None:
        """Somebody else commits to every repository."""
        for repo in self.repos.values():
            repo.commits.append(repo.files | {"pytorch_model.bin": b"another model"})

    def handle(self, request: httpx2.Request) -> httpx2.Response:
        path, body = request.url.path, request.read()
        self.timeouts.add(request.extensions["timeout"]["read"])
        what = None
        for fault in [each for each in self.faults if each[0] == request.method and each[1] in path][:1]:
            self.faults.remove(fault)
            what = fault[2]
        if isinstance(what, Exception):
            self.log.append(f"{request.method} {path} -> {what!r}")
            raise what
        if callable(what):
            what()
        try:
            sent = request.headers.get("Authorization", "")
            if isinstance(what, int):  # as bad as can be, with the caller's token in it
                raise Refused(what, f"Error {what} for {sent}")
            if sent not in ("", f"Bearer {self.token}"):
                raise Refused(401, "Invalid credentials in Authorization header")
            answer = self.answer(request.method, path, body)
        except Refused as refused:
            answer = refused.answer
        if what in (502, 503, 504):  # by a gateway, which knows no JSON
            answer = httpx2.Response(what, html="<h1>Bad gateway</h1>")
        self.log.append(f"{request.method} {path} -> {answer.status_code}")
        if what == "lost":
            raise httpx2.RemoteProtocolError("Server disconnected without sending a response.")
        return answer

    def answer(self, method: str, path: str, body: bytes) -> httpx2.Response:
        """What an undisturbed request does and gets."""
        if method == "PUT":  # as to S3: the address is the permission
            self.objects[path.removeprefix("/lfs/")] = body
            return httpx2.Response(200)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---\n")[1])  # the card's front matter
            return httpx2.Response(200, json={"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(body)["objects"])
        if found := re.fullmatch(rf"{REPOSITORY}(?:/([\w-]+)/(\w+))?", path):
            repo_id, what, revision = found.groups()
            if repo_id not in self.repos:
                raise Refused(404, "Repository not found", "RepoNotFound")
            answers = {"preupload": self.preupload, "paths-info": self.paths_info, "commit": self.commit}
            if method == "POST":
                return answers[what](self.repos[repo_id], revision, body)
            if what == "xet-write-token":  # nobody is there
                token = {"casUrl": "http://127.0.0.1:9", "exp": 2**32, "accessToken": "xet"}
                return httpx2.Response(200, json=token)
            return self.info(repo_id)
        raise Refused(404, f"Not found: {method} {path}")

    def create(self, wish: dict[str, Any]) -> httpx2.Response:
        repo_id = f"{wish.get('organization', 'ann')}/{wish['name']}"
        if not repo_id.startswith("ann/"):
            raise Refused(403, f"You don't have the rights to create {repo_id}")
        status = 409 if repo_id in self.repos else 200
        self.repos.setdefault(repo_id, Repo(wish.get("visibility") == "private"))
        return httpx2.Response(status, json={"url": f"{URL}/{repo_id}", "error": "You already created it"})

    def info(self, repo_id: str) -> httpx2.Response:
        repo = self.repos[repo_id]
        siblings = [{"rfilename": path} for path in sorted(repo.files)]
        said = {"id": repo_id, "sha": repo.head, "private": repo.private, "siblings": siblings, "tags": []}
        return httpx2.Response(200, json=said | {"downloads": 0, "likes": 0})

    def paths_info(self, repo: Repo, revision: str, body: bytes) -> httpx2.Response:
        assert revision == repo.head
        entries = []
        for path in parse_qs(body.decode())["paths"]:
            if path in repo.files:
                content = repo.files[path]
                entry = {"type": "file", "path": path, "size": len(content), "oid": oid(path, content)}
                if path.endswith(LARGE):  # of which git has a pointer
                    entry["lfs"] = {"oid": entry["oid"], "size": len(content), "pointerSize": 1}
                    entry["oid"] = "0" * 40
                entries.append(entry)
        return httpx2.Response(200, json=entries)

    def preupload(self, repo: Repo, _: str, body: bytes) -> httpx2.Response:
        answers = []
        for path in (file["path"] for file in json.loads(body)["files"]):
            mode = "lfs" if path.endswith(LARGE) else "regular"
            there = {"oid": oid(path, repo.files[path])} if path in repo.files else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **there})
        return httpx2.Response(200, json={"files": answers})

    def batch(self, wishes: list[dict[str, Any]]) -> httpx2.Response:
        objects = []
        for wish in wishes:
            upload = {"actions": {"upload": {"href": f"{URL}/lfs/{wish['oid']}", "header": {}}}}
            there = wish["oid"] in self.objects
            objects.append({"oid": wish["oid"], "size": wish["size"], **({} if there else upload)})
        return httpx2.Response(200, json={"transfer": "basic", "objects": objects})

    def commit(self, repo: Repo, _: str, body: bytes) -> httpx2.Response:
        files = dict(repo.files)
        for operation in map(json.loads, body.splitlines()):
            key, value = operation["key"], operation["value"]
            if key == "header" and value.get("parentCommit", repo.head) != repo.head:
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if key == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            if key == "deletedFile":
                del files[value["path"]]
        for path in self.corrupt & files.keys():
            files[path] += b"\n"
        repo.commits.append(files)
        made = {"commitOid": repo.head, "commitUrl": f"{URL}/a/b/commit/{repo.head}"}
        return httpx2.Response(200, json=made)
