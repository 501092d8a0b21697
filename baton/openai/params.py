"""What a request's sampling fields come to for this model: every default filled in, every range checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from baton.errors import ContextLengthExceeded, InvalidRequest
from baton.models.config import SamplingDefaults
from baton.openai.schema import MAX_STOPS, SamplingFields
from baton.sampling import Sampling

_MAX_STOP_CHARACTERS = 1024
_NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


@dataclass(frozen=True)
class ModelLimits:
    """What requests are checked against. `max_model_len`: tokens of prompt and output together."""

    max_model_len: int
    vocab_size: int
    defaults: SamplingDefaults


@dataclass(frozen=True)
class OutputBudget:
    """How many tokens a choice may have.

    `field` names what the caller set it with, for messages; `wanted` is None where the caller left
    it open and gets `default`, or what the context allows if that is less (None: all of it).
    """

    field: str
    wanted: int | None
    default: int | None


def check_prompt(token_ids: Sequence[int], limits: ModelLimits, field: str) -> None:
    """
    Raises:
        InvalidRequest: the prompt is empty or holds an id the model does not have.
        ContextLengthExceeded: it leaves no room for a single token of output.
    """
    if not token_ids:
        raise InvalidRequest(f"{field}: must hold at least one token, got none", field=field)
    check_prompt_length(len(token_ids), limits, field)
    highest = max(token_ids)
    if highest >= limits.vocab_size:
        raise InvalidRequest(
            f"{field}: token id {highest} is out of range; the model has ids 0 to {limits.vocab_size - 1}",
            field=field,
        )


def check_prompt_length(tokens: int, limits: ModelLimits, field: str) -> None:
    """
    Raises:
        ContextLengthExceeded: so many prompt tokens leave no room for a single token of output.
    """
    if tokens >= limits.max_model_len:
        raise ContextLengthExceeded(
            f"{field}: {tokens} tokens leave no room for output in this model's context of "
            f"{limits.max_model_len} tokens; shorten {field}",
            field=field,
        )


def settle(
    fields: SamplingFields,
    limits: ModelLimits,
    *,
    prompt_tokens: int,
    budget: OutputBudget,
    logprobs: int | None,
    seed: int,
    grammar: str = "",
) -> Sampling:
    """The sampling of a request's first choice.

    Args:
        logprobs: alternatives to report for each token; None: no log-probabilities at all.
        seed: used when the request has none.
        grammar: what `constraint_of` the request comes to.

    Raises:
        InvalidRequest: naming the field whose value is out of range for this model.
        ContextLengthExceeded: prompt and explicitly wanted output do not fit the context.
    """
    for name in _NUMBERS:
        value = getattr(fields, name)
        if value is not None and not math.isfinite(value):
            raise InvalidRequest(f"{name}: must be a finite number, got {value}", field=name)
    max_tokens = _max_tokens(budget, limits, prompt_tokens)
    min_tokens = fields.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens: must be at most {budget.field} ({max_tokens}), got {min_tokens}", field="min_tokens"
        )
    defaults = limits.defaults
    return Sampling(
        max_tokens=max_tokens,
        temperature=_first(fields.temperature, defaults.temperature, 1.0),
        top_p=_first(fields.top_p, defaults.top_p, 1.0),
        top_k=max(0, _first(fields.top_k, defaults.top_k, 0)),
        min_p=_first(fields.min_p, defaults.min_p, 0.0),
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        repetition_penalty=_first(fields.repetition_penalty, defaults.repetition_penalty, 1.0),
        logit_bias=_logit_bias(fields.logit_bias, limits) if fields.logit_bias else {},
        stop_token_ids=_stop_token_ids(fields.stop_token_ids, limits) if fields.stop_token_ids else (),
        seed=seed if fields.seed is None else _seed(fields.seed),
        ignore_eos=fields.ignore_eos or False,
        min_tokens=min_tokens,
        logprobs=logprobs,
        prompt_logprobs=fields.prompt_logprobs,
        grammar=grammar,
    )


def stops_of(fields: SamplingFields) -> tuple[str, ...]:
    """The stop strings of a request.

    Raises:
        InvalidRequest: there are too many, or one is empty or very long.
    """
    if not fields.stop:
        if fields.stop == "":
            raise InvalidRequest("stop: must not be an empty string", field="stop")
        return ()
    stops = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop)
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop: at most {MAX_STOPS} strings, got {len(stops)}", field="stop")
    if not all(0 < len(stop) <= _MAX_STOP_CHARACTERS for stop in stops):
        raise InvalidRequest(
            f"stop: each string must have 1 to {_MAX_STOP_CHARACTERS} characters", field="stop"
        )
    return stops


def _max_tokens(budget: OutputBudget, limits: ModelLimits, prompt_tokens: int) -> int:
    room = limits.max_model_len - prompt_tokens
    if budget.wanted is None:
        return room if budget.default is None else min(budget.default, room)
    if budget.wanted < 1:
        raise InvalidRequest(f"{budget.field}: must be at least 1, got {budget.wanted}", field=budget.field)
    if budget.wanted > room:
        raise ContextLengthExceeded(
            f"{budget.field}: {budget.wanted} tokens of output after {prompt_tokens} of prompt exceed this "
            f"model's context of {limits.max_model_len} tokens; ask for at most {room}",
            field=budget.field,
        )
    return budget.wanted


def _logit_bias(bias: dict[str, float], limits: ModelLimits) -> dict[int, float]:
    settled = {}
    for name, value in bias.items():
        if not (name.isascii() and name.isdigit() and len(name) <= 10 and int(name) < limits.vocab_size):
            raise InvalidRequest(
                f"logit_bias: keys must be token ids 0 to {limits.vocab_size - 1}, got {name[:64]!r}",
                field="logit_bias",
            )
        if not math.isfinite(value):
            raise InvalidRequest(f"logit_bias: the value of {name} must be finite", field="logit_bias")
        settled[int(name)] = value
    return settled


def _stop_token_ids(token_ids: Sequence[int], limits: ModelLimits) -> tuple[int, ...]:
    if (highest := max(token_ids)) >= limits.vocab_size:
        raise InvalidRequest(
            f"stop_token_ids: {highest} is out of range; the model has ids 0 to {limits.vocab_size - 1}",
            field="stop_token_ids",
        )
    return tuple(token_ids)


def _seed(seed: int) -> int:
    if not -(2**63) <= seed < 2**64:
        raise InvalidRequest(f"seed: must fit in 64 bits, got {seed}", field="seed")
    return seed % 2**64


Number = TypeVar("Number", int, float)


def _first(asked: Number | None, recommended: Number | None, otherwise: Number) -> Number:
    if asked is not None:
        return asked
    return otherwise if recommended is None else recommended
