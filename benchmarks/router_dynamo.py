"""Instant workers behind Dynamo's frontend, for `benchmarks/router.py`; its interpreter has ai-dynamo.

python benchmarks/router_dynamo.py MODEL_FOLDER NAME COUNT
"""

import asyncio
import multiprocessing
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

from dynamo.llm import ModelInput, ModelType, WorkerType, register_model
from dynamo.runtime import DistributedRuntime

BLOCK_SIZE = 16


async def generate(request: dict[str, Any], context: object = None) -> AsyncIterator[dict[str, Any]]:
    """All tokens at once, each in an item of its own."""
    for left in range(request["stop_conditions"]["max_tokens"], 0, -1):
        token: dict[str, Any] = {"token_ids": [300 + left % 200]}
        if left == 1:
            token["finish_reason"] = "length"
        yield token


async def serve(model: str, name: str) -> None:
    """One worker, until killed. Where it registers, the environment says."""
    loop = asyncio.get_running_loop()
    planes = os.environ["DYN_DISCOVERY_BACKEND"], os.environ["DYN_REQUEST_PLANE"]
    endpoint = DistributedRuntime(loop, *planes).endpoint("dynamo.backend.generate")
    await register_model(
        ModelInput.Tokens,
        ModelType.Completions,
        endpoint,
        model,
        name,
        worker_type=WorkerType.Aggregated,
        kv_cache_block_size=BLOCK_SIZE,
    )
    await endpoint.serve_endpoint(generate)


def work(model: str, name: str) -> None:
    asyncio.run(serve(model, name))


if __name__ == "__main__":
    folder, served_name, count = sys.argv[1:]
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=work, args=(folder, served_name)) for _ in range(int(count))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
