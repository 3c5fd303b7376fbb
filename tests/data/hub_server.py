"""A server that speaks as much of the Hugging Face hub's protocol as loading a data set needs. Prints its port."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "a" * 40
CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train.jsonl\n---\n"
ROWS = [{"prompt": f"p{n}", "chosen": "c", "rejected": "r"} for n in range(3)]
FILES = {
    "org/pairs": {
        "README.md": CARD.encode(),
        "data/train.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    },
    "org/script": {"README.md": b"", "script.py": b"raise SystemExit('remote code was run')"},
}


class Handler(BaseHTTPRequestHandler):
    """Answers for the data sets above."""

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """As GET, without the content."""
        self.do_GET()

    def do_POST(self) -> None:
        """The paths that were asked for: all of them."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def do_GET(self) -> None:
        """A set's facts, its tree, or one of its files."""
        path = self.path.split("?")[0]
        for name, files in FILES.items():
            entries = [
                {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for file, content in files.items()
            ]
            if path.startswith(f"/api/datasets/{name}/tree/") or path.startswith(f"/api/datasets/{name}/paths-info/"):
                below = path.partition(COMMIT)[2].strip("/")
                return self.send([entry for entry in entries if str(entry["path"]).startswith(below)])
            if path.startswith(f"/api/datasets/{name}"):
                facts = {"id": name, "sha": COMMIT, "private": False, "disabled": False, "gated": False, "tags": []}
                return self.send({**facts, "downloads": 0, "likes": 0, "siblings": [{"rfilename": f} for f in files]})
            for file, content in files.items():
                if path in (f"/datasets/{name}/resolve/{at}/{file}" for at in (COMMIT, "main")):
                    digest = hashlib.sha1(content).hexdigest()
                    return self.send(content, {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"'})
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound" if path.startswith("/datasets/org/") else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def send(self, content: object, headers: dict[str, str] | None = None) -> None:
        """Answer with JSON, or with bytes."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
