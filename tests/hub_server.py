"""A Hub on 127.0.0.1: repositories, branches, commits, large files (git LFS) and downloads, over HTTP, in memory.

`python -m tests.hub_server` prints its address and serves until it is ended. What clients did can be read at GET
/control/log; POST /control/fail {"route": ..., "statuses": [...]} makes the next requests of a route fail.
"""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_thisIsTheTestToken0123456789"
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
LARGE = 100_000  # bytes from which on a file goes by LFS, as on the Hub by content


class Store:
    def __init__(self):
        self.repos: dict[str, dict] = {}
        self.blobs: dict[tuple[str, str], bytes] = {}  # by repository and sha256
        self.log: list[dict] = []
        self.failing: dict[str, list[int]] = {}  # by route: the statuses of its next answers


def revision_id(files: dict[str, bytes]) -> str:
    return hashlib.sha1(
        json.dumps({p: hashlib.sha256(b).hexdigest() for p, b in sorted(files.items())}).encode()
    ).hexdigest()


def oid(content: bytes) -> str:
    """git's id of a regular file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store = Store()

    ROUTES = [
        ("GET", r"/control/log", "control_log"),
        ("POST", r"/control/fail", "control_fail"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", rf"/api/models/{REPO}/preupload/(?P<rev>[^/]+)", "preupload"),
        ("POST", rf"/api/models/{REPO}/commit/(?P<rev>[^/]+)", "commit"),
        ("POST", rf"/api/models/{REPO}/branch/(?P<rev>[^/]+)", "branch"),
        ("GET", rf"/api/(models|datasets)/{REPO}(/revision/(?P<rev>[^/]+))?", "info"),
        ("GET", rf"/api/models/{REPO}/tree/(?P<rev>[^/]+).*", "tree"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
        ("PUT", rf"/lfs/{REPO}/(?P<sha>\w+)", "put"),
        ("GET", rf"/{REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
    ]

    def handle_one(self):
        path = unquote(urlsplit(self.path).path)
        method = "GET" if self.command == "HEAD" else self.command
        self.body = self.read_body()
        for wanted, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and wanted == method:
                if not name.startswith("control"):
                    self.store.log.append(
                        {"route": name, "path": path, "bytes": len(self.body), "signed_in": self.signed_in}
                    )
                if statuses := self.store.failing.get(name):
                    return self.answer(
                        {"error": f"made to fail for {TOKEN} at http://x/y?X-Amz-Signature=secret"}, statuses.pop(0)
                    )
                return getattr(self, name)(**{key: value for key, value in match.groupdict().items()})
        return self.answer({"error": f"no such route: {method} {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    @property
    def signed_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, document, status: int = 200, headers: dict = {}):
        content = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, code: str):
        return self.answer(
            {"error": code}, 401 if code == "RepoNotFound" and not self.signed_in else 404, {"X-Error-Code": code}
        )

    def files(self, repo: str, rev: str | None = "main"):
        """(files of a revision, None), or (None, an error code)."""
        found = self.store.repos.get(repo)
        if found is None or found["private"] and not self.signed_in:
            return None, "RepoNotFound"
        branches = {**found["branches"], **{revision_id(files): files for files in found["history"]}}
        return (branches[rev or "main"], None) if (rev or "main") in branches else (None, "RevisionNotFound")

    def log_message(self, *arguments):
        pass

    def control_log(self):
        self.answer(self.store.log)

    def control_fail(self):
        asked = json.loads(self.body)
        self.store.failing[asked["route"]] = asked["statuses"]
        self.answer({})

    def create(self):
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        address = f"http://{self.headers['Host']}/{name}"
        if not self.signed_in:
            return self.answer({"error": "Invalid username or password."}, 401)
        if name in self.store.repos:
            return self.answer({"error": "You already created this model repo", "url": address}, 409)
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.store.repos[name] = {"private": private, "branches": {"main": {}}, "history": [{}]}
        self.answer({"url": address, "id": name, "name": name})

    def validate(self):
        self.answer({"errors": [], "warnings": []})

    def branch(self, repo, rev):
        branches = self.store.repos[repo]["branches"]
        if rev in branches:
            return self.answer({"error": "Reference already exists"}, 409)
        branches[rev] = dict(branches["main"])
        self.answer({})

    def preupload(self, repo, rev):
        files, error = self.files(repo, rev)
        if error:
            return self.missing(error)
        if not self.signed_in:
            return self.answer({"error": "no rights"}, 403)
        known = lambda path: hashlib.sha256(files[path]).hexdigest() if len(files[path]) >= LARGE else oid(files[path])  # noqa: E731
        self.answer(
            {
                "files": [
                    {
                        "path": f["path"],
                        "uploadMode": "lfs" if f["size"] >= LARGE else "regular",
                        "shouldIgnore": False,
                        "oid": known(f["path"]) if f["path"] in files else None,
                    }
                    for f in json.loads(self.body)["files"]
                ]
            }
        )

    def batch(self, repo):
        asked = json.loads(self.body)["objects"]
        address = f"http://{self.headers['Host']}/lfs/{repo}/"
        self.answer(
            {
                "transfer": "basic",
                "objects": [
                    {
                        "oid": o["oid"],
                        "size": o["size"],
                        **(
                            {}
                            if (repo, o["oid"]) in self.store.blobs
                            else {"actions": {"upload": {"href": f"{address}{o['oid']}?X-Amz-Signature=secret"}}}
                        ),
                    }
                    for o in asked
                ],
            }
        )

    def put(self, repo, sha):
        if hashlib.sha256(self.body).hexdigest() != sha:
            return self.answer({"error": "content does not match"}, 400)
        self.store.blobs[repo, sha] = self.body
        self.answer({})

    def commit(self, repo, rev):
        files, error = self.files(repo, rev)
        if error:
            return self.missing(error)
        files = dict(files)
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.store.blobs[repo, value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        self.store.repos[repo]["branches"][rev] = files
        self.store.repos[repo]["history"].append(files)
        made = revision_id(files)
        self.answer(
            {"commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{made}", "commitOid": made, "hookOutput": ""}
        )

    def info(self, repo, rev):
        files, error = self.files(repo, rev)
        if error:
            return self.missing(error)
        self.answer(
            {
                "id": repo,
                "modelId": repo,
                "sha": revision_id(files),
                "private": self.store.repos[repo]["private"],
                "tags": [],
                "siblings": [
                    {"rfilename": path, "size": len(content), "blobId": oid(content)} for path, content in files.items()
                ],
            }
        )

    def tree(self, repo, rev):
        files, error = self.files(repo, rev)
        if error:
            return self.missing(error)
        self.answer(
            [
                {"type": "file", "path": path, "size": len(content), "oid": oid(content)}
                for path, content in files.items()
            ]
        )

    def resolve(self, repo, rev, path):
        files, error = self.files(repo, rev)
        if error or path not in files:
            return self.missing(error or "EntryNotFound")
        content, made = files[path], revision_id(files)
        self.answer(content, 200, {"ETag": f'"{oid(content)}"', "X-Repo-Commit": made, "Accept-Ranges": "bytes"})


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
