"""Does a worker come back from a role that it is lent, and only when nobody lends it any longer?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from baton.routing import Role
from baton.worker.role import RoleKeeper

PREFILL, DECODE, HYBRID = Role.PREFILL, Role.DECODE, Role.HYBRID


@dataclass
class Alarm:
    at_s: float
    action: Callable[[], None]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class Worker:
    """A worker with a clock of its own; `became` and `announced` are what others hear of it."""

    role: Role
    own_role: Role
    now_s: float = 0.0
    became: list[Role] = field(default_factory=list)
    announced: list[tuple[Role, Role]] = field(default_factory=list)
    alarms: list[Alarm] = field(default_factory=list)

    def __post_init__(self) -> None:
        def announce() -> None:
            self.announced.append((self.role, self.own_role))

        self.roles = RoleKeeper(self, announce, self._later)

    def become(self, role: Role) -> None:
        self.role = role
        self.became.append(role)

    def pass_s(self, seconds: float) -> Role:
        self.now_s += seconds
        for alarm in [one for one in self.alarms if one.at_s <= self.now_s]:
            self.alarms.remove(alarm)
            if not alarm.cancelled:
                alarm.action()
        return self.role

    def _later(self, seconds: float, action: Callable[[], None]) -> Alarm:
        self.alarms.append(Alarm(self.now_s + seconds, action))
        return self.alarms[-1]


def test_a_role_given_for_good_stays_and_is_where_a_loan_ends() -> None:
    worker = Worker(PREFILL, PREFILL)
    worker.roles.give(DECODE, 0)
    assert worker.pass_s(1e6) is DECODE
    worker.roles.give(PREFILL, 30)
    assert worker.pass_s(31) is DECODE


def test_a_lent_role_ends_when_it_is_not_lent_again_and_everybody_hears_of_it_once() -> None:
    worker = Worker(DECODE, DECODE)
    for _ in range(10):
        worker.roles.give(PREFILL, 30)
        assert worker.pass_s(29) is PREFILL
    assert worker.announced == [(PREFILL, DECODE)]
    assert worker.pass_s(1) is DECODE
    assert worker.announced == [(PREFILL, DECODE), (DECODE, DECODE)]
    assert worker.became == [PREFILL, DECODE]
    assert worker.pass_s(1e6) is DECODE


def test_a_worker_that_is_lent_its_own_role_has_nothing_to_come_back_from() -> None:
    worker = Worker(DECODE, DECODE)
    worker.roles.give(PREFILL, 30)
    worker.roles.give(DECODE, 30)
    assert worker.pass_s(31) is DECODE
    assert worker.became == [PREFILL, DECODE]


def test_an_operator_who_gives_the_lent_role_for_good_ends_the_loan() -> None:
    worker = Worker(DECODE, DECODE)
    worker.roles.give(PREFILL, 30)
    worker.roles.give(PREFILL, 0)
    assert worker.announced[-1] == (PREFILL, PREFILL)
    assert worker.pass_s(31) is PREFILL
    assert worker.became == [PREFILL]


def test_a_hybrid_worker_comes_back_to_both() -> None:
    worker = Worker(HYBRID, HYBRID)
    worker.roles.give(DECODE, 30)
    worker.roles.give(PREFILL, 40)
    assert worker.pass_s(39) is PREFILL
    assert worker.pass_s(1) is HYBRID


def test_a_worker_that_ends_changes_nothing_any_more() -> None:
    worker = Worker(DECODE, DECODE)
    worker.roles.give(PREFILL, 30)
    worker.roles.close()
    assert worker.pass_s(31) is PREFILL
    assert len(worker.announced) == 1
