"""`baton chat`: talk to a running cluster in the terminal."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import click

from baton.cli.options import settings_options
from baton.config import BadSetting, Settings
from baton.errors import BatonError

_CONNECT_TIMEOUT_S = 5.0
_READ_TIMEOUT_S = 600.0

# What a model writes must not steer the terminal: only newline and tab of the control characters stay.
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}

Message = dict[str, str]


class ChatFailed(BatonError):
    """The cluster cannot be reached or refused; the message is for the person who types."""


@click.command(short_help="Talk to the model of a running cluster.")
@click.argument("prompt", required=False)
@settings_options("client")
@click.option("--api-key", envvar="OPENAI_API_KEY", default="", help="[env OPENAI_API_KEY]")
def chat(settings: Settings, prompt: str | None, api_key: str) -> None:
    """Ask PROMPT and print the answer as it is written; without PROMPT, hold a conversation.

    Ctrl-C stops an answer, Ctrl-D ends the conversation.
    """
    client = ChatClient(settings.client.url, api_key)
    model = client.model()
    if prompt is not None:
        _print_answer(client.answer(model, [{"role": "user", "content": prompt}]))
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (importing it gives input() line editing and history)
    click.echo(f"{model} at {settings.client.url}. Ctrl-C stops an answer, Ctrl-D quits.")
    _converse(client, model)


def _converse(client: ChatClient, model: str) -> None:
    messages: list[Message] = []
    while True:
        try:
            prompt = input("\n> ").strip()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            continue
        if not prompt:
            continue
        messages.append({"role": "user", "content": prompt})
        try:
            answer = _print_answer(client.answer(model, messages))
        except ChatFailed as error:
            click.echo(f"Error: {error.message}", err=True)
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": answer})


def _print_answer(pieces: Generator[str, None, None]) -> str:
    """Print the pieces as they come; returns them joined, up to where Ctrl-C stopped them."""
    answer: list[str] = []
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(pieces):
        for piece in pieces:
            answer.append(piece)
            click.echo(piece.translate(_CONTROL), nl=False)
    click.echo()
    return "".join(answer)


@dataclass(frozen=True)
class ChatClient:
    """The two HTTP calls a chat needs, on the standard library so that the base install has it."""

    url: str
    api_key: str = ""

    def model(self) -> str:
        """Name of the model the cluster serves.

        Raises:
            ChatFailed: nobody answers at the URL, or it is not a baton router.
        """
        with self._request("GET", "/v1/models") as response:
            try:
                return str(json.loads(response.read())["data"][0]["id"])
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise ChatFailed(f"{self.url} answers, but not as a baton router; check --url") from error

    def answer(self, model: str, messages: list[Message]) -> Generator[str, None, None]:
        """Pieces of the answer to the last message. Closing the generator cancels the request.

        Raises:
            ChatFailed: the cluster refused the request or ended it with an error.
        """
        body = {"model": model, "messages": messages, "stream": True}
        with self._request("POST", "/v1/chat/completions", body) as response:
            try:
                for line in response:
                    if line.startswith(b"data: [DONE]"):
                        return
                    if line.startswith(b"data: "):
                        yield _piece(json.loads(line.removeprefix(b"data: ")))
            except (OSError, http.client.HTTPException) as error:
                raise ChatFailed(f"the answer broke off: {error}") from error
        raise ChatFailed("the answer broke off: the router closed the connection")

    @contextlib.contextmanager
    def _request(
        self, method: str, path: str, body: object | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        connection = self._connection()
        try:
            connection.connect()
            connection.sock.settimeout(_READ_TIMEOUT_S)
            headers = {"Content-Type": "application/json"}
            if self.api_key:
                headers["Authorization"] = f"Bearer {self.api_key}"
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise ChatFailed(
                f"no cluster answers at {self.url} ({error}); start one with `baton up`, or give --url"
            ) from error
        with contextlib.closing(connection):
            if response.status != 200:
                raise ChatFailed(_refusal(response))
            yield response

    def _connection(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadSetting(f"--url {self.url}: must look like http://127.0.0.1:8000", field="url")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.hostname, parts.port, timeout=_CONNECT_TIMEOUT_S)


def _piece(event: dict[str, Any]) -> str:
    """The new text in one streamed event."""
    if "error" in event:
        raise ChatFailed(str(event["error"]["message"]))
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])


def _refusal(response: http.client.HTTPResponse) -> str:
    text = response.read().decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the cluster answered {response.status} {response.reason}"
