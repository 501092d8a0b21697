"""Requests that one worker hands over to another, as a router would place them, and what both then hold."""

from __future__ import annotations

import random

import grpc

from baton.rpc.v1 import inference_pb2, worker_pb2, worker_pb2_grpc
from tests.waiting import until

TOKENS = 12
CHUNK = 64
"""Tokens of a prompt that workers are to compute at once (`--max-batch-tokens`)."""


class Asked:
    """What a worker answered one request with; `error` is the kind of it, 0 for none."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.error = 0
        self.finished = False
        self.lost = False


def prompt_of(number: int) -> list[int]:
    """Five chunks, the last of them not whole."""
    draw = random.Random(number)
    return [draw.randrange(100, 4000) for _ in range(5 * CHUNK - 3)]


def start_of(prompt: list[int], source: str = "", incarnation: str = "") -> worker_pb2.Start:
    """A request whose prompt the worker at `source` computes; nobody else without one."""
    return worker_pb2.Start(
        key=1,
        request_id="handed over",
        prompt_token_ids=prompt,
        sampling=worker_pb2.Sampling(
            max_tokens=TOKENS, temperature=0.8, seed=3, top_p=1, repetition_penalty=1, ignore_eos=True
        ),
        prefill_address=source,
        prefill_incarnation=incarnation,
    )


async def ask(address: str, start: worker_pb2.Start) -> Asked:
    """Send a request to the worker at `address` and take what comes."""
    asked = Asked()
    async with grpc.aio.insecure_channel(address) as channel:
        call = worker_pb2_grpc.DecodeStub(channel).Session(timeout=60)
        await call.write(worker_pb2.SessionRequest(hello=worker_pb2.Hello(router_id="test"), starts=[start]))
        try:
            async for step in call:
                for output in step.outputs:
                    asked.tokens += output.token_ids
                    asked.error = output.error.kind
                    asked.finished = output.finish_reason != inference_pb2.FINISH_REASON_UNSPECIFIED
                    if asked.finished or asked.error:
                        return asked
        except grpc.aio.AioRpcError:
            asked.lost = True
    return asked


async def undisturbed(address: str, prompt: list[int]) -> list[int]:
    """The right tokens, from KV that the worker computes itself and that nobody else ever sees."""
    start = start_of(prompt)
    start.cache_salt = "undisturbed"
    asked = await ask(address, start)
    assert asked.finished
    return asked.tokens


def status_at(address: str) -> worker_pb2.StatusResponse:
    """What the worker there says of itself now."""
    with grpc.insecure_channel(address) as channel:
        admin = worker_pb2_grpc.WorkerAdminStub(channel)
        status: worker_pb2.StatusResponse = admin.Status(worker_pb2.StatusRequest(), timeout=10)
    return status


def held(address: str) -> tuple[int, ...]:
    """Pinned blocks, used blocks, handoffs served and handoffs read."""
    status = status_at(address)
    used = status.load.total_blocks - status.load.free_blocks
    return (status.pinned_blocks, used, status.handoffs_serving, status.handoffs_reading)


async def at_rest(*addresses: str) -> None:
    """Wait until the workers hold nothing for anybody."""
    await until(
        lambda: not any(any(held(address)) for address in addresses), f"{addresses} hold nothing any more"
    )


async def answers_rightly(decode: str, prefill: str, prompt: list[int], expected: list[int]) -> int:
    """The request handed over by both workers as they are now; the bytes of KV that were read."""
    before = status_at(decode).kv_transfer_bytes
    asked = await ask(decode, start_of(prompt, prefill, status_at(prefill).incarnation))
    assert asked.finished
    assert asked.tokens == expected
    await at_rest(decode, prefill)
    return status_at(decode).kv_transfer_bytes - before


async def compute_for_nobody(address: str, prompt: list[int]) -> None:
    """Have the worker compute a prompt for a reader that reads nothing of it, and keep it cached."""
    begin = worker_pb2.Begin(
        request_id="for nobody",
        incarnation=status_at(address).incarnation,
        prompt_token_ids=prompt,
        sampling=worker_pb2.Sampling(max_tokens=2, top_p=1, repetition_penalty=1, ignore_eos=True),
    )
    async with grpc.aio.insecure_channel(address) as channel:
        call = worker_pb2_grpc.KvStub(channel).Handoff(timeout=60)
        await call.write(worker_pb2.HandoffRequest(begin=begin))
        async for response in call:
            if response.blocks_ready.last:
                await call.write(worker_pb2.HandoffRequest(done=worker_pb2.Done()))
