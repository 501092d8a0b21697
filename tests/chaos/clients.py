"""Clients that ask over HTTP and gRPC, check every answer, and say how each request ended."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx

from baton.rpc.v1 import inference_pb2, inference_pb2_grpc
from tests.chaos.questions import Question
from tests.chaos.story import Story

_PATIENCE_S = 120.0
_AGAIN_S = 0.5
_CHANNEL_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))

_OF_STOPPING = "shutting down"
_OF_BLAME = "it is not tried again"
_OF_CONNECTIONS = re.compile(
    "[Ss]ocket closed|[Cc]onnection reset|failed to connect|GOAWAY|Broken pipe|recvmsg|ping timeout|"
    f"Stream removed|{_OF_STOPPING}|^CANCELLED|Endpoint closing|End of TCP stream|Cancelling all calls"
)


class _Refused(Exception):
    """429: the request should come again."""


class _Broken(Exception):
    """The connection ended before the answer did."""


class _Blamed(Exception):
    """Two workers in a row died with the request on them: the router takes it for the cause."""


class _Failed(Exception):
    """The router answered an error."""


def _failed(said: str) -> Exception:
    return _Blamed(said) if _OF_BLAME in said else _Failed(said)


@dataclass
class Choice:
    """What has come of one choice so far."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    ending: tuple[Any, Any] | None = None  # finish_reason, stop_reason

    def begins(self, whole: Choice) -> bool:
        """Whether this is a beginning of `whole`."""
        tokens, logprobs = len(self.token_ids), len(self.logprobs)
        return (
            whole.text.startswith(self.text)
            and whole.token_ids[:tokens] == self.token_ids
            and whole.logprobs[:logprobs] == self.logprobs
        )


@dataclass
class Answer:
    """An answer, whole or as far as it came; `usage` is prompt and completion tokens."""

    choices: dict[int, Choice] = field(default_factory=dict)
    usage: tuple[int, int] | None = None

    def choice(self, index: int) -> Choice:
        return self.choices.setdefault(index, Choice())

    @property
    def tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices.values())

    def begins(self, whole: Answer) -> bool:
        return all(choice.begins(whole.choice(index)) for index, choice in self.choices.items())


@dataclass
class Tally:
    """How requests ended. `lost` and `wrong` hold a sentence each; `ways` counts how KV came to be."""

    answered: int = 0
    tokens: int = 0
    refused: int = 0
    ended_by_router: int = 0
    blamed: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    ways: Counter[str] = field(default_factory=Counter)
    slowest: Story | None = None


