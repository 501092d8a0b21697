"""Answers that call tools, as the official client reads them, from a model that writes what a test says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError
from openai.lib.streaming.chat import ChunkEvent

from baton.text import Tokenizer
from tests.tool_models import model_with_tools
from tests.unit.router.fakes import FakeWorker, RunningRouter, running_router, running_worker

CITY = '{"city": "Zürich \\"🦊\\""}'
WRITTEN = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>',
    "llama3_json": '<|python_tag|>{"name": "weather", "parameters": %s}',
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": %s}]',
}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
NAMED: Any = {"type": "function", "function": {"name": "weather"}}
ASKED: Any = {"model": "model", "messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS}


class Asking:
    """A client of a router whose model writes calls in one format."""

    def __init__(self, client: AsyncOpenAI, worker: FakeWorker, tokenizer: Tokenizer) -> None:
        self.completions = client.chat.completions
        self.chat = client.chat
        self.worker = worker
        self._tokenizer = tokenizer

    def says(self, text: str) -> int:
        """What the worker answers from now on; how many tokens that is without the one that ends it."""
        self.worker.script = self._tokenizer.encode(text, add_special_tokens=False)
        return len(self.worker.script)

    def prompt(self) -> str:
        """What the worker was asked last."""
        return self._tokenizer.decode(self.worker.starts[-1].prompt_token_ids, skip_special_tokens=False)


@asynccontextmanager
async def asking(folder: Path, calls: str, **settings: object) -> AsyncIterator[Asking]:
    model = model_with_tools(folder / "model", calls)
    tokenizer = Tokenizer.load(model)
    assert tokenizer is not None
    worker = FakeWorker("decode-0", [])
    async with (
        running_worker(worker),
        running_router(worker, model=model, **settings) as router,
        openai(router) as client,
    ):
        yield Asking(client, worker, tokenizer)


def openai(router: RunningRouter) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{router.base_url}/v1", api_key="unused", max_retries=0)


async def streamed(asked: Asking, **fields: Any) -> Any:
    """The completion that the client makes of a stream, and the chunks it came in."""
    chunks = []
    async with asked.chat.completions.stream(**{**ASKED, **fields}) as stream:
        async for event in stream:
            if isinstance(event, ChunkEvent):
                chunks.append(event.chunk)
        return await stream.get_final_completion(), chunks


@pytest.mark.parametrize("calls", WRITTEN)
async def test_a_call_whole_and_streamed(tmp_path: Path, calls: str) -> None:
    async with asking(tmp_path, calls) as asked:
        tokens = asked.says(WRITTEN[calls] % CITY)
        whole = await asked.completions.create(**ASKED)
        parts, chunks = await streamed(asked, stream_options={"include_usage": True})
        for answer in (whole, parts):
            choice = answer.choices[0]
            assert choice.finish_reason == "tool_calls"
            assert not choice.message.content
            (call,) = choice.message.tool_calls
            assert (call.type, call.function.name, call.function.arguments) == ("function", "weather", CITY)
            assert len(call.id) == 9 if calls == "mistral" else call.id.startswith("call_")
            assert answer.usage.completion_tokens == tokens + 1
        assert whole.choices[0].message.content is None
        said = [
            call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or []
        ]
        assert (said[0].function.name, said[0].function.arguments, said[0].index) == ("weather", "", 0)
        assert len(said) > 3, "arguments come as they are written"
        assert all((call.id, call.type, call.function.name) == (None, None, None) for call in said[1:])


async def test_content_calls_and_log_probabilities(tmp_path: Path) -> None:
    async with asking(tmp_path, "hermes") as asked:
        one = WRITTEN["hermes"] % CITY
        tokens = asked.says(f"Let me look.\n\n{one}\n{one}\n")
        logged = {"logprobs": True, "n": 2, "extra_body": {"return_token_ids": True}}
        whole = await asked.completions.create(**ASKED, **logged)
        parts, chunks = await streamed(asked, **logged)
        for answer in (whole, parts):
            assert [choice.index for choice in answer.choices] == [0, 1]
            for choice in answer.choices:
                assert choice.message.content == "Let me look."
                assert [call.function.arguments for call in choice.message.tool_calls] == [CITY, CITY]
                assert len(choice.logprobs.content) == tokens + 1
        assert len({call.id for choice in whole.choices for call in choice.message.tool_calls}) == 4
        second = [choice for chunk in chunks for choice in chunk.choices if choice.index == 1]
        ids = [token_id for choice in second for token_id in getattr(choice, "token_ids", [])]
        assert ids == whole.choices[1].token_ids and len(ids) == tokens + 1


async def test_one_call_where_no_more_are_wanted(tmp_path: Path) -> None:
    async with asking(tmp_path, "hermes") as asked:
        asked.says(2 * (WRITTEN["hermes"] % CITY))
        whole = await asked.completions.create(**ASKED, parallel_tool_calls=False)
        parts, _ = await streamed(asked, parallel_tool_calls=False)
        for answer in (whole, parts):
            assert [call.function.arguments for call in answer.choices[0].message.tool_calls] == [CITY]


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("I do not know.\n", "I do not know.\n"),
        ('<tool_call>{"name": weather}</tool_call>', '<tool_call>{"name": weather}</tool_call>'),
        ("<tool_call>\nweather(Bern)\n</tool_call>", "<tool_call>\nweather(Bern)\n</tool_call>"),
    ],
)
async def test_what_is_no_call_is_content(tmp_path: Path, text: str, content: str) -> None:
    async with asking(tmp_path, "hermes") as asked:
        asked.says(text)
        parts, _ = await streamed(asked)
        for answer in (await asked.completions.create(**ASKED), parts):
            assert answer.choices[0].message.content == content
            assert not answer.choices[0].message.tool_calls
            assert answer.choices[0].finish_reason == "stop"


async def test_an_answer_that_is_cut_off(tmp_path: Path) -> None:
    async with asking(tmp_path, "hermes") as asked:
        tokens = asked.says(WRITTEN["hermes"] % '{"city": "Bern", "why": "a long story')
        parts, _ = await streamed_or_cut(asked, max_tokens=tokens - 8)
        whole = await asked.completions.create(**ASKED, max_tokens=tokens - 8)
        (call,) = whole.choices[0].message.tool_calls
        assert whole.choices[0].finish_reason == "length"
        assert call.function.arguments.startswith('{"city": "Bern"')
        assert parts == call.function.arguments


async def streamed_or_cut(asked: Asking, **fields: Any) -> tuple[str, str]:
    """The arguments and the finish reason of a stream that the client's own reader refuses for being cut."""
    arguments = reason = ""
    async for chunk in await asked.completions.create(**ASKED, **fields, stream=True):
        for choice in chunk.choices:
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or []:
                arguments += call.function.arguments
    return arguments, reason


