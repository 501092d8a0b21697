"""Schedulers of other engines, to compare with: how they choose the next step."""

from __future__ import annotations

from baton.engine.scheduler import Scheduled, Scheduler


class PrefillFirst(Scheduler):
    """vLLM's before it had chunked prefill, DistServe's baseline: as long as prompts wait that fit, steps are
    of prompts alone, and who decodes waits.

    Source: Kwon et al., PagedAttention (SOSP 2023); Zhong et al., DistServe (OSDI 2024), section 2.3.
    """

    def schedule(self) -> list[Scheduled]:
        """See `Scheduler.schedule`."""
        decoding = [sequence for sequence in self.running if sequence.remaining == 1]
        if len(decoding) < self.limits.max_batch_requests:
            everyone = self.running
            self.running = [sequence for sequence in everyone if sequence.remaining > 1]
            known = len(self.running)
            batch = super().schedule()
            admitted = self.running[known:]
            self.running = everyone + admitted
            if batch:
                return batch
        return super().schedule()
