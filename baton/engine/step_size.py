"""How many tokens should a step compute at most, where nobody has said?"""

from __future__ import annotations

from collections.abc import Mapping

_NEARLY = 0.95


def step_size(prefill: Mapping[int, float], max_batch_requests: int) -> int:
    """Tokens per step: as few as reach full prefill speed, and one for every request that may decode.

    `prefill` are the seconds of one prompt, by its tokens.
    """
    return max(knee(prefill), max_batch_requests)


def knee(prefill: Mapping[int, float]) -> int:
    """The fewest tokens per step that reach nearly the best prefill speed of the curve, at least 16.

    More would only delay whoever shares the step: sequences that decode, and prompts that end in it.
    """
    best = max(tokens / seconds for tokens, seconds in prefill.items())
    return max(16, min(tokens for tokens, seconds in prefill.items() if tokens / seconds >= _NEARLY * best))
