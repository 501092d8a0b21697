"""How worker messages become the engine's values, and back; where a Start or Begin is checked."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from baton.engine.interfaces import Load, Output
from baton.engine.sequence import Sequence as Choice
from baton.errors import InvalidRequest
from baton.rpc.v1 import inference_pb2, worker_pb2
from baton.sampling import FinishReason, PositionLogprobs, Sampling, TokenLogprob

_SHORTEST_S = 0.001
_FINISH = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: inference_pb2.FINISH_REASON_CANCELLED,
}


def sampling_from(message: worker_pb2.Sampling, vocab_size: int) -> Sampling:
    """The engine's sampling parameters.

    Raises:
        InvalidRequest: a value no router should send: a token id outside the vocabulary or a number
            that is not finite.
    """
    _check_ids("logit_bias", list(message.logit_bias), vocab_size)
    _check_ids("stop_token_ids", message.stop_token_ids, vocab_size)
    if message.max_tokens < 1:
        raise InvalidRequest("sampling.max_tokens must be at least 1", field="max_tokens")
    numbers = {
        "temperature": message.temperature,
        "top_p": message.top_p,
        "min_p": message.min_p,
        "presence_penalty": message.presence_penalty,
        "frequency_penalty": message.frequency_penalty,
        "repetition_penalty": message.repetition_penalty,
    }
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise InvalidRequest(f"sampling.{name} must be a finite number, got {value}", field=name)
    return Sampling(
        max_tokens=message.max_tokens,
        top_k=message.top_k,
        logit_bias=dict(message.logit_bias),
        stop_token_ids=tuple(message.stop_token_ids),
        seed=message.seed,
        ignore_eos=message.ignore_eos,
        min_tokens=message.min_tokens,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        grammar=message.grammar,
        **numbers,
    )


def remaining_s(choice: Choice) -> float:
    """How long the choice's client still waits, as a message says it: 0 for ever."""
    if choice.deadline_s == math.inf:
        return 0.0
    return max(_SHORTEST_S, choice.deadline_s - time.monotonic())


def context_from(
    prompt: Sequence[int], output: Sequence[int], vocab_size: int, max_model_len: int
) -> list[int]:
    """Prompt and earlier output as one checked context.

    Raises:
        InvalidRequest: it is empty, too long, or holds a token id outside the vocabulary.
    """
    if not prompt:
        raise InvalidRequest("prompt_token_ids must not be empty", field="prompt")
    context = [*prompt, *output]
    if len(context) >= max_model_len:
        raise InvalidRequest(
            f"the context has {len(context)} tokens and the worker takes fewer than {max_model_len}",
            field="prompt",
        )
    _check_ids("prompt", context, vocab_size)
    return context


def _check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    if ids and max(ids) >= vocab_size:
        raise InvalidRequest(
            f"{name}: token id {max(ids)} is not below the vocabulary size {vocab_size}", field=name
        )


def logprobs_to(value: PositionLogprobs) -> inference_pb2.PositionLogprobs:
    return inference_pb2.PositionLogprobs(
        chosen=_logprob_to(value.chosen), top=[_logprob_to(t) for t in value.top]
    )


def _logprob_to(value: TokenLogprob) -> inference_pb2.TokenLogprob:
    return inference_pb2.TokenLogprob(token_id=value.token_id, logprob=value.logprob, rank=value.rank)


def output_to(key: int, output: Output) -> worker_pb2.RequestOutput:
    """What a decode worker tells the router of one step of one request."""
    message = worker_pb2.RequestOutput(key=key)
    if output.error:
        kinds = worker_pb2.RequestError
        message.error.kind = (
            kinds.EXPIRED if output.expired else kinds.INVALID if output.misguided else kinds.INTERNAL
        )
        message.error.message = output.error
        return message
    if output.sampled is not None:
        message.token_ids.append(output.sampled.token_id)
        if output.sampled.logprobs is not None:
            message.logprobs.append(logprobs_to(output.sampled.logprobs))
    if output.finish_reason is not None:
        message.finish_reason = _FINISH[output.finish_reason]
        message.complete = output.complete
    if output.stopped_by_token_id and output.sampled is not None:
        message.stopped_by_token_id = True
        message.stop_token_id = output.sampled.token_id
    message.prompt_logprobs.extend(logprobs_to(value) for value in output.prompt_logprobs)
    if output.first:
        message.prefill.CopyFrom(report_to(output, _local_kind(output)))
    return message


def first_token_to(output: Output) -> worker_pb2.FirstToken:
    """What a prefill worker tells the reader of the first token."""
    assert output.sampled is not None
    message = worker_pb2.FirstToken(
        token_id=output.sampled.token_id,
        stopped_by_token_id=output.stopped_by_token_id,
        complete=output.complete,
        prefill=report_to(output, worker_pb2.PrefillReport.REMOTE),
        prompt_logprobs=[logprobs_to(value) for value in output.prompt_logprobs],
    )
    if output.sampled.logprobs is not None:
        message.logprobs.CopyFrom(logprobs_to(output.sampled.logprobs))
    if output.finish_reason is not None:
        message.finish_reason = _FINISH[output.finish_reason]
    return message


def forwarded_to(key: int, first: worker_pb2.FirstToken) -> worker_pb2.RequestOutput:
    """A first token from a prefill worker as the decode worker passes it on."""
    message = worker_pb2.RequestOutput(
        key=key,
        token_ids=[first.token_id],
        finish_reason=first.finish_reason,
        complete=first.complete,
        prefill=first.prefill,
        prompt_logprobs=first.prompt_logprobs,
    )
    if first.HasField("logprobs"):
        message.logprobs.append(first.logprobs)
    if first.stopped_by_token_id:
        message.stopped_by_token_id = True
        message.stop_token_id = first.token_id
    return message


def report_to(output: Output, kind: worker_pb2.PrefillReport.Kind.ValueType) -> worker_pb2.PrefillReport:
    choice = output.choice
    report = worker_pb2.PrefillReport(
        kind=kind,
        cached_tokens=choice.cached_tokens or 0,
        queue_s=output.queue_s,
        prefill_s=output.prefill_s,
        pulled_tokens=choice.pulled_tokens,
    )
    last_s = choice.first_scheduled_s
    for tokens, ended_s in choice.chunks:
        report.chunks.add(tokens=tokens, seconds=ended_s - last_s)
        last_s = ended_s
    return report


def _local_kind(output: Output) -> worker_pb2.PrefillReport.Kind.ValueType:
    choice = output.choice
    if choice.prompt_len - (choice.cached_tokens or 0) <= choice.block_size and choice.cached_tokens:
        return worker_pb2.PrefillReport.CACHED
    return worker_pb2.PrefillReport.LOCAL


def load_to(load: Load, block_bytes: int) -> worker_pb2.WorkerLoad:
    return worker_pb2.WorkerLoad(
        running=load.running,
        waiting=load.waiting + load.reading,
        queued_tokens=load.queued_tokens,
        total_blocks=load.total_blocks,
        free_blocks=load.free_blocks,
        cached_blocks=load.cached_blocks,
        host_bytes=load.host_blocks * block_bytes,
        disk_bytes=load.disk_blocks * block_bytes,
        step_factor=load.step_factor,
    )


def error_to(
    key: int, kind: worker_pb2.RequestError.Kind.ValueType, message: str
) -> worker_pb2.RequestOutput:
    return worker_pb2.RequestOutput(key=key, error=worker_pb2.RequestError(kind=kind, message=message))
