"""How log-probabilities look in each answer that can carry them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from baton.rpc.v1 import inference_pb2
from baton.text.tokenizer import Tokenizer

Positions = Sequence[inference_pb2.PositionLogprobs]

# JSON has no -Infinity; a token that cannot be chosen is reported as this unlikely.
_LEAST = -9999.0


class LogprobShapes:
    """Names tokens for one request: by text, or as `token_id:N` where that is asked for or all there is."""

    def __init__(self, tokenizer: Tokenizer | None, *, as_token_ids: bool) -> None:
        self._tokenizer = None if as_token_ids else tokenizer

    def name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._tokenizer is None else self._tokenizer.token_text(token_id)

    def chat(self, positions: Positions, top: int) -> dict[str, Any]:
        """`logprobs` of a chat choice, with `top` alternatives each."""
        return {
            "content": [
                {**self._entry(at.chosen), "top_logprobs": [self._entry(other) for other in at.top[:top]]}
                for at in positions
            ]
        }

    def completion(
        self,
        token_ids: Sequence[int],
        positions: Sequence[inference_pb2.PositionLogprobs | None],
        top: int,
        offset: int,
    ) -> tuple[dict[str, Any], int]:
        """`logprobs` of a completion choice whose text so far has `offset` characters, and the new offset.

        A position of None is the first of a prompt, which nothing predicts.
        """
        tokens: list[str] = []
        offsets: list[int] = []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        for token_id, at in zip(token_ids, positions, strict=True):
            name = self.name(token_id)
            tokens.append(name)
            offsets.append(offset)
            offset += len(name)
            if at is None:
                logprobs.append(None)
                tops.append(None)
                continue
            logprobs.append(max(at.chosen.logprob, _LEAST))
            likely = {self.name(other.token_id): max(other.logprob, _LEAST) for other in at.top[:top]}
            likely.setdefault(name, max(at.chosen.logprob, _LEAST))
            tops.append(likely)
        shape = {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": offsets,
        }
        return shape, offset

    def prompt(self, positions: Positions, top: int) -> list[dict[str, Any] | None]:
        """`prompt_logprobs` as vLLM has it: per position a map from token id to its log-probability."""
        shapes: list[dict[str, Any] | None] = [None]
        for at in positions:
            entries = [at.chosen, *at.top[:top]]
            shapes.append(
                {
                    str(entry.token_id): {
                        "logprob": max(entry.logprob, _LEAST),
                        "rank": entry.rank,
                        "decoded_token": self.name(entry.token_id),
                    }
                    for entry in entries
                }
            )
        return shapes

    def _entry(self, token: inference_pb2.TokenLogprob) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token.token_id) if self._tokenizer is not None else b""
        return {
            "token": self.name(token.token_id),
            "logprob": max(token.logprob, _LEAST),
            "bytes": list(raw),
        }
