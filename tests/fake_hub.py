"""A local server that speaks enough of the hub's protocol, and misbehaves when told to."""

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
    """

    sha = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.faults, self.downloads = repositories, [], []
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

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

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
