"""Is a stuck engine told from one that has nothing to do, is slow, or was stopped with its process?"""

from __future__ import annotations

from baton.worker.watchdog import Watchdog


def looks(
    watchdog: Watchdog, seconds: float, *, steps: int = 7, idle: bool = False, at_s: float = 0.0
) -> bool:
    """Whether it barks within so many seconds of an engine that does not change."""
    count = round(seconds / watchdog.period_s)
    times = [at_s + number * watchdog.period_s for number in range(count + 1)]
    return [watchdog.stuck(now_s, steps=steps, idle=idle) for now_s in times].count(True) > 0


def test_a_step_that_takes_too_long_is_noticed_then_and_not_before() -> None:
    watchdog = Watchdog(30.0)
    assert not looks(watchdog, 29.0)
    assert looks(watchdog, 2.0, at_s=29.5)


def test_an_engine_with_nothing_to_do_is_not_stuck() -> None:
    assert not looks(Watchdog(30.0), 600.0, idle=True)


def test_slow_steps_are_not_stuck() -> None:
    watchdog = Watchdog(30.0)
    for step in range(10):
        assert not looks(watchdog, 25.0, steps=step, at_s=25.0 * step)


def test_a_process_that_was_stopped_has_not_been_computing_meanwhile() -> None:
    watchdog = Watchdog(30.0)
    assert not looks(watchdog, 10.0)
    assert not looks(watchdog, 10.0, at_s=3600.0)
    assert looks(watchdog, 30.0, at_s=3611.0)


def test_a_short_time_limit_is_looked_at_often_enough() -> None:
    watchdog = Watchdog(0.6)
    assert watchdog.period_s == 0.01
    assert looks(watchdog, 0.7)
