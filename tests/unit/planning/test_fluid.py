"""Does the fluid model add up what prompts and answers take, and compute prompts where it is faster?"""

import random
from dataclasses import replace

import pytest

from baton.bench.summary import Targets
from baton.planning.fleet import Fleet, Offer
from baton.planning.fluid import BY_ITSELF, Prefilled, attained, serve
from baton.routing import Role
from baton.sim.cluster import SimCluster, WorkerSpec
from baton.sim.speed import LinearSpeed
from baton.sim.workload import BlockIds, SimRequest

# A prompt token takes 1 ms, a decode step 10 ms and 1 ms for each request.
SPEED = LinearSpeed(
    prefill=(0, 0.001, 0), decode=(0.01, 0, 0.001), large_decode=(0.01, 0, 0.001), large_batch=64
)
SPEC = WorkerSpec(Role.HYBRID, SPEED, kv_blocks=1000, network_bytes_per_s=1e12)
OFFER = Offer("one", SPEC)
AT_ONCE = Offer("at once", replace(SPEC, speed=replace(SPEED, prefill=(0, 0, 0))))
NEVER = Offer("never", replace(SPEC, speed=replace(SPEED, prefill=(1e6, 0, 0))))
LIKE = SimCluster((), kv_bytes_per_token=1, router_s=0.0)


def asked(at_s: float, prompt: int, output: int, number: int = 0) -> SimRequest:
    return SimRequest(at_s, prompt, output, BlockIds((), 16, 16, prompt // 16, number))


def prefilled(requests: list[SimRequest], prefills: int, offer: Offer = OFFER) -> list[Prefilled]:
    """With decode workers that leave prompts alone."""
    return serve(Fleet(offer, prefills, NEVER, 1), requests, LIKE)[0]


def tpots(requests: list[SimRequest], offer: Offer = OFFER, decoders: int = 1) -> list[float]:
    """Of prompts that are done when they come."""
    return serve(Fleet(AT_ONCE, 3, offer, decoders), requests, LIKE)[1]


def test_prompts_queue_for_one_worker_and_not_for_two() -> None:
    requests = [asked(0.0, 1500, 1), asked(0.1, 1500, 1)]
    assert [p.ttft_s for p in prefilled(requests, 1)] == pytest.approx([1.5, 2.9])
    assert [p.ttft_s for p in prefilled(requests, 2)] == pytest.approx([1.5, 1.5])


def test_short_prompts_that_wait_share_a_step() -> None:
    requests = [asked(0.0, 1500, 1), asked(0.1, 100, 1), asked(0.2, 200, 1)]
    steps_cost = Offer("steps cost", replace(SPEC, speed=replace(SPEED, prefill=(0.5, 0.001, 0))))
    assert [p.at_s for p in prefilled(requests, 1, steps_cost)] == pytest.approx([2.0, 2.8, 2.8])


def test_an_idle_decode_worker_computes_what_would_wait_long() -> None:
    requests = [asked(0.0, 1000, 1), asked(0.1, 1000, 1)]
    first, second = serve(Fleet(OFFER, 1, OFFER, 1), requests, LIKE)[0]
    assert (first.worker, first.at_s) == (0, pytest.approx(1.0))
    assert (second.worker, second.at_s) == (BY_ITSELF, pytest.approx(1.1))


def test_what_waits_less_long_than_it_would_disturb_waits() -> None:
    requests = [asked(0.0, 1000, 1), asked(0.8, 1000, 1)]
    prompts = serve(Fleet(OFFER, 1, OFFER, 1), requests, LIKE)[0]
    assert [prompt.at_s for prompt in prompts] == pytest.approx([1.0, 2.0])


def test_those_who_decode_wait_for_a_prompt_beside_them() -> None:
    requests = [asked(0.0, 100, 101), asked(0.1, 9000, 1), asked(0.2, 100, 1)]
    fleet = Fleet(OFFER, 1, OFFER, 1)
    alone = serve(fleet, requests[:1], LIKE)[1]
    prompts, together = serve(fleet, requests, LIKE)
    # Waiting 8.9 s would be worse than a prompt of 0.1 s beside the one request that decodes.
    assert prompts[2].worker == BY_ITSELF
    assert together[0] - alone[0] == pytest.approx(0.1 / 100)


def test_a_request_alone_takes_a_step_per_token() -> None:
    assert tpots([asked(3.0, 100, 50)]) == pytest.approx([0.011])


def test_requests_slow_each_other_down_while_they_overlap() -> None:
    both = [asked(0.0, 100, 101), asked(0.0, 100, 101)]
    assert tpots(both) == pytest.approx([0.012, 0.012])
    assert tpots(both, decoders=2) == pytest.approx([0.011, 0.011])


def test_a_full_pool_makes_requests_wait() -> None:
    small = Offer("small", replace(SPEC, kv_blocks=13))
    first, second = tpots([asked(0.0, 100, 101), asked(0.0, 100, 101)], small)
    assert first == pytest.approx(0.011)
    assert second == pytest.approx(0.022)


def test_kv_that_travels_slowly_delays_the_second_token() -> None:
    slow = Offer("slow", replace(NEVER.spec, network_bytes_per_s=100))
    assert tpots([asked(0.0, 100, 11)], slow) == pytest.approx([(1.0 + 10 * 0.011) / 10])


def test_every_request_is_served_whatever_comes() -> None:
    draw = random.Random(1)
    requests = [asked(i * 0.2, draw.randrange(1, 3000), draw.randrange(1, 60), i) for i in range(300)]
    prompts, found = serve(Fleet(OFFER, 2, OFFER, 3), requests, LIKE)
    assert [prompt.request for prompt in prompts] == requests
    assert {prompt.worker for prompt in prompts} == {BY_ITSELF, 0, 1}
    for prompt, tpot_s in zip(prompts, found, strict=True):
        assert prompt.at_s - prompt.begin_s == pytest.approx(0.001 * prompt.request.prompt_tokens)
        assert (tpot_s >= 0.011 - 1e-9) == (prompt.request.output_tokens > 1)


def test_both_targets_count() -> None:
    prompts = [Prefilled(asked(0.0, 10, 5), 0, 0.0, 0.1), Prefilled(asked(0.0, 10, 5), 0, 0.0, 0.3)]
    met = attained(prompts, [0.05, 0.01], Targets(ttft_s=0.2, tpot_s=0.02))
    assert (met.ttft, met.tpot, met.attainment) == (0.5, 0.5, 0.0)
