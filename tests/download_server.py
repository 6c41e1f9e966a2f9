"""A file server on the loopback that can be told to misbehave."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """What a server serves, and what it was asked.

    Attributes:
        files: path -> content.
        redirects: path -> where it leads.
        cut: the bodies of the next answers end after so many bytes, one an answer.
        amid: is called once in the middle of a body.
        answers: codes of the next answers, in place of the file.
        etag, modified: of the files; "" for none.
        ranges: whether parts are served.
        honest: whether If-Range is obeyed.
        length: whether the size is said.
        kind: the Content-Type.
        coding: the Content-Encoding; "" for none.
        asked: (path, Range, bytes sent) of each request.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    cut: list[int] = field(default_factory=list)
    amid: Callable[[], object] | None = None
    answers: list[int] = field(default_factory=list)
    etag: str = '"1"'
    modified: str = ""
    ranges: bool = True
    honest: bool = True
    length: bool = True
    kind: str = "application/octet-stream"
    coding: str = ""
    asked: list[tuple[str, str, int]] = field(default_factory=list)
    address: str = ""
    closing: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def serving() -> Iterator[Site]:
    """A site that is served while the block runs."""
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"site": site}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    site.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        site.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    site: Site

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        site, path = self.site, self.path.partition("?")[0]
        asked = self.headers.get("Range", "")
        if site.answers:
            self.answer(site.answers.pop(0), {"Content-Length": "0"}, asked, b"")
        elif path in site.redirects:
            self.answer(302, {"Location": site.redirects[path], "Content-Length": "0"}, asked, b"")
        elif path not in site.files:
            self.answer(404, {"Content-Length": "0"}, asked, b"")
        else:
            self.file(site.files[path], asked)

    def file(self, content: bytes, asked: str) -> None:
        site, size = self.site, len(content)
        headers = {"Content-Type": site.kind}
        headers |= {"Content-Encoding": site.coding} if site.coding else {}
        headers |= {"ETag": site.etag} if site.etag else {}
        headers |= {"Last-Modified": site.modified} if site.modified else {}
        same = self.headers.get("If-Range") in (site.etag, site.modified) or not site.honest
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and site.ranges and same else 0
        if start >= size > 0:
            self.answer(416, {"Content-Length": "0"}, asked, b"")
            return
        if start:
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        if site.length:
            headers["Content-Length"] = str(size - start)
        end = start + site.cut.pop(0) if site.cut else size
        self.answer(206 if start else 200, headers, asked, content[start:end])

    def answer(self, code: int, headers: dict[str, str], asked: str, body: bytes) -> None:
        self.site.asked.append((self.path, asked, len(body)))
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        half = len(body) // 2
        self.wfile.write(body[:half])
        if self.site.amid and body:
            amid, self.site.amid = self.site.amid, None
            amid()
        with contextlib.suppress(OSError):
            self.wfile.write(body[half:])
