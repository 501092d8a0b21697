"""Tools as the official client has them called, by a real model on real workers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from openai import AsyncOpenAI, BadRequestError, OpenAI, pydantic_function_tool
from pydantic import BaseModel, Field

from tests.cluster import Cluster
from tests.conftest import StartCluster
from tests.tool_models import model_with_tools

MESSAGES: Any = [{"role": "user", "content": "What is the weather like in Bern?"}]


class Place(BaseModel):
    city: str = Field(max_length=12)
    country: Literal["CH", "DE"]


class Weather(BaseModel):
    """Today's weather."""

    place: Place
    days: list[int] = Field(min_length=1, max_length=3)


class Clock(BaseModel):
    """What time it is."""

    zone: Literal["UTC", "CET"]


TOOLS: Any = [pydantic_function_tool(Weather), pydantic_function_tool(Clock)]
CLOCK: Any = {"type": "function", "function": {"name": "Clock"}}
KINDS: dict[str, type[BaseModel]] = {"Weather": Weather, "Clock": Clock}
# Long enough that a worker can be killed in the middle of it.
NUMBERS = {"type": "array", "minItems": 60, "maxItems": 60, "items": {"enum": [123456, 654321, 777777]}}
LONG: Any = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"numbers": NUMBERS},
                "required": ["numbers"],
                "additionalProperties": False,
            },
        },
    }
]


@pytest.fixture(scope="module", params=["hermes", "mistral"])
def up(
    request: pytest.FixtureRequest, start_cluster: StartCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    model = model_with_tools(tmp_path_factory.mktemp("models") / "model", request.param)
    flags = ("--decode", "2", "--policy", "round-robin")
    with start_cluster(*flags, model=model) as cluster:
        assert f"calls of tools are read as: {request.param}, by the model" in cluster.logs()["router"]
        yield cluster


@pytest.fixture(scope="module")
def client(up: Cluster) -> OpenAI:
    return OpenAI(base_url=f"{up.base_url}/v1", api_key="unused", max_retries=0)


@pytest.mark.parametrize("seed", range(4))
def test_required_calls_fit_their_functions(client: OpenAI, seed: int) -> None:
    asked: Any = {"model": "model", "messages": MESSAGES, "tools": TOOLS, "tool_choice": "required"}
    answer = client.chat.completions.parse(**asked, seed=seed, temperature=1.5, parallel_tool_calls=False)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert isinstance(call.function.parsed_arguments, KINDS[call.function.name])
    with client.chat.completions.stream(
        **asked, seed=seed, temperature=1.5, parallel_tool_calls=False
    ) as stream:
        again = stream.get_final_completion().choices[0]
    assert again.finish_reason == "tool_calls"
    assert again.message.tool_calls[0].function == call.function


def test_a_named_function_is_called(client: OpenAI) -> None:
    for seed in range(2):
        answer = client.chat.completions.create(
            model="model", messages=MESSAGES, tools=TOOLS, tool_choice=CLOCK, n=2, seed=seed, logprobs=True
        )
        for choice in answer.choices:
            (call,) = choice.message.tool_calls
            assert call.function.name == "Clock"
            Clock.model_validate_json(call.function.arguments)
            assert choice.finish_reason == "stop"  # as OpenAI's for a named function
        logged = sum(len(choice.logprobs.content) for choice in answer.choices)
        assert logged == answer.usage.completion_tokens


def test_the_model_may_choose_and_the_result_goes_back_to_it(client: OpenAI) -> None:
    messages = list(MESSAGES)
    free = client.chat.completions.create(model="model", messages=messages, tools=TOOLS, max_tokens=20)
    assert free.choices[0].finish_reason in ("length", "stop", "tool_calls")
    called = client.chat.completions.create(
        model="model", messages=messages, tools=TOOLS, tool_choice=CLOCK
    ).choices[0]
    messages.append(called.message)
    (call,) = called.message.tool_calls
    messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps({"time": "12:00"})})
    for choice in ("auto", "none"):
        answer = client.chat.completions.create(
            model="model", messages=messages, tools=TOOLS, tool_choice=choice, max_tokens=8, temperature=0
        )
        assert answer.choices[0].message.content


def test_a_schema_that_cannot_be_kept_to_is_named(client: OpenAI) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    tools: Any = [*TOOLS, {"type": "function", "function": {"name": "odd", "parameters": parameters}}]
    with pytest.raises(BadRequestError, match="uniqueItems") as refused:
        client.chat.completions.create(model="model", messages=MESSAGES, tools=tools, tool_choice="required")
    assert refused.value.param == "tools[2].function.parameters"


def test_a_worker_that_dies_changes_no_call(up: Cluster) -> None:
    choices: list[Any] = ["required", {"type": "function", "function": {"name": "add"}}]

    async def ask(client: AsyncOpenAI, choice: Any, begun: asyncio.Event) -> str:
        """The arguments of one call, as they are streamed."""
        arguments = ""
        stream = await client.chat.completions.create(
            model="model",
            messages=MESSAGES,
            tools=LONG,
            tool_choice=choice,
            parallel_tool_calls=False,
            stream=True,
            seed=5,
            temperature=1.5,
        )
        async for chunk in stream:
            for call in chunk.choices[0].delta.tool_calls or []:
                arguments += call.function.arguments
                if len(arguments) > 40:
                    begun.set()
        return arguments

    async def ask_all(victim: str | None) -> list[str]:
        async with AsyncOpenAI(base_url=f"{up.base_url}/v1", api_key="unused", max_retries=0) as client:
            begun = [asyncio.Event() for _ in range(4)]
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(ask(client, choices[at % 2], event)) for at, event in enumerate(begun)
                ]
                async with asyncio.timeout(60):
                    for event in begun:
                        await event.wait()
                if victim is not None:
                    assert not any(task.done() for task in tasks)
                    os.kill(up.pids()[victim], signal.SIGKILL)
            return [task.result() for task in tasks]

    undisturbed = asyncio.run(ask_all(None))
    assert asyncio.run(ask_all("decode-0")) == undisturbed
    for arguments in undisturbed:
        assert len(json.loads(arguments)["numbers"]) == 60


def test_a_template_without_tools_leaves_demanded_calls_alone(cluster: Cluster) -> None:
    with OpenAI(base_url=f"{cluster.base_url}/v1", api_key="unused", max_retries=0) as client:
        asked: Any = {"model": "baton-small", "messages": MESSAGES, "tools": TOOLS}
        with pytest.raises(BadRequestError, match="template") as refused:
            client.chat.completions.create(**asked)
        assert refused.value.param == "tools"
        answer = client.chat.completions.create(**asked, tool_choice=CLOCK)
        Clock.model_validate_json(answer.choices[0].message.tool_calls[0].function.arguments)
        assert client.chat.completions.create(**asked, tool_choice="none", max_tokens=4).choices
