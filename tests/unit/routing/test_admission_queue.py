"""Admission: bounds hold, tenants share fairly, nobody starves, batch yields, and refusals come early."""

from __future__ import annotations

from collections import Counter
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.routing.admission import Admission, Limits, Pace, Refused, Ticket
from baton.routing.view import Slo

FOREVER: dict[Slo, float] = {"interactive": 1e9, "batch": 1e9}
UNKNOWN = Pace()


def limits(places: int = 1, batch: int = 1, waiting: int = 1000, wait: dict[Slo, float] = FOREVER) -> Limits:
    return Limits(places, batch, waiting, wait)


def ticket(
    tenant: str = "a",
    tokens: int = 100,
    *,
    slo: Slo = "interactive",
    places: int = 1,
    now: float = 0.0,
    deadline: float = 1e12,
) -> Ticket:
    return Ticket(tenant, slo, places, tokens, 0, arrived_s=now, deadline_s=deadline)


def enter(admission: Admission, one: Ticket, now: float = 0.0, pace: Pace = UNKNOWN) -> bool:
    """Whether it started at once; else it waits."""
    if admission.start(one, now, room=True):
        return True
    admission.wait(one, now, pace)
    return False


def drained(admission: Admission, running: Ticket) -> list[Ticket]:
    """The order in which the waiting requests start, one at a time."""
    order = []
    admission.finish(running)
    while (following := admission.next(0.0, room=True)) is not None:
        order.append(following)
        admission.finish(following)
    return order


TENANTS = st.sampled_from("abc")
WEIGHTS = st.fixed_dictionaries({name: st.sampled_from([0.5, 1.0, 3.0]) for name in "abc"})
ARRIVALS = st.lists(st.tuples(TENANTS, st.integers(1, 1000)), min_size=1, max_size=60)


@given(ARRIVALS, WEIGHTS)
def test_waiting_tenants_share_by_weight_to_within_one_request_each(
    arrivals: list[tuple[str, int]], weights: dict[str, float]
) -> None:
    admission = Admission(limits(), weights)
    running = ticket("first")
    enter(admission, running)
    for name, tokens in arrivals:
        enter(admission, ticket(name, tokens))
    largest = {name: max((t for n, t in arrivals if n == name), default=0) for name in "abc"}
    left = Counter(name for name, _ in arrivals)
    started = dict.fromkeys("abc", 0.0)
    for following in drained(admission, running):
        waiting_before = {name for name in "abc" if left[name]}
        left[following.tenant] -= 1
        started[following.tenant] += following.work / weights[following.tenant]
        for one in waiting_before:
            for other in waiting_before:
                bound = largest[one] / weights[one] + largest[other] / weights[other]
                assert abs(started[one] - started[other]) <= bound + 1e-6
    assert not +left, "nobody starves"


@given(st.lists(st.tuples(TENANTS, st.integers(1, 50)), min_size=5, max_size=50))
def test_a_newcomer_is_not_made_to_wait_for_a_greedy_tenant(arrivals: list[tuple[str, int]]) -> None:
    admission = Admission(limits(), {})
    running = ticket("first")
    enter(admission, running)
    for _, tokens in arrivals:
        enter(admission, ticket("greedy", tokens))
    newcomer = ticket("new", 10_000)
    enter(admission, newcomer)
    assert newcomer in drained(admission, running)[:2]


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "arrive", "finish", "leave", "next"]),
        TENANTS,
        st.sampled_from(["interactive", "batch"]),
        st.integers(1, 3),
        st.integers(1, 500),
        st.booleans(),
    ),
    max_size=120,
)


