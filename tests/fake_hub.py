"""A local server that speaks enough of the Hugging Face hub's protocol, and fails when told to."""

import base64
import hashlib
import http.server
import json
import re
import threading


class FakeHub(http.server.ThreadingHTTPServer):
    """
    Serves `repositories`, {"datasets/me/texts": {path: bytes}, "me/model": {...}}, at `url`.

    `faults` lists what happens to the next downloads, one fault each: a status code (with the
    header Retry-After), "cut" (the connection ends half way) or "short" (only a third of the file
    is announced and sent). If the last item is "for ever", the first one happens to all downloads.
    `downloads` lists the paths of all files that were asked for.

    With the token "secret", a client can create repositories of models and upload to them: weights
    as LFS objects, other files inside the commit. `private` lists the names of the repositories
    that were created as private ones, and `objects` is {sha256: bytes} of the LFS objects.
    """

    sha = "0123456789abcdef0123456789abcdef01234567"  # of the only commit of each repository

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.faults, self.downloads = repositories, [], []
        self.private, self.objects = [], {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        """Print nothing when a client closes a connection that was cut."""


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one request to a FakeHub, which is `self.server`."""

    protocol_version = "HTTP/1.1"

    def reply(self, body, status=200, **headers):
        """Send an answer whose body is bytes. "_" in a header's name stands for "-"."""
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        """Send a file of a repository, or what the API says about it."""
        path = self.path.split("?")[0].strip("/")
        hub = self.server
        for name, files in hub.repositories.items():
            if match := re.fullmatch(rf"{name}/resolve/[^/]+/(.*)", path):
                return self.send_file(files.get(match.group(1)), match.group(1))
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
        """The body of the request as bytes."""
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""  # it comes in chunks, each preceded by a line with its length
        while length := int(self.rfile.readline(), 16):
            body += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_POST(self):
        """Answer the steps of an upload: create, ask where files go, commit."""
        body, path = self.read_body(), self.path.split("?")[0].strip("/")
        if path == "api/validate-yaml":  # checks the head of a README.md
            return self.send_json({"errors": [], "warnings": []})
        if not re.search(r"repos/create$|/preupload/|/objects/batch$|/commit/", path):
            return self.do_GET()
        if self.headers.get("Authorization") != "Bearer secret":
            return self.reply(b"{}", 401)
        lines = [json.loads(line) for line in body.splitlines()]
        if path == "api/repos/create":
            return self.create_repository(lines[0])
        if path.endswith("/objects/batch"):
            return self.send_json({"transfer": "basic", "objects": [
                {**item, "actions": {"upload": {"href": f"{self.server.url}/put/{item['oid']}"}}}
                for item in lines[0]["objects"]]})
        if "/preupload/" in path:
            return self.send_json({"files": [
                {"path": item["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if item["path"].endswith(".safetensors") else "regular"}
                for item in lines[0]["files"]]})
        return self.store_commit(path.split("/commit/")[0].removeprefix("api/models/"), lines)

    def create_repository(self, request):
        """Create an empty repository; status 409 if it exists."""
        name = "/".join(filter(None, (request.get("organization"), request["name"])))
        if name in self.server.repositories:
            return self.reply(json.dumps({"url": f"{self.server.url}/{name}"}).encode(), 409)
        self.server.repositories[name] = {}
        if request.get("private") or request.get("visibility") == "private":
            self.server.private.append(name)
        return self.send_json({"url": f"{self.server.url}/{name}", "name": name})

    def store_commit(self, name, lines):
        """Add the files of a commit to a repository."""
        for value in (line["value"] for line in lines if line["key"] in ("file", "lfsFile")):
            self.server.repositories[name][value["path"]] = (
                self.server.objects[value["oid"]] if "oid" in value
                else base64.b64decode(value["content"]))
        self.send_json({"commitUrl": f"{self.server.url}/{name}/commit/{self.server.sha}",
                        "commitOid": self.server.sha, "commitMessage": "", "commitDescription": ""})

    def do_PUT(self):
        """Store an LFS object."""
        self.server.objects[self.path.split("/")[-1]] = self.read_body()
        self.reply(b"")

    def send_json(self, value):
        """Send a value as JSON."""
        self.reply(json.dumps(value).encode(), Content_Type="application/json")

    def send_file(self, content, name):
        """Send a file, whose download fails if a fault is due; status 404 if `content` is None."""
        if content is None:
            return self.reply(b"", 404, X_Error_Code="EntryNotFound")
        etag = hashlib.sha1(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.server.sha}
        if self.command != "GET" or not name.endswith((".parquet", ".json", ".txt")):
            return self.reply(content, **headers)
        self.server.downloads.append(name)
        fault = self.next_fault()
        if isinstance(fault, int):
            return self.reply(b"", fault, Retry_After=1)
        if fault == "short":
            return self.reply(content[:len(content) // 3], **headers)
        return self.send_rest(content, headers, cut=fault == "cut")

    def next_fault(self):
        """What happens to this download, None if nothing does."""
        faults = self.server.faults
        if not faults:
            return None
        return faults[0] if faults[-1] == "for ever" else faults.pop(0)

    def send_rest(self, content, headers, cut):
        """Send a file from where the client asks for it; with `cut`, only half of that."""
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
        self.wfile.write(rest[:len(rest) // 2] if cut else rest)
        self.close_connection = cut

    def log_message(self, *args):
        """Print nothing."""