class Client:
    """One client: asks one question after the other, on connections of its own."""

    def __init__(self, base_url: str, grpc_address: str, tally: Tally) -> None:
        self._http = httpx.AsyncClient(base_url=base_url, timeout=_PATIENCE_S)
        self._grpc_address = grpc_address
        self._channel: grpc.aio.Channel | None = None
        self._tally = tally
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Client:
        await self._stack.enter_async_context(self._http)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._hang_up()
        await self._stack.aclose()

    async def ask(self, question: Question) -> Answer:
        """The answer of an undisturbed cluster, which may be busy.

        Raises:
            Exception: there is none.
        """
        while True:
            answer = Answer()
            try:
                await self._ask(question, answer, Story(""))
            except _Refused:
                await asyncio.sleep(_AGAIN_S)
            else:
                return answer

    async def check(
        self, question: Question, expected: Answer, router_failed: Callable[[float], bool]
    ) -> None:
        """Ask until there is an answer, and note how it compares with the expected one.

        `router_failed` says whether a router has failed since a time (`time.monotonic`): the streams of one
        that dies end, and clients ask again.
        """
        tally, story = self._tally, Story(f"question {question.number} ({question.interface})")
        try:
            async with asyncio.timeout(_PATIENCE_S):
                while not await self._checked(question, expected, router_failed, story):
                    pass
        except TimeoutError:
            story.say("given up")
            tally.lost.append(str(story))
            await self._hang_up()
        except _Failed as failure:
            story.say(str(failure))
            tally.lost.append(str(story))
        if tally.slowest is None or story.seconds > tally.slowest.seconds:
            tally.slowest = story

    async def _checked(
        self, question: Question, expected: Answer, router_failed: Callable[[float], bool], story: Story
    ) -> bool:
        tally, answer, began = self._tally, Answer(), time.monotonic()
        try:
            await self._ask(question, answer, story)
        except _Refused:
            story.say("refused")
            tally.refused += 1
            await asyncio.sleep(_AGAIN_S)
            return False
        except _Broken as broken:
            story.say(f"broken off ({broken})")
            await self._hang_up()
            self._compare(question, answer.begins(expected), answer, expected)
            if not router_failed(began):
                raise _Failed(f"the connection broke and no router had failed: {broken}") from broken
            tally.ended_by_router += 1
            await asyncio.sleep(0.1)
            return False
        except _Blamed:
            story.say("blamed")
            tally.blamed += 1
            return False
        story.say("answered")
        tally.answered += 1
        self._compare(question, answer == expected, answer, expected)
        return True

    def _compare(self, question: Question, same: bool, answer: Answer, expected: Answer) -> None:
        self._tally.tokens += answer.tokens
        if not same:
            self._tally.wrong.append(f"{question}:\n  got      {answer}\n  expected {expected}")

    async def _ask(self, question: Question, answer: Answer, story: Story) -> None:
        try:
            if question.interface == "grpc":
                await self._ask_grpc(question, answer, story)
            else:
                await self._ask_http(question, answer, story)
        except httpx.TransportError as error:
            raise _Broken(f"{type(error).__name__}: {error}") from error
        except grpc.aio.AioRpcError as error:
            said = f"{error.code().name}: {error.details()}"
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise _Refused(said) from error
            # What the router says of workers comes with the same code as what gRPC says of connections.
            ended = _Broken(said) if _OF_CONNECTIONS.search(said) else _failed(said)
            raise ended from error

    async def _ask_http(self, question: Question, answer: Answer, story: Story) -> None:
        path = "/v1/chat/completions" if question.interface == "chat" else "/v1/completions"
        named = {"x-request-id": story.request_id}
        async with self._http.stream("POST", path, json=question.body, headers=named) as response:
            if response.status_code != 200:
                said = f"{response.status_code}: {(await response.aread()).decode()}"
                if response.status_code == 429:
                    raise _Refused(said)
                raise _Broken(said) if _OF_STOPPING in said else _failed(said)
            self._tally.ways[response.headers["x-baton-prefill"]] += 1
            if not question.stream:
                _add(json.loads(await response.aread()), answer)
                return
            done = False
            async for event in _events(response):
                story.heard()
                if event == "[DONE]":
                    done = True
                    continue
                content = json.loads(event)
                if "error" in content:
                    said = str(content["error"])
                    raise _Broken(said) if _OF_STOPPING in said else _failed(said)
                _add(content, answer)
            if not done:
                raise _Broken("the stream ended before [DONE]")

    async def _ask_grpc(self, question: Question, answer: Answer, story: Story) -> None:
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._grpc_address, options=_CHANNEL_OPTIONS)
        stub = inference_pb2_grpc.InferenceStub(self._channel)
        sampling = {
            name: value for name, value in question.body.items() if name not in ("prompt", "cache_salt")
        }
        bias = {int(token): value for token, value in sampling.pop("logit_bias", {}).items()}
        request = inference_pb2.GenerateRequest(
            request_id=story.request_id,
            token_ids=inference_pb2.TokenIds(ids=question.body["prompt"]),
            sampling=inference_pb2.SamplingParams(**sampling, logit_bias=bias),
            cache_salt=question.body.get("cache_salt", ""),
        )
        async for piece in stub.Generate(request, timeout=_PATIENCE_S):
            story.heard()
            if piece.HasField("usage"):
                answer.usage = (piece.usage.prompt_tokens, piece.usage.completion_tokens)
                continue
            choice = answer.choice(piece.index)
            choice.text += piece.text
            choice.token_ids += piece.token_ids
            choice.logprobs += [
                one.SerializeToString(deterministic=True) for one in (*piece.prompt_logprobs, *piece.logprobs)
            ]
            if piece.finish_reason:
                choice.ending = (piece.finish_reason, piece.stop_reason)

    async def _hang_up(self) -> None:
        if self._channel is not None:
            await self._channel.close(None)
            self._channel = None


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


def _add(content: Mapping[str, Any], answer: Answer) -> None:
    """Take in a whole answer or one event of a stream."""
    if usage := content.get("usage"):
        answer.usage = (usage["prompt_tokens"], usage["completion_tokens"])
    for part in content["choices"]:
        choice = answer.choice(part["index"])
        said = part.get("message") or part.get("delta") or part
        choice.text += said.get("content") or said.get("text") or ""
        choice.token_ids += part.get("token_ids") or ()
        choice.logprobs += _positions(part.get("logprobs"))
        if part.get("finish_reason"):
            choice.ending = (part["finish_reason"], part.get("stop_reason"))


def _positions(logprobs: Mapping[str, Any] | None) -> Sequence[Any]:
    """One entry per token of chats' and completions' log-probabilities."""
    if not logprobs:
        return ()
    if "content" in logprobs:
        return list(logprobs["content"] or ())
    columns = (logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"] or [])
    if not columns[2]:
        columns = columns[:2]
    return list(zip(*columns, strict=True))
