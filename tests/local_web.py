"""A small web on this machine, and a stand-in for the hub on it, for what needs a network."""

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Answer:
    """What the server says at one path; `then`, when given, from the second time on."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    late: bool = False  # it comes when the test is over
    then: "Answer | None" = None


def hub_file(body: bytes, commit: str, sha256: str | None = None) -> Answer:
    """A file as the hub answers for it."""
    sha256 = sha256 or hashlib.sha256(body).hexdigest()
    return Answer(body=body, headers={"X-Repo-Commit": commit, "ETag": f'"{sha256}"'})


class Handler(BaseHTTPRequestHandler):
    """Answers from `server.answers`, by path, and notes in `server.asked` who asked for what."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        server = self.server
        server.asked.append((self.command, self.path, self.headers["User-Agent"]))
        missing = Answer(404, headers={"X-Error-Code": "EntryNotFound"})
        said = server.answers.get(self.path, missing)
        if said.then is not None:
            server.answers[self.path] = said.then
        if said.late:
            server.over.wait()
        with contextlib.suppress(ConnectionError):  # who asked may have lost patience
            self.send_response(said.status)
            for name, value in {"Content-Length": str(len(said.body)), **said.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(said.body)
                self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def web(answers: dict[str, Answer]) -> Iterator[ThreadingHTTPServer]:
    """Serve the answers; `server.address` is where."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answers, server.asked, server.over = answers, [], threading.Event()
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