async def test_no_calls_are_read_where_none_are_wanted(tmp_path: Path) -> None:
    async with asking(tmp_path, "hermes") as asked:
        asked.says(WRITTEN["hermes"] % CITY)
        answer = await asked.completions.create(**ASKED, tool_choice="none")
        # The marks are special tokens, and those are skipped.
        assert answer.choices[0].message.content == f'\n{{"name": "weather", "arguments": {CITY}}}\n'
        assert answer.choices[0].finish_reason == "stop"
        assert asked.worker.starts[-1].sampling.grammar == ""
        assert '"weather"' in asked.prompt(), "the model is told of them all the same"


@pytest.mark.parametrize(("choice", "reason"), [("required", "tool_calls"), (NAMED, "stop")])
@pytest.mark.parametrize("calls", WRITTEN)
async def test_a_call_that_is_demanded_is_demanded_in_the_models_own_format(
    tmp_path: Path, calls: str, choice: Any, reason: str
) -> None:
    async with asking(tmp_path, calls) as asked:
        asked.says(WRITTEN[calls] % CITY)
        answer = await asked.completions.create(**ASKED, tool_choice=choice)
        assert answer.choices[0].finish_reason == reason
        assert answer.choices[0].message.tool_calls[0].function.arguments == CITY
        grammar = asked.worker.starts[-1].sampling.grammar
        assert ("<[3]>" in grammar) == (calls != "llama3_json"), "marks are matched as the tokens they are"


async def test_a_call_or_else_the_json_that_is_asked_for(tmp_path: Path) -> None:
    wanted: Any = {"type": "json_object"}
    async with asking(tmp_path / "hermes", "hermes") as asked:
        asked.says('{"a": 1}')
        answer = await asked.completions.create(**ASKED, response_format=wanted)
        assert answer.choices[0].message.content == '{"a": 1}'
        assert answer.choices[0].finish_reason == "stop"
        assert "calls | answer" in asked.worker.starts[-1].sampling.grammar
        asked.says(WRITTEN["hermes"] % CITY)
        answer = await asked.completions.create(**ASKED, response_format=wanted)
        assert answer.choices[0].finish_reason == "tool_calls"
        # Two lines of a grammar are no schema.
        bad: Any = {"structured_outputs": {"json": 'true\nmore: "a"'}}
        with pytest.raises(BadRequestError) as refused:
            await asked.completions.create(**ASKED, extra_body=bad)
        assert refused.value.param == "structured_outputs.json"
        with pytest.raises(BadRequestError) as refused:
            await asked.completions.create(**ASKED, extra_body={"guided_regex": "a"})
        assert refused.value.param == "guided_regex"
    async with asking(tmp_path / "llama", "llama3_json") as asked:
        with pytest.raises(BadRequestError, match="rule out") as refused:
            await asked.completions.create(**ASKED, response_format=wanted)
        assert refused.value.param == "response_format"


async def test_without_a_format_the_choice_cannot_be_left_to_the_model(tmp_path: Path) -> None:
    async with asking(tmp_path, "hermes", tool_call_parser="none") as asked:
        with pytest.raises(BadRequestError, match="--tool-call-parser") as refused:
            await asked.completions.create(**ASKED)
        assert refused.value.param == "tools"
        asked.says('{"name": "weather", "parameters": {"city": "Bern"}}')
        answer = await asked.completions.create(**ASKED, tool_choice="required")
        assert answer.choices[0].message.tool_calls[0].function.arguments == '{"city": "Bern"}'


async def test_tools_count_as_tokens_of_the_prompt(tmp_path: Path) -> None:
    model = model_with_tools(tmp_path / "model", "hermes")
    worker = FakeWorker("decode-0", [])
    async with running_worker(worker), running_router(worker, model=model) as router:
        async with httpx.AsyncClient(base_url=router.base_url, timeout=60) as http:
            chat = {key: ASKED[key] for key in ("messages", "tools")}
            counted = (await http.post("/tokenize", json=chat)).json()["tokens"]
            answer = await http.post("/v1/chat/completions", json={**chat, "max_tokens": 1})
            assert answer.json()["usage"]["prompt_tokens"] == len(counted)
        assert list(worker.starts[-1].prompt_token_ids) == counted
