"""Requests go on with the same answers while Redis is killed, slow or full and the kvstore is killed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.redis_faults import LATENCY_S, OUTAGE_S, RECOVERY_S, Outcome, faulty_cluster

REDIS_OUTAGES = ["Redis killed, back empty", "Redis killed, back with old data", "Redis full"]
SLOW, KVSTORE = "Redis 200 ms slow", "kvstore killed"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    async def suffer(folder: Path) -> list[Outcome]:
        async with faulty_cluster(folder, prompts=24, clients=3) as cluster:
            return await cluster.outcomes()

    return {one.fault: one for one in asyncio.run(suffer(tmp_path_factory.mktemp("faults")))}


@pytest.mark.parametrize("fault", [*REDIS_OUTAGES, SLOW, KVSTORE])
def test_no_request_fails_and_no_answer_changes(outcomes: dict[str, Outcome], fault: str) -> None:
    outcome = outcomes[fault]
    assert (outcome.failed, outcome.wrong) == ((), 0)
    assert outcome.requests >= 20
    assert outcome.recovery_s < RECOVERY_S


@pytest.mark.parametrize("fault", REDIS_OUTAGES)
def test_without_redis_only_redis_grows_stale_and_the_log_says_so_once(
    outcomes: dict[str, Outcome], fault: str
) -> None:
    outcome = outcomes[fault]
    assert outcome.index_stale_s == 0
    assert outcome.redis_stale_s > 0.9 * OUTAGE_S
    assert (outcome.redis_warnings, outcome.kvstore_warnings) == (1, 0)


def test_a_slow_redis_is_a_little_behind_and_nothing_to_warn_of(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[SLOW]
    assert outcome.index_stale_s == 0
    assert LATENCY_S / 2 <= outcome.redis_stale_s < 10 * LATENCY_S
    assert (outcome.redis_warnings, outcome.kvstore_warnings) == (0, 0)


def test_without_the_kvstore_routers_say_how_old_their_knowledge_is(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[KVSTORE]
    assert 0 < outcome.index_stale_s <= outcome.recovery_s
    assert outcome.redis_warnings == 0
    assert outcome.kvstore_warnings == 3, "once for each of workers, index and reservations"
