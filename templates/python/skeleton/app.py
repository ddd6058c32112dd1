"""A small HTTP server that needs nothing but the standard library."""

import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def reply(path: str) -> tuple[int, dict[str, str]]:
    """Return the status and the body for a path."""
    if path == "/":
        return 200, {"message": "Hello from Python"}
    return 404, {"error": "Not found"}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, body = reply(self.path.partition("?")[0])
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def main() -> None:
    port = int(os.environ.get("PORT", "3000"))
    print(f"Listening on http://localhost:{port}/", flush=True)
    ThreadingHTTPServer(("", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
