"""Who is weighed in a cluster too large to weigh everybody."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from baton.routing import ClusterView, WorkerView, create_policy
from baton.routing.nominees import Nominees
from tests.unit.routing.clusters import clusters, decoder, prefiller, prompt

DECODERS = [f"d{number}" for number in range(1000)]
PREFILLERS = [f"p{number}" for number in range(1000)]
ROLES = {True: DECODERS, False: PREFILLERS}


@given(clusters())
def test_a_small_cluster_is_weighed_whole(cluster: ClusterView) -> None:
    names = {worker.worker_id for worker in cluster.workers}
    roles = {
        decodes: [w.worker_id for w in cluster.workers if w.role.decodes is decodes]
        for decodes in (True, False)
    }
    assert set(Nominees(Random(0)).choose(roles, (), None)) == names


@given(
    st.dictionaries(st.sampled_from(DECODERS + PREFILLERS), st.integers(1, 99), max_size=30),
    st.sampled_from([None, "d7"]),
)
def test_few_are_named_of_many_the_best_holders_and_the_last_worker_among_them(
    held: dict[str, int], session_worker: str | None
) -> None:
    named = Nominees(Random(0)).choose(ROLES, (held, {"p500": 3}), session_worker)
    assert len(named) == len(set(named)) <= 20
    assert "p500" in named
    assert session_worker is None or session_worker in named
    if held:
        assert max(held.values()) in [held.get(name, 0) for name in named]


def test_the_least_loaded_are_kept_and_found_again() -> None:
    """Load is as it is, and stays: in some hundred requests the best of a thousand come up."""
    nominees = Nominees(Random(0))
    views: dict[str, WorkerView] = {
        name: decoder(name, running=number) for number, name in enumerate(DECODERS)
    } | {name: prefiller(name, queued_tokens=10 * number) for number, name in enumerate(PREFILLERS)}
    for _ in range(500):
        weighed = [views[name] for name in nominees.choose(ROLES, (), None)]
        nominees.keep(weighed)
    assert min(view.running for view in weighed if view.role.decodes) < 10
    assert min(view.queued_tokens for view in weighed if not view.role.decodes) < 100


def test_what_is_chosen_among_them_is_nearly_as_good_as_among_all() -> None:
    policy, nominees, rng = create_policy("prefix", Random(0)), Nominees(Random(0)), Random(1)
    views = [prefiller(name, queued_tokens=int(rng.expovariate(0.001))) for name in PREFILLERS]
    views += [decoder(name, running=int(rng.expovariate(0.1))) for name in DECODERS]
    by_name = {view.worker_id: view for view in views}
    request = prompt(600)
    best_s = policy.choose(request, ClusterView(views)).terms.total_s("interactive")
    found = []
    for _ in range(200):
        weighed = [by_name[name] for name in nominees.choose(ROLES, (), None)]
        nominees.keep(weighed)
        found.append(policy.choose(request, ClusterView(weighed)).terms.total_s("interactive"))
    assert sorted(found)[100] < 1.2 * best_s
