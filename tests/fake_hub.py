"""A local server that speaks enough of the hub's protocol, and misbehaves when told to."""

import base64
import hashlib
import http.server
import json
import re
import threading


class FakeHub(http.server.ThreadingHTTPServer):
    """
    Serves repositories {"datasets/me/texts": {path: bytes}, "me/model": {...}} at `url`.

    `faults` is a list of what happens to the next downloads: a status code (429 with Retry-After),
    "cut" (the connection ends half way) or "short" (the length is announced too small). A fault
    that is the last of the list and marked "for ever" stays.

    Who brings the token "secret" may create repositories of models (those in `private` were asked
    to be) and upload to them: weights as LFS objects, other files inside the commit.
    """

    sha = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.faults, self.downloads = repositories, [], []
        self.private, self.objects = [], {}  # names, {sha256: bytes}
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # clients hang up on a cut connection


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def reply(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0].strip("/")
        hub = self.server
        for name, files in hub.repositories.items():
            if match := re.fullmatch(rf"{name}/resolve/[^/]+/(.*)", path):
                return self.send_file(name, files.get(match.group(1)), match.group(1))
            api = f"api/{name}" if name.startswith("datasets/") else f"api/models/{name}"
            entries = [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40}
                       for p, c in files.items()]
            if path.startswith(f"{api}/paths-info/"):
                return self.send_json(entries)
            if path.startswith(f"{api}/tree/"):
                inside = path.split("/tree/")[1].partition("/")[2]
                return self.send_json([e for e in entries if e["path"].startswith(inside)])
            if path.startswith(api):
                return self.send_json({
                    "id": name.removeprefix("datasets/"), "sha": hub.sha, "private": False,
                    "tags": [], "downloads": 0, "siblings": [{"rfilename": p} for p in files]})
        return self.reply(b"{}", 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def read_body(self):
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""  # in chunks, each after its length
        while length := int(self.rfile.readline(), 16):
            body += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_POST(self):
        body, path = self.read_body(), self.path.split("?")[0].strip("/")
        if path == "api/validate-yaml":  # the head of a README.md
            return self.send_json({"errors": [], "warnings": []})
        if not re.search(r"repos/create$|/preupload/|/objects/batch$|/commit/", path):
            return self.do_GET()
        if self.headers.get("Authorization") != "Bearer secret":
            return self.reply(b"{}", 401)
        lines = [json.loads(line) for line in body.splitlines()]
        if path == "api/repos/create":
            return self.create(lines[0])
        if path.endswith("/objects/batch"):
            return self.send_json({"transfer": "basic", "objects": [
                {**o, "actions": {"upload": {"href": f"{self.server.url}/put/{o['oid']}"}}}
                for o in lines[0]["objects"]]})
        if "/preupload/" in path:
            return self.send_json({"files": [
                {"path": f["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in lines[0]["files"]]})
        return self.commit(path.split("/commit/")[0].removeprefix("api/models/"), lines)

    def create(self, wish):
        name = "/".join(filter(None, (wish.get("organization"), wish["name"])))
        if name in self.server.repositories:
            return self.reply(json.dumps({"url": f"{self.server.url}/{name}"}).encode(), 409)
        self.server.repositories[name] = {}
        if wish.get("private") or wish.get("visibility") == "private":
            self.server.private.append(name)
        return self.send_json({"url": f"{self.server.url}/{name}", "name": name})

    def commit(self, name, lines):
        for value in (line["value"] for line in lines if line["key"] in ("file", "lfsFile")):
            self.server.repositories[name][value["path"]] = (
                self.server.objects[value["oid"]] if "oid" in value
                else base64.b64decode(value["content"]))
        self.send_json({"commitUrl": f"{self.server.url}/{name}/commit/{self.server.sha}",
                        "commitOid": self.server.sha, "commitMessage": "", "commitDescription": ""})

    def do_PUT(self):
        self.server.objects[self.path.split("/")[-1]] = self.read_body()
        self.reply(b"")

    def send_json(self, value):
        self.reply(json.dumps(value).encode(), Content_Type="application/json")

    def send_file(self, repository, content, name):
        if content is None:
            return self.reply(b"", 404, X_Error_Code="EntryNotFound")
        etag = hashlib.sha1(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.server.sha}
        faults = self.server.faults
        if self.command != "GET" or not name.endswith((".parquet", ".json", ".txt")):
            return self.reply(content, **headers)
        self.server.downloads.append(name)
        fault = None
        if faults:
            fault = faults[0] if faults[-1] == "for ever" else faults.pop(0)
        if isinstance(fault, int):
            return self.reply(b"", fault, Retry_After=1)
        if fault == "short":
            return self.reply(content[:len(content) // 3], **headers)
        first = 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            first = int(match.group(1))
        self.send_response(206 if first else 200)
        for key, value in {**headers, "Content-Length": len(content) - first}.items():
            self.send_header(key, str(value))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        rest = content[first:]
        self.wfile.write(rest[:len(rest) // 2] if fault == "cut" else rest)
        self.close_connection = fault == "cut"
        return None

    def log_message(self, *args):
        pass
