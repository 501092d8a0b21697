"""Reading a prefix that another worker holds, so that this one need not compute it.

It is a handoff without a prefill: the other worker pins its blocks, this one reads them, and only after
Released may they be used. Whatever goes wrong is a miss: the blocks are computed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AsyncExitStack

import grpc

from baton import tracing
from baton.engine.reservations import Pinned
from baton.engine.sequence import Sequence as Choice
from baton.engine.sequence import longest_reusable
from baton.errors import HandoffFailed
from baton.rpc.v1 import worker_pb2
from baton.worker.metrics import PULLS
from baton.worker.peers import HandoffCall, Peer, Peers
from baton.worker.state import WorkerState

log = logging.getLogger(__name__)


class _Missed(Exception):
    """The pull brought nothing; the message is its outcome."""


class Puller:
    """Pulls prefixes from peers into this worker's pool, each within `timeout_s` seconds."""

    def __init__(self, state: WorkerState, peers: Peers, timeout_s: float) -> None:
        self._state = state
        self._peers = peers
        self._timeout_s = timeout_s

    async def pull(self, choice: Choice, pull: worker_pb2.Pull) -> None:
        """Bring what `pull` promises of the choice's prompt into the prefix tree, as far as it can be had.

        Never fails: a miss is counted by its outcome, and logged when something broke. Cancelling is
        safe at any point.
        """
        blocks = min(pull.blocks, longest_reusable(choice.tokens, choice.block_size))
        if choice.wants_prompt_logprobs or not blocks:
            return
        outcome = "cancelled"
        began_s = time.monotonic()
        self._state.handoffs_reading += 1
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._pull(choice, pull, blocks)
            outcome = "pulled"
        except _Missed as miss:
            outcome = str(miss)
        except TimeoutError:
            outcome = "timeout"
            log.warning(
                "request %s: %s did not give its prefix within %g s (--pull-timeout-s); computing it",
                choice.request_id,
                pull.address,
                self._timeout_s,
            )
        except HandoffFailed as error:
            outcome = "failed"
            log.warning("request %s: no prefix from %s: %s", choice.request_id, pull.address, error.message)
        except grpc.aio.AioRpcError as error:
            outcome = "not_found" if error.code() is grpc.StatusCode.NOT_FOUND else "failed"
            log.log(
                logging.INFO if outcome == "not_found" else logging.WARNING,
                "request %s: no prefix from %s: %s: %s",
                choice.request_id,
                pull.address,
                error.code().name,
                error.details(),
            )
        finally:
            self._state.handoffs_reading -= 1
            PULLS.labels(outcome).inc()
            if choice.traceparent:
                facts = {"worker": self._state.worker_id, "from": pull.address, "outcome": outcome}
                tracing.record(choice.traceparent, "pull", began_s, time.monotonic(), facts)

    async def _pull(self, choice: Choice, pull: worker_pb2.Pull, blocks: int) -> None:
        engine, chain = self._state.engine, choice.chain(blocks)
        async with AsyncExitStack() as stack:
            pinning = engine.pin_all(chain)
            stack.callback(pinning.add_done_callback, lambda done: engine.unpin(done.result()))
            pinned = await asyncio.wrap_future(pinning)
            if pinned.held == blocks:
                raise _Missed("held")
            peer = await self._peers.get(pull.address, pull.incarnation)
            call = stack.enter_context(peer.handoff())
            begin = worker_pb2.Begin(
                request_id=choice.request_id,
                incarnation=pull.incarnation,
                prompt_token_ids=choice.tokens[: blocks * choice.block_size],
                cache_salt=choice.cache_salt,
                held_blocks=pinned.held,
                purpose=worker_pb2.PULL,
                pull_blocks=blocks,
                traceparent=choice.traceparent,
                verify=self._peers.verify,
            )
            await call.write(worker_pb2.HandoffRequest(begin=begin))
            await self._read(peer, await _ready(call, pinned.held, blocks), pinned)
            await call.write(worker_pb2.HandoffRequest(done=worker_pb2.Done()))
            if (await _next(call)).WhichOneof("message") != "released":
                raise HandoffFailed(f"{peer} answered Done with something other than Released")
            choice.pulled = range(pinned.held, len(pinned.blocks))
            engine.share(pinned, chain)

    async def _read(self, peer: Peer, ready: worker_pb2.BlocksReady, pinned: Pinned) -> None:
        source = list(ready.block_ids)
        if not self._state.engine.extend(pinned, len(source)):
            raise _Missed("no_room")
        destination = pinned.blocks[pinned.held :]
        await self._peers.read(peer, source, destination, self._timeout_s, ready.digests)


async def _ready(call: HandoffCall, held: int, blocks: int) -> worker_pb2.BlocksReady:
    """The blocks that the peer offers after the first `held`. Raises HandoffFailed when they cannot be."""
    ready = (await _next(call)).blocks_ready
    offered = ready.block_ids
    if ready.first_index != held or not 0 < len(offered) <= blocks - held or not ready.last:
        raise HandoffFailed(
            f"blocks {ready.first_index}..+{len(offered)} were offered where up to {blocks - held} from "
            f"{held} on were asked for"
        )
    return ready


async def _next(call: HandoffCall) -> worker_pb2.HandoffResponse:
    response = await call.read()
    if isinstance(response, worker_pb2.HandoffResponse):
        return response
    raise HandoffFailed("the peer ended the stream early")
