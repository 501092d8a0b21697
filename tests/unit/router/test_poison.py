"""A request that takes workers down is found out; those that only were there go on."""

from __future__ import annotations

import asyncio

import pytest

from baton.errors import DeadlyRequest
from services.router.poison import Loss, Poison, Trial, is_guilty

KILLER, BYSTANDER, OTHER = 1, 2, 3


class Registry:
    """Which incarnations live, as a test says."""

    def __init__(self) -> None:
        self.live: set[str] = set()
        self.changed = asyncio.Event()

    def is_live(self, worker_id: str, incarnation: str) -> bool:
        return incarnation in self.live

    async def wait(self) -> None:
        await self.changed.wait()


def loss(incarnation: str, *prompts: int, alone: bool = True) -> Loss:
    return Loss("decode-0", incarnation, frozenset(prompts), alone)


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture
def poison(registry: Registry) -> Poison:
    return Poison(registry.is_live, registry.wait)


def test_guilty_is_who_is_all_that_the_deaths_have_in_common() -> None:
    assert is_guilty(KILLER, [loss("a", KILLER, BYSTANDER), loss("b", KILLER, OTHER)])
    assert not is_guilty(KILLER, [loss("a", KILLER, BYSTANDER), loss("b", KILLER, BYSTANDER)])
    both = [loss("a", KILLER, BYSTANDER), loss("b", KILLER, BYSTANDER)]
    assert is_guilty(KILLER, [*both, loss("c", KILLER)])
    assert not is_guilty(KILLER, [loss("a", KILLER, alone=False), loss("b", KILLER, alone=False)])
    assert is_guilty(KILLER, [loss("a", KILLER, alone=False), loss("b", KILLER)])


async def test_who_runs_beside_a_suspect_everywhere_covers_it_no_longer_than_its_trial(
    poison: Poison,
) -> None:
    both = [loss("a", KILLER, BYSTANDER), loss("b", KILLER, BYSTANDER)]
    async with poison.trial(BYSTANDER, 5, both) as trial:
        assert trial is not None
        trial.progress(7)
        async with poison.trial(KILLER, 5, both) as second:
            assert second is not None
    third = loss("c", KILLER, BYSTANDER)
    assert not is_guilty(BYSTANDER, [*both, third])
    with pytest.raises(DeadlyRequest):
        async with poison.trial(KILLER, 5, [*both, third]):
            pytest.fail("it was placed")


async def test_one_death_is_no_crime(poison: Poison) -> None:
    async with poison.trial(KILLER, 0, [loss("a", KILLER)]) as trial:
        assert trial is None


async def test_the_third_try_is_refused(poison: Poison) -> None:
    with pytest.raises(DeadlyRequest, match="not tried again"):
        async with poison.trial(KILLER, 0, [loss("a", KILLER, BYSTANDER), loss("b", KILLER)]):
            pytest.fail("it was placed")


async def test_a_connection_that_broke_is_not_a_death(poison: Poison, registry: Registry) -> None:
    registry.live = {"b"}
    async with poison.trial(KILLER, 0, [loss("a", KILLER), loss("b", KILLER)]) as trial:
        assert trial is None


async def test_a_death_that_the_registry_learns_of_late_counts(poison: Poison, registry: Registry) -> None:
    registry.live = {"b"}

    def notice() -> None:
        registry.live.clear()
        registry.changed.set()

    asyncio.get_running_loop().call_later(0.05, notice)
    with pytest.raises(DeadlyRequest):
        async with poison.trial(KILLER, 0, [loss("a", KILLER), loss("b", KILLER)]):
            pytest.fail("it was placed")


async def test_suspects_are_tried_one_at_a_time_until_they_have_two_tokens(poison: Poison) -> None:
    both = [loss("a", KILLER, BYSTANDER), loss("b", KILLER, BYSTANDER)]
    order: list[str] = []

    async def suspect(prompt: int, name: str, tokens: int) -> None:
        async with poison.trial(prompt, 5, both) as trial:
            assert isinstance(trial, Trial)
            order.append(f"{name} begins")
            await asyncio.sleep(0)
            trial.progress(5 + tokens)
            order.append(f"{name} has {tokens}")
            await asyncio.sleep(0)
            order.append(f"{name} ends")

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(suspect(BYSTANDER, "bystander", 2))
        tasks.create_task(suspect(KILLER, "killer", 1))
        tasks.create_task(suspect(OTHER, "other", 2))
    assert order.index("bystander has 2") < order.index("killer begins") < order.index("bystander ends")
    assert order.index("killer ends") < order.index("other begins")
