"""A Hugging Face Hub on localhost, as far as huggingface_hub's client needs one, with faults on demand.

`python tests/hub_server.py` serves one until Ctrl-C and prints what to set.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

GIT_ATTRIBUTES = (
    b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.png filter=lfs diff=lfs merge=lfs -text\n"
)
LFS_ENDINGS = (".safetensors", ".png", ".bin", ".pt")
LFS_SIZE = 10_000_000
READ, WRITE = "read", "write"


@dataclass
class Repo:
    """A repository: its commits, each with all its files, and their ids."""

    private: bool = False
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": GIT_ATTRIBUTES}])

    @property
    def files(self) -> dict[str, bytes]:
        """Of the newest commit."""
        return self.commits[-1]


@dataclass
class Answer:
    """What a request gets."""

    status: int = 200
    content: Any = None  # bytes as they are, everything else as JSON
    headers: dict[str, str] = field(default_factory=dict)


class Refused(Exception):  # noqa: N818 - an answer
    """A request that is answered at once."""

    def __init__(self, status: int, message: str, code: str = "", **more: Any) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer(status, {"error": message} | more, headers)


def is_lfs(path: str, content: bytes | int) -> bool:
    """Whether the Hub keeps a file (or one of that size) as a large one."""
    size = content if isinstance(content, int) else len(content)
    return size > 0 and (path.endswith(LFS_ENDINGS) or size > LFS_SIZE)


def blob_id(content: bytes) -> str:
    """Git's."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class LocalHub:
    """The server; `with LocalHub() as hub` runs it.

    Attributes:
        url: its address, for HF_ENDPOINT.
        token: the one that is accepted; it may write to the repositories of `user`.
        repos: by id.
        log: a line for each request, "METHOD path -> status".
        faults: (method, part of the path, what happens), each used once, by the first request that fits: a
            status; "reset", the connection is dropped amid the request; "cut", amid the answer; "lost", all
            is done, but instead of an answer the connection is dropped; "slow", the answer takes two seconds;
            "overtaken", somebody else commits a pytorch_model.bin to every repository just before.
        corrupt: paths whose content is damaged when it is committed.
        cas: where it sends Xet clients with large files.
    """

    def __init__(self) -> None:
        self.user, self.token = "ann", "hf_LocalTokenThatNobodyMaySee"
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """As new, at the same address."""
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # large files that were uploaded, by SHA-256
        self.log: list[str] = []
        self.faults: list[tuple[str, str, int | str]] = []
        self.corrupt: set[str] = set()
        self.cas = "http://127.0.0.1:9"  # nobody is there

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def writes(self) -> list[str]:
        """The log's lines of requests that create, upload or commit."""
        return [line for line in self.log if re.match(r"PUT|POST \S+(create|/commit/|preupload|batch)", line)]

    def commit_id(self, repo_id: str, number: int) -> str:
        return hashlib.sha1(
            f"{repo_id} {number} {sorted(self.repos[repo_id].commits[number])}".encode()
        ).hexdigest()

    def find_fault(self, method: str, path: str) -> int | str | None:
        """Takes the first fault that fits a request."""
        for fault in self.faults:
            if fault[0] == method and fault[1] in path:
                self.faults.remove(fault)
                return fault[2]
        return None

    def _handler(hub) -> type[BaseHTTPRequestHandler]:  # noqa: N805 - `self` is the handler below
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else each answer waits 40 ms for its second half

            def log_message(self, *_: object) -> None:
                """`hub.log` it is."""

            def handle_any(self) -> None:
                path = unquote(self.path)
                fault = hub.find_fault(self.command, path)
                length = int(self.headers.get("Content-Length") or 0)
                if fault == "reset":
                    self.rfile.read(length // 2)
                    self.drop(path, "reset amid the request")
                    return
                body = self.rfile.read(length) if length else b""
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = self.read_chunks()
                if fault == "slow":
                    time.sleep(2)
                with hub.lock:
                    for repo in hub.repos.values() if fault == "overtaken" else ():
                        repo.commits.append(repo.files | {"pytorch_model.bin": b"another model"})
                    try:
                        answer = fault_answer(fault, self.headers) or hub.answer(
                            self.command, path, self.headers, body
                        )
                    except Refused as refused:
                        answer = refused.answer
                if fault == "lost":
                    self.drop(path, f"{answer.status}, and the answer lost")
                else:
                    self.send(path, answer, cut=fault == "cut")

            do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815 - http.server's names

            def read_chunks(self) -> bytes:
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def send(self, path: str, answer: Answer, cut: bool) -> None:
                content = answer.content
                if not isinstance(content, bytes):
                    content = json.dumps({} if content is None else content).encode()
                hub.log.append(f"{self.command} {path} -> {answer.status}{', cut' if cut else ''}")
                self.send_response(answer.status)
                for name, value in {
                    "Content-Type": "application/json",
                    "Content-Length": str(len(content)),
                    **answer.headers,
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                if cut:
                    self.wfile.write(content[: len(content) // 2])
                    self.drop(path, "")
                elif self.command != "HEAD":
                    self.wfile.write(content)

            def drop(self, path: str, what: str) -> None:
                """Closes the connection with a reset, not in order."""
                if what:
                    hub.log.append(f"{self.command} {path} -> {what}")
                self.wfile.flush()
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.shutdown(socket.SHUT_RD)
                self.close_connection = True

        return Handler

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> Answer:
        """What an undisturbed request does and gets."""
        query = {key: values[-1] for key, values in parse_qs(urlsplit(path).query).items()}
        path = urlsplit(path).path
        if method == "PUT" and path.startswith("/lfs/"):  # as to S3: the address is the permission
            return self._upload(path.removeprefix("/lfs/"), body)
        sent = headers.get("Authorization", "")
        if sent and sent != f"Bearer {self.token}":
            raise Refused(401, "Invalid credentials in Authorization header", got=sent)
        known, repo, lfs = bool(sent), r"/api/models/([^/]+/[^/]+?)", r"/([^/]+/[^/]+)\.git/info/lfs"
        routes: list[tuple[str, str, str, Callable[..., Answer]]] = [
            ("GET", r"/api/whoami-v2", "", lambda: self._whoami(known)),
            ("POST", r"/api/validate-yaml", "", lambda: _validate(json.loads(body))),
            ("POST", r"/api/repos/create", "", lambda: self._create(known, json.loads(body))),
            ("GET", rf"{repo}(?:/revision/([^/]+))?", READ, self._info),
            ("GET", rf"{repo}/tree/([^/]+)(?:/(.+))?", READ, lambda *at: self._tree(*at, query)),
            ("POST", rf"{repo}/paths-info/([^/]+)", READ, lambda *at: self._paths_info(*at, body)),
            ("POST", rf"{repo}/preupload/([^/]+)", WRITE, lambda *at: self._preupload(*at, body)),
            ("GET", rf"{repo}/xet-write-token/[^/]+", WRITE, lambda _: self._xet_token()),
            ("POST", rf"{lfs}/objects/batch", WRITE, lambda _: self._batch(json.loads(body)["objects"])),
            ("POST", rf"{lfs}/verify", WRITE, lambda _: self._verify(json.loads(body))),
            ("POST", rf"{repo}/commit/([^/]+)", WRITE, lambda *at: self._commit(*at, body.splitlines())),
            ("(?:GET|HEAD)", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", READ, self._resolve),
        ]
        for verb, pattern, right, act in routes:
            found = re.fullmatch(pattern, path)
            if found and re.fullmatch(verb, method):
                if right:
                    self._check_right(right, known, found[1])
                return act(*found.groups())
        raise Refused(404, f"Not found: {method} {path}")

    def _check_right(self, right: str, known: bool, repo_id: str) -> None:
        repo = self.repos.get(repo_id)
        mine = known and repo_id.split("/")[0] == self.user
        if repo is None or (repo.private and not mine):
            # The real one does not tell strangers what there is.
            raise Refused(404 if known else 401, "Repository not found", "RepoNotFound")
        if right == WRITE and not mine:
            raise Refused(403, f"You don't have write access to {repo_id}")

    def _whoami(self, known: bool) -> Answer:
        if not known:
            raise Refused(401, "Invalid username or password.")
        return Answer(
            content={"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}}
        )

    def _create(self, known: bool, wish: dict[str, Any]) -> Answer:
        if not known:
            raise Refused(401, "Invalid username or password.")
        owner = wish.get("organization") or self.user
        repo_id = f"{owner}/{wish['name']}"
        if owner != self.user:
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        url = f"{self.url}/{repo_id}"
        if repo_id in self.repos:
            raise Refused(409, "You already created this model repo", url=url)
        self.repos[repo_id] = Repo(wish.get("visibility") == "private")
        return Answer(content={"url": url, "name": repo_id})

    def _find(self, repo_id: str, revision: str | None) -> tuple[str, dict[str, bytes]]:
        """The commit's id and its files."""
        commits = self.repos[repo_id].commits
        ids = [self.commit_id(repo_id, number) for number in range(len(commits))]
        if revision in (None, "main", "HEAD"):
            return ids[-1], commits[-1]
        if revision not in ids:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return revision, commits[ids.index(revision)]

    def _info(self, repo_id: str, revision: str | None = None) -> Answer:
        commit, files = self._find(repo_id, revision)
        said = {"id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0], "sha": commit, "tags": []}
        said |= {"private": self.repos[repo_id].private, "gated": False, "disabled": False}
        said |= {"downloads": 0, "likes": 0, "siblings": [{"rfilename": path} for path in sorted(files)]}
        return Answer(content=said)

    def _tree(self, repo_id: str, revision: str, folder: str | None, query: dict[str, str]) -> Answer:
        _, files = self._find(repo_id, revision)
        start = f"{folder}/" if folder else ""
        inside = {path.removeprefix(start): path for path in sorted(files) if path.startswith(start)}
        if folder and not inside:
            raise Refused(404, f'"{folder}" does not exist', "EntryNotFound")
        deep = query.get("recursive", "").lower() in ("true", "1")
        folders = sorted({start + rest.split("/")[0] for rest in inside if "/" in rest})
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in folders]
        entries += [_entry(path, files[path]) for rest, path in inside.items() if deep or "/" not in rest]
        return Answer(content=entries)

    def _paths_info(self, repo_id: str, revision: str, body: bytes) -> Answer:
        _, files = self._find(repo_id, revision)
        wanted = parse_qs(body.decode())["paths"]
        return Answer(content=[_entry(path, files[path]) for path in wanted if path in files])

    def _preupload(self, repo_id: str, revision: str, body: bytes) -> Answer:
        there = self._find(repo_id, revision)[1]
        answers = []
        for file in json.loads(body)["files"]:
            path, mode = file["path"], "lfs" if is_lfs(file["path"], file["size"]) else "regular"
            answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            if path in there:
                content = there[path]
                answer["oid"] = sha256(content) if is_lfs(path, content) else blob_id(content)
            answers.append(answer)
        return Answer(content={"files": answers})

    def _xet_token(self) -> Answer:
        until = int(time.time()) + 3600
        return Answer(content={"casUrl": self.cas, "exp": until, "accessToken": "of-xet"})

    def _batch(self, wishes: list[dict[str, Any]]) -> Answer:
        objects = []
        for wish in wishes:
            item = {"oid": wish["oid"], "size": wish["size"]}
            if wish["oid"] not in self.objects:
                item["actions"] = {"upload": {"href": f"{self.url}/lfs/{wish['oid']}", "header": {}}}
            objects.append(item)
        return Answer(content={"transfer": "basic", "objects": objects})

    def _upload(self, oid: str, body: bytes) -> Answer:
        if sha256(body) != oid:
            raise Refused(400, "The content does not have the SHA-256 that was said")
        self.objects[oid] = body
        return Answer(content=b"")

    def _verify(self, wish: dict[str, Any]) -> Answer:
        if wish["oid"] not in self.objects:
            raise Refused(404, "Object not found")
        return Answer()

    def _commit(self, repo_id: str, revision: str, lines: list[bytes]) -> Answer:
        commit, files = self._find(repo_id, revision)
        files = dict(files)
        for line in lines:
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                if value.get("parentCommit", commit) != commit:
                    raise Refused(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Refused(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = self.objects[value["oid"]]
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise Refused(400, f"unknown operation {key}")
        for path in self.corrupt & files.keys():
            files[path] += b"\n"
        repo = self.repos[repo_id]
        repo.commits.append(files)
        oid = self.commit_id(repo_id, len(repo.commits) - 1)
        url = f"{self.url}/{repo_id}/commit/{oid}"
        return Answer(content={"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def _resolve(self, repo_id: str, revision: str, path: str) -> Answer:
        commit, files = self._find(repo_id, revision)
        if path not in files:
            refused = Refused(404, "Entry not found", "EntryNotFound")
            refused.answer.headers["X-Repo-Commit"] = commit
            raise refused
        content = files[path]
        etag = sha256(content) if is_lfs(path, content) else blob_id(content)
        headers = {
            "Content-Type": "application/octet-stream",
            "X-Repo-Commit": commit,
            "ETag": f'"{etag}"',
            "X-Linked-ETag": f'"{etag}"',
            "X-Linked-Size": str(len(content)),
            "Last-Modified": formatdate(usegmt=True),
            "Accept-Ranges": "none",
        }
        return Answer(content=content, headers=headers)


def fault_answer(fault: int | str | None, headers: Any) -> Answer | None:
    """The answer of a fault that is a status: as bad as can be, with the caller's token in it."""
    if not isinstance(fault, int):
        return None
    if fault in (502, 503, 504):  # by a gateway, which knows no JSON
        return Answer(fault, b"<html><h1>Bad gateway</h1></html>", {"Content-Type": "text/html"})
    message = f"Error {fault} for {headers.get('Authorization')}"
    more = {"ratelimit": '"api";r=0;t=7'} if fault == 429 else {}
    return Answer(fault, {"error": message}, {"X-Error-Message": message} | more)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
    if is_lfs(path, content):
        pointer = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(content)}\nsize {len(content)}\n"
        )
        entry["oid"] = blob_id(pointer.encode())
        entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": len(pointer)}
    return entry


def _validate(wish: dict[str, Any]) -> Answer:
    """The card's front matter."""
    found = re.match(r"---\n(.*?)\n---\n", wish["content"], re.DOTALL)
    if not found:
        return Answer(content={"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
    try:
        yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        raise Refused(400, "Invalid metadata", errors=[{"message": str(error)}], warnings=[]) from None
    return Answer(content={"errors": [], "warnings": []})


if __name__ == "__main__":
    with LocalHub() as local:
        print(f"export HF_ENDPOINT={local.url} HF_TOKEN={local.token} HF_HUB_DISABLE_XET=1 HF_HUB_OFFLINE=0")
        shown = 0
        with suppress(KeyboardInterrupt):
            while True:
                time.sleep(0.2)
                for line in local.log[shown:]:
                    print(line, flush=True)
                    shown += 1
