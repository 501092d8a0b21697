"""Does `baton chat` print what a cluster streams, and say plainly what went wrong?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from click.testing import CliRunner, Result

from baton.cli.chat import ChatClient, ChatFailed
from baton.cli.main import main

Serve = Callable[..., str]


def delta(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serves one canned chat answer and returns its URL; `asked` collects the messages it gets."""
    servers: list[ThreadingHTTPServer] = []

    def start(answer: bytes, status: int = 200, asked: list[object] | None = None) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send(200, b'{"data": [{"id": "tiny"}]}')

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if asked is not None:
                    asked.append(body["messages"])
                self.send(status, answer)

            def send(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Keep the test's output clean."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def chat(url: str, *arguments: str, typed: str = "") -> Result:
    return CliRunner().invoke(main, ["chat", "--url", url, *arguments], input=typed)


def test_pieces_are_joined_in_order(serve: Serve) -> None:
    done = chat(serve(b": ping\n\n" + delta("Hel") + delta("lo.") + DONE), "hi")
    assert (done.exit_code, done.output) == (0, "Hello.\n")


def test_what_the_model_writes_cannot_steer_the_terminal(serve: Serve) -> None:
    done = chat(serve(delta("a\x1b[2Jb\x07\tc\n\x9bd") + DONE), "hi")
    assert done.output == "a[2Jb\tc\nd\n"


def test_a_conversation_sends_what_was_said_before(serve: Serve) -> None:
    asked: list[object] = []
    done = chat(serve(delta("Yes.") + DONE, asked=asked), typed="One?\nTwo?\n")
    assert done.exit_code == 0, done.output
    assert asked[1] == [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Two?"},
    ]


def test_a_refusal_is_the_clusters_own_words(serve: Serve) -> None:
    url = serve(b'{"error": {"message": "messages: too long"}}', status=400)
    done = chat(url, "hi")
    assert (done.exit_code, done.output) == (1, "Error: messages: too long\n")


def test_a_refusal_does_not_end_a_conversation(serve: Serve) -> None:
    asked: list[object] = []
    url = serve(b'{"error": {"message": "overloaded"}}', status=429, asked=asked)
    done = chat(url, typed="One?\nTwo?\n")
    assert done.exit_code == 0
    assert done.output.count("Error: overloaded") == 2
    assert asked[1] == [{"role": "user", "content": "Two?"}], "an unanswered question is forgotten"


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (delta("Hel"), "broke off"),
        (delta("Hel") + b'data: {"error": {"message": "no worker left"}}\n\n', "no worker left"),
    ],
)
def test_an_answer_that_breaks_off_says_so(serve: Serve, answer: bytes, complaint: str) -> None:
    client = ChatClient(serve(answer))
    pieces = client.answer("tiny", [])
    assert next(pieces) == "Hel"
    with pytest.raises(ChatFailed, match=complaint):
        next(pieces)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://"])
def test_a_bad_url_is_a_usage_error(url: str) -> None:
    done = chat(url, "hi")
    assert done.exit_code == 2
    assert "--url" in done.output
