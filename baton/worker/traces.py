"""What a worker records of a request that is traced, once it is known."""

from __future__ import annotations

import time

from baton import tracing
from baton.engine.sequence import Sequence as Choice


def trace_prefill(choice: Choice, worker_id: str) -> None:
    """A prompt was computed here: its queue, and the chunks it was computed in."""
    if not choice.traceparent or not choice.chunks:
        return
    facts: tracing.Attributes = {
        "worker": worker_id,
        "prompt_tokens": choice.prompt_len,
        "cached_tokens": choice.cached_tokens or 0,
        "pulled_tokens": choice.pulled_tokens,
    }
    began_s = choice.first_scheduled_s
    tracing.record(choice.traceparent, "queue", choice.arrived_s, began_s, {"worker": worker_id})
    prefill = tracing.record(choice.traceparent, "prefill", began_s, choice.chunks[-1][1], facts)
    for tokens, ended_s in choice.chunks:
        tracing.record(prefill, "chunk", began_s, ended_s, {"tokens": tokens})
        began_s = ended_s


def trace_decode(choice: Choice, worker_id: str, outcome: str) -> None:
    """A request that decoded here is over."""
    if choice.traceparent and choice.decoding_since_s:
        facts: tracing.Attributes = {"worker": worker_id, "tokens": choice.output_len, "outcome": outcome}
        tracing.record(choice.traceparent, "decode", choice.decoding_since_s, time.monotonic(), facts)
