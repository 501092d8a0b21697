"""Decode steps as recorded graphs: one launch in place of hundreds, for a ladder of batch sizes.

A graph computes on the tensors it was recorded with. Before it runs, a step's tokens, positions and block
tables are copied into those; the rows that a batch leaves over write to a block that is nobody's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from baton.attention.base import Attention, AttentionBatch, FixedRows
from baton.device import Device
from baton.models.base import Model

log = logging.getLogger(__name__)


def ladder(most: int) -> list[int]:
    """Batch sizes to record graphs for, ascending: 1, 2, 4, then every eighth, and `most`."""
    return sorted({size for size in (1, 2, 4, *range(8, most, 8)) if size < most} | {most})


@dataclass(frozen=True)
class _Graph:
    """A recorded step of `rows.rows` sequences."""

    rows: FixedRows
    replay: Callable[[], None]


class DecodeGraphs:
    """Graphs of one model for batches of one new token per sequence. Use `record`."""

    def __init__(self, most: int, model: Model) -> None:
        self._tokens = torch.zeros(most, dtype=torch.int64, device=model.device)
        self._positions = torch.zeros(most, dtype=torch.int64, device=model.device)
        self._logits = torch.zeros(most, model.config.vocab_size, device=model.device)
        self._graphs: dict[int, _Graph] = {}

    @classmethod
    def record(
        cls,
        model: Model,
        attention: Attention,
        device: Device,
        most: int,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> DecodeGraphs | None:
        """Graphs for up to `most` sequences; None, with a line in the log, where that cannot be done.

        `report` hears how many are recorded and of how many.
        """
        graphs = cls(most, model)
        # The largest first: the others find room in its memory.
        sizes = ladder(most)[::-1]
        for number, size in enumerate(sizes):
            try:
                fixed = attention.fixed_rows(size, model.config.max_model_len)
                if fixed is None:
                    raise RuntimeError(f"attention backend {attention.name} has no buffers that stay")
                graphs._record(size, fixed, model, attention, device)
            except RuntimeError as error:
                log.warning("decode runs without graphs: %s", (str(error) or repr(error)).splitlines()[0])
                return None
            report(number + 1, len(sizes))
        return graphs

    def take(self, batch: AttentionBatch) -> bool:
        """Whether a graph can compute the batch."""
        return len(batch.query_lens) <= max(self._graphs) and all(new == 1 for new in batch.query_lens)

    def run(self, tokens: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """float32 [sequences, vocab], valid until the next run. `tokens` and `positions` are int64."""
        count = tokens.shape[0]
        graph = self._graphs[min(size for size in self._graphs if size >= count)]
        self._tokens[:count].copy_(tokens)
        self._positions[:count].copy_(positions)
        graph.rows.begin(batch)
        graph.replay()
        return self._logits[:count]

    @torch.inference_mode()
    def _record(self, size: int, rows: FixedRows, model: Model, attention: Attention, device: Device) -> None:
        tokens, positions, logits = self._tokens[:size], self._positions[:size], self._logits[:size]

        def compute() -> None:
            logits.copy_(model.logits(model.forward(tokens, positions, attention)))

        with device.current():
            rows.begin(AttentionBatch([], [], []))
            self._graphs[size] = _Graph(rows, device.graph(compute))