@given(ACTIONS)
def test_bounds_hold_and_batch_yields_whatever_happens(
    actions: list[tuple[str, str, Slo, int, int, bool]],
) -> None:
    admission = Admission(
        limits(places=4, batch=2, waiting=5, wait={"interactive": 20, "batch": 40}), {"a": 2}
    )
    waiting: list[Ticket] = []
    running: list[Ticket] = []
    clock = count()
    for action, tenant, slo, places, tokens, room in actions:
        now = float(next(clock))
        if action == "arrive":
            new = ticket(tenant, tokens, slo=slo, places=places, now=now, deadline=now + 30)
            others = [other for other in waiting if slo == "batch" or other.slo == "interactive"]
            if admission.start(new, now, room=room):
                assert room and not others
                running.append(new)
                continue
            try:
                displaced = admission.wait(new, now, Pace())
            except Refused:
                continue
            waiting.append(new)
            if displaced is not None:
                waiting.remove(displaced[0])
        elif action == "finish" and running:
            admission.finish(running.pop(tokens % len(running)))
        elif action == "leave" and waiting:
            admission.leave(waiting.pop(tokens % len(waiting)))
        elif action == "next":
            following = admission.next(now, room=room)
            late = [
                w
                for w in waiting
                if now > min(w.arrived_s + {"interactive": 20, "batch": 40}[w.slo], w.deadline_s)
            ]
            if following is not None:
                assert room and following not in late
                alive = [w for w in waiting if w not in late]
                assert following.slo == "interactive" or all(w.slo == "batch" for w in alive)
                waiting.remove(following)
                running.append(following)
            # What is dropped for being late has left the queue; its owner is told by its own clock.
            for one in late:
                admission.leave(one)
                waiting.remove(one)
        assert admission.running == sum(one.places for one in running) <= 4
        batch = [one.places for one in running if one.slo == "batch"]
        assert sum(batch) <= 2 or len(batch) == 1
        for each in ("interactive", "batch"):
            assert admission.waiting(each) == sum(one.slo == each for one in waiting) <= 5


def test_batch_waits_while_anybody_interactive_does_and_leaves_places_free() -> None:
    admission = Admission(limits(places=2, batch=1), {})
    first, second = ticket(slo="batch"), ticket(slo="batch")
    assert enter(admission, first)
    assert not enter(admission, second), "batch holds its share of places already"
    assert enter(admission, ticket())
    interactive = ticket()
    assert not enter(admission, interactive)
    admission.finish(first)
    assert admission.next(0, room=True) is interactive


def test_a_full_queue_gives_up_the_greediest_tenants_last_request() -> None:
    admission = Admission(limits(waiting=3), {})
    enter(admission, ticket())
    greedy = [ticket("greedy") for _ in range(3)]
    for one in greedy:
        enter(admission, one)
    with pytest.raises(Refused, match="queue_full"):
        admission.wait(ticket("greedy"), 0, Pace())
    modest = ticket("modest")
    assert not admission.start(modest, 0, room=True)
    displaced = admission.wait(modest, 0, Pace())
    assert displaced is not None
    assert displaced[0] is greedy[-1]
    assert displaced[1].reason == "displaced"


def test_the_wait_is_predicted_from_what_runs_and_what_is_ahead() -> None:
    admission = Admission(limits(places=2), {})
    pace = Pace(prefill_s=0.01, prefillers=2, step_s=0.1)
    for _ in range(2):
        enter(admission, Ticket("a", "interactive", 1, 100, 90, 0.0, 1e12))  # 1 s of prompt, 9 s of output
    newcomer = ticket(now=4.0)
    assert admission.predicted_wait_s(newcomer, 4.0, pace) == pytest.approx((20 - 8) / 2)
    enter(admission, newcomer, 4.0, pace)  # 1 s of prompt
    assert admission.predicted_wait_s(ticket(), 4.0, pace) == pytest.approx((20 - 8 + 1) / 2)
    busy = Pace(prefill_s=0.01, prefillers=2, step_s=0.1, backlog_s=30)
    assert admission.predicted_wait_s(ticket(), 4.0, busy) == pytest.approx(30.5)
    assert admission.predicted_wait_s(ticket("b"), 4.0, pace) == pytest.approx(6), (
        "b need not wait for a's queue"
    )


@pytest.mark.parametrize(("wait_s", "deadline"), [(5.0, 1e12), (1e9, 5.0)])
def test_what_cannot_start_in_time_is_refused_at_once(wait_s: float, deadline: float) -> None:
    admission = Admission(limits(wait={"interactive": wait_s, "batch": wait_s}), {})
    enter(admission, ticket(tokens=1000))
    with pytest.raises(Refused, match="too_late") as refused:
        admission.wait(ticket(deadline=deadline), 0, Pace(prefill_s=0.006))
    assert refused.value.retry_after_s == pytest.approx(6)
    assert admission.waiting("interactive") == 0
    admission.wait(ticket(deadline=deadline), 0, Pace(prefill_s=0.004))


def test_a_request_for_many_places_is_not_overtaken() -> None:
    admission = Admission(limits(places=3), {})
    running = [ticket() for _ in range(3)]
    for one in running:
        enter(admission, one)
    wide, narrow = ticket(places=3), ticket("b")
    enter(admission, wide)
    enter(admission, narrow)
    for one in running[:2]:
        admission.finish(one)
        assert admission.next(0, room=True) is None
    admission.finish(running[2])
    assert admission.next(0, room=True) is wide
