"""What do clients see when a pod of each kind is killed under load?"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.k8s.release import Release
from tests.k8s.test_changes import assert_nothing_was_lost


@pytest.fixture(scope="module")
def doubled(release: Release) -> Iterator[Release]:
    """Two of each worker and router, so that there is somewhere else to go."""
    release.upgrade("prefill.replicas=2", "decode.replicas=2", "router.replicas=2")
    yield release
    release.upgrade()


@pytest.mark.parametrize("component", ["prefill", "decode", "kvstore"])
def test_a_killed_pod_loses_no_request(doubled: Release, component: str) -> None:
    with doubled.load() as outcome:
        doubled.replace(component)
    assert_nothing_was_lost(outcome)
    assert outcome["reconnected"] == 0


def test_a_killed_router_costs_its_own_streams_only(doubled: Release) -> None:
    with doubled.load() as outcome:
        doubled.replace("router")
    assert_nothing_was_lost(outcome)


def test_without_prefill_workers_decode_workers_compute_prompts(release: Release) -> None:
    release.upgrade("prefill.replicas=0")
    answer = release.execute("in_cluster_ask.py", release.address, "while True: pass", "4")
    assert answer["status"] == 200
    assert answer["headers"]["x-baton-prefill"] == "local"
    release.upgrade()
