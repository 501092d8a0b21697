"""Does the fluid model add up what a queue of prompts and a batch of requests take?"""

import random

import pytest

from baton.bench.summary import Targets
from baton.planning.fleet import Fleet, Offer
from baton.planning.fluid import Prefilled, attained, decode, prefill
from baton.routing import Role
from baton.sim.cluster import WorkerSpec
from baton.sim.speed import LinearSpeed
from baton.sim.workload import BlockIds, SimRequest

# A prompt token takes 1 ms, a decode step 10 ms and 1 ms for each request.
SPEED = LinearSpeed(
    prefill=(0, 0.001, 0), decode=(0.01, 0, 0.001), large_decode=(0.01, 0, 0.001), large_batch=64
)
OFFER = Offer("one", WorkerSpec(Role.HYBRID, SPEED, kv_blocks=1000, network_bytes_per_s=1e12))


def asked(at_s: float, prompt: int, output: int, number: int = 0) -> SimRequest:
    return SimRequest(at_s, prompt, output, BlockIds((), 16, 16, prompt // 16, number))


def alone(*prompts: SimRequest) -> list[Prefilled]:
    """Prompts that were done when they came."""
    return [Prefilled(prompt, 0, prompt.arrival_s, prompt.arrival_s) for prompt in prompts]


def tpots(prompts: list[Prefilled], offer: Offer = OFFER, decoders: int = 1) -> list[float]:
    return decode(Fleet(OFFER, 3, offer, decoders), prompts, block_tokens=16, kv_bytes_per_token=1)


def test_prompts_queue_for_one_worker_and_not_for_two() -> None:
    requests = [asked(0.0, 1500, 1), asked(0.1, 1500, 1)]
    assert [p.ttft_s for p in prefill(OFFER, 1, requests, 0)] == pytest.approx([1.5, 2.9])
    assert [p.ttft_s for p in prefill(OFFER, 2, requests, 0)] == pytest.approx([1.5, 1.5])


def test_short_prompts_that_wait_share_a_step() -> None:
    requests = [asked(0.0, 1500, 1), asked(0.1, 100, 1), asked(0.2, 200, 1)]
    assert [p.at_s for p in prefill(OFFER, 1, requests, 0)] == pytest.approx([1.5, 1.8, 1.8])


def test_a_request_alone_takes_a_step_per_token() -> None:
    assert tpots(alone(asked(3.0, 100, 50))) == pytest.approx([0.011])


def test_requests_slow_each_other_down_while_they_overlap() -> None:
    both = tpots(alone(asked(0.0, 100, 101), asked(0.0, 100, 101)))
    assert both == pytest.approx([0.012, 0.012])
    apart = tpots(alone(asked(0.0, 100, 101), asked(0.0, 100, 101)), decoders=2)
    assert apart == pytest.approx([0.011, 0.011])


def test_a_full_pool_makes_requests_wait() -> None:
    small = Offer("small", WorkerSpec(Role.HYBRID, SPEED, kv_blocks=13, network_bytes_per_s=1e12))
    first, second = tpots(alone(asked(0.0, 100, 101), asked(0.0, 100, 101)), small)
    assert first == pytest.approx(0.011)
    assert second == pytest.approx(0.022)


def test_kv_that_travels_slowly_delays_the_second_token() -> None:
    slow = Offer("slow", WorkerSpec(Role.HYBRID, SPEED, kv_blocks=1000, network_bytes_per_s=100))
    assert tpots(alone(asked(0.0, 100, 11)), slow) == pytest.approx([(1.0 + 10 * 0.011) / 10])


def test_every_request_is_served_whatever_comes() -> None:
    draw = random.Random(1)
    requests = [asked(i * 0.02, draw.randrange(1, 3000), draw.randrange(1, 60), i) for i in range(200)]
    prompts = prefill(OFFER, 3, requests, 0.001)
    assert sorted(p.request.arrival_s for p in prompts) == [r.arrival_s for r in requests]
    found = tpots(prompts, decoders=2)
    for prompt, tpot_s in zip(prompts, found, strict=True):
        assert (tpot_s >= 0.011 - 1e-9) == (prompt.request.output_tokens > 1)


def test_both_targets_count() -> None:
    prompts = [Prefilled(asked(0.0, 10, 5), 0, 0.0, 0.1), Prefilled(asked(0.0, 10, 5), 0, 0.0, 0.3)]
    met = attained(prompts, [0.05, 0.01], Targets(ttft_s=0.2, tpot_s=0.02))
    assert (met.ttft, met.tpot, met.attainment) == (0.5, 0.5, 0.0)
