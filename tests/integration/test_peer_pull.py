"""A prefix that another worker holds is read instead of computed; a pull that fails costs no answer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster import Cluster
from tests.conftest import StartCluster
from tests.integration.cluster_state import BLOCK, fresh_prompt, nothing_is_held, pulls, until
from tests.integration.worker_session import generate, pull_from


@pytest.fixture(scope="module")
def pair(start_cluster: StartCluster) -> Iterator[Cluster]:
    with start_cluster("--prefill", "1", "--decode", "0", "--hybrid", "2", "--kv-blocks", "200") as up:
        yield up


def test_a_pulled_prefix_gives_the_same_tokens_and_is_counted(pair: Cluster) -> None:
    prompt = fresh_prompt(20 * BLOCK + 5)
    expected, cold = generate(pair, "hybrid-0", prompt)
    assert (cold.cached_tokens, cold.pulled_tokens) == (0, 0)
    tokens, report = generate(pair, "hybrid-1", prompt, pull=pull_from(pair, "hybrid-0", 20))
    assert tokens == expected
    assert (report.cached_tokens, report.pulled_tokens) == (20 * BLOCK, 20 * BLOCK)
    assert pulls(pair, "hybrid-1", "pulled") == 1
    until(lambda: nothing_is_held(pair), "nothing is held")
    # What was pulled is cached like anything else, and is not pulled again.
    again, report = generate(pair, "hybrid-1", prompt, pull=pull_from(pair, "hybrid-0", 20))
    assert again == expected
    assert (report.cached_tokens, report.pulled_tokens) == (20 * BLOCK, 0)
    assert pulls(pair, "hybrid-1", "held") == 1


def test_only_what_is_missing_is_pulled(pair: Cluster) -> None:
    prompt = fresh_prompt(30 * BLOCK)
    generate(pair, "hybrid-0", prompt)
    generate(pair, "hybrid-1", prompt[: 10 * BLOCK])
    _, report = generate(pair, "hybrid-1", prompt, pull=pull_from(pair, "hybrid-0", 99))
    assert (report.cached_tokens, report.pulled_tokens) == (29 * BLOCK, 19 * BLOCK)


def test_a_prefill_worker_pulls_before_it_computes_for_another(pair: Cluster) -> None:
    prompt = fresh_prompt(12 * BLOCK + 3)
    expected, _ = generate(pair, "hybrid-0", prompt)
    tokens, report = generate(
        pair, "hybrid-1", prompt, pull=pull_from(pair, "hybrid-0", 12), prefill_worker="prefill-0"
    )
    assert tokens == expected
    assert (report.cached_tokens, report.pulled_tokens) == (12 * BLOCK, 12 * BLOCK)
    assert pulls(pair, "prefill-0", "pulled") == 1
    until(lambda: nothing_is_held(pair), "nothing is held")


def test_a_pull_that_fails_is_a_counted_miss(pair: Cluster) -> None:
    prompt = fresh_prompt(8 * BLOCK + 1)
    expected, _ = generate(pair, "hybrid-0", prompt)

    stale = pull_from(pair, "hybrid-0", 8)
    stale.incarnation = "before"
    nowhere = pull_from(pair, "hybrid-0", 8)
    nowhere.address = "127.0.0.1:1"
    for pull, salt, outcome in (
        (pull_from(pair, "hybrid-0", 8), "unknown there", "not_found"),
        (stale, "", "failed"),
        (nowhere, "other", "failed"),
    ):
        before = pulls(pair, "hybrid-1", outcome)
        tokens, report = generate(pair, "hybrid-1", prompt, pull=pull, cache_salt=salt)
        assert tokens == expected
        assert report.pulled_tokens == 0
        assert pulls(pair, "hybrid-1", outcome) == before + 1
    until(lambda: nothing_is_held(pair), "nothing is held")
