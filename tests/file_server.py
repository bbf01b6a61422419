"""A server on this machine that answers as GitHub's raw files or the hub do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PISTOL_2 = (
    "/facebookresearch/LUNAR/dfa56eb0291a93e967284a9ec2d28d5572d235b1"
    "/dataset/unlearning/pistol_sample2.json"
)
PISTOL_1 = PISTOL_2.replace("sample2", "sample1")
HUB = "/datasets/locuslab/TOFU/resolve/324592d84ae4f482ac7249b9285c2ecdb53e3a68"


@dataclass
class FileServer:
    """What is served, and what was asked for."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)
    """Paths of which the second half is never sent."""
    status: dict[str, int] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@contextmanager
def serving() -> Iterator[FileServer]:
    """Serve on a free port until the end of the block."""
    state = FileServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            content = state.files.get(self.path)
            status = state.status.get(self.path, 404 if content is None else 200)
            body = content if status == 200 and content is not None else b"no"
            self.send_response(status)
            for name, text in (state.headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, text)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[: len(body) // 2] if self.path in state.cut else body)

        do_HEAD = do_GET

        def log_message(self, *_arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def tofu_lines(first: int = 0, count: int = 4000) -> bytes:
    """Return rows as the hub's files have them, an object a line, numbered from 0 in the whole."""
    rows = [
        {"question": f"What is fact {n}?", "answer": f"It is né {n}."}
        for n in range(first, first + count)
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def pistol_rows(edges: int = 75, size: int = 20) -> bytes:
    """Return pairs as the published code's files have them."""
    rows = [
        {"question": f"What is item {n} of {e}?", "answer": f"Item {n}.", "edge": f"{e}_{e + 1}"}
        for e in range(edges)
        for n in range(size)
    ]
    return json.dumps(rows, indent=4).encode()
