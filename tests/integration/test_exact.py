"""Greedy answers of a running cluster are transformers' own, token for token, for every architecture."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
import transformers

from tests.cluster import Cluster
from tests.conftest import StartCluster
from tests.unit.models.reference_models import VOCAB, variant, write_reference

ARCHITECTURES = (
    "llama",
    "llama-rope-llama3",
    "mistral-window",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "mixtral",
    "qwen3-moe",
)
NEW_TOKENS = 64
# Prompts beyond this many tokens are prefilled in chunks, shorter ones whole.
STEP_TOKENS = "128"


@dataclass(frozen=True)
class Answer:
    token_ids: list[int]
    logprobs: list[float]
    cached_tokens: int
    prefill: str


@dataclass(frozen=True)
class Served:
    """A reference model and the cluster that serves the same folder."""

    reference: transformers.PreTrainedModel
    cluster: Cluster

    def chosen(self, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
        """The reference's most likely token after the prompt and after each token of the answer but the last.

        Where that is the answer itself, it is by induction what the reference generates.
        """
        with torch.inference_mode():
            logits = self.reference(torch.tensor([[*prompt, *answer[:-1]]])).logits[0]
        tokens: list[int] = logits[len(prompt) - 1 :].argmax(-1).tolist()
        return tokens

    def ask(self, prompts: Sequence[Sequence[int]]) -> list[Answer]:
        """All prompts at once."""
        return asyncio.run(_ask(self.cluster.base_url, prompts))


async def _ask(base_url: str, prompts: Sequence[Sequence[int]]) -> list[Answer]:
    async with httpx.AsyncClient(base_url=base_url, timeout=300) as client:
        return await asyncio.gather(*(_complete(client, prompt) for prompt in prompts))


async def _complete(client: httpx.AsyncClient, prompt: Sequence[int]) -> Answer:
    body = {
        "model": "served",
        "prompt": list(prompt),
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "logprobs": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    choice, usage = answer["choices"][0], answer["usage"]
    assert choice["finish_reason"] == "length"
    assert usage["prompt_tokens"] == len(prompt)
    assert usage["completion_tokens"] == NEW_TOKENS
    return Answer(
        token_ids=choice["token_ids"],
        logprobs=choice["logprobs"]["token_logprobs"],
        cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
        prefill=response.headers["x-baton-prefill"],
    )


def serve(start_cluster: StartCluster, folder: Path, name: str, *flags: str) -> Iterator[Served]:
    reference = write_reference(variant(name), folder)
    with start_cluster(
        *("--served-model-name", "served", "--max-batch-tokens", STEP_TOKENS, "--policy", "round-robin"),
        *flags,
        model=folder,
    ) as cluster:
        yield Served(reference.eval(), cluster)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def served(
    request: pytest.FixtureRequest, start_cluster: StartCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    yield from serve(start_cluster, tmp_path_factory.mktemp(request.param), request.param)


def test_greedy_tokens_are_the_references(served: Served) -> None:
    """Batches of 1 to 16 prompts of 1 to 600 tokens; then prompts that share prefixes with those."""
    draw = random.Random(5)

    def prompt(length: int) -> list[int]:
        return [draw.randrange(VOCAB) for _ in range(length)]

    batches = [
        [prompt(1)],
        [prompt(16), prompt(17)],
        [prompt(n) for n in (1, 2, 15, 31, 33, 64, 100, 127, 128, 129, 200, 255, 257, 300, 450, 600)],
    ]
    asked = [one for batch in batches for one in batch]
    again = [*asked[-3:], asked[-1][:333] + prompt(40), asked[-2] + prompt(25), asked[-4][:160]]
    answers = [answer for batch in [*batches, again] for answer in served.ask(batch)]
    for one, answer in zip([*asked, *again], answers, strict=True):
        expected = served.chosen(one, answer.token_ids)
        assert answer.token_ids == expected, f"prompt of {len(one)} tokens, {answer}"
    fresh, repeated = answers[: len(asked)], answers[len(asked) :]
    assert all(answer.cached_tokens == 0 for answer in fresh)
    assert all(answer.cached_tokens > 0 for answer in repeated)
    assert {answer.prefill for answer in answers} == {"remote"}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_bfloat16_logprobs_are_as_close_to_exact_as_the_references(
    name: str, start_cluster: StartCluster, tmp_path: Path
) -> None:
    """bfloat16 keeps 8 bits, so two right implementations differ in every logprob. The yardstick is how
    far the reference's own bfloat16 logprobs of the same tokens lie from its float32 ones: on average
    ours may not be a quarter farther from them."""
    draw = random.Random(9)
    prompts = [[draw.randrange(VOCAB) for _ in range(n)] for n in (20, 90, 300, 500)]
    for served in serve(start_cluster, tmp_path, name, "--dtype", "bfloat16"):
        answers = served.ask(prompts)
        contexts = [torch.tensor([[*p, *a.token_ids]]) for p, a in zip(prompts, answers, strict=True)]
        exact = [_logprobs_of_output(served.reference, context) for context in contexts]
        coarse = served.reference.bfloat16()
        theirs = [_logprobs_of_output(coarse, context) for context in contexts]
        ours = [torch.tensor(answer.logprobs) for answer in answers]
        our_error, their_error = (
            (torch.cat(side) - torch.cat(exact)).abs().mean() for side in (ours, theirs)
        )
        assert our_error < 1.25 * their_error


def _logprobs_of_output(model: transformers.PreTrainedModel, context: torch.Tensor) -> torch.Tensor:
    """Of the last `NEW_TOKENS` tokens of the context, given what is before each."""
    with torch.inference_mode():
        logprobs = model(context).logits[0].float().log_softmax(-1)
    output = context[0, -NEW_TOKENS:]
    return logprobs[-NEW_TOKENS - 1 : -1].gather(1, output[:, None])[:, 0]
