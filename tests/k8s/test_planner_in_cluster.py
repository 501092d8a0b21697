"""Does the planner change numbers and roles of a real cluster's workers, within its rights and its budget?"""

from __future__ import annotations

from tests.k8s.release import START_S, Release, wait_for
from tests.k8s.test_changes import assert_nothing_was_lost

#: So little is too much that the load of these tests is; three workers are allowed.
EAGER = (
    *("planner.enabled=true", "planner.config.budgetGpus=3", "planner.config.targetUtilization=0.05"),
    *("planner.config.planIntervalS=1", "planner.config.growAfterS=3"),
)


def replicas(release: Release) -> int:
    return sum(len(release.pods(role)) for role in ("prefill", "decode"))


def events(release: Release) -> list[str]:
    found = release.objects("events", "--field-selector", "reportingComponent=baton-planner")
    return [str(event["message"]) for event in found]


def test_a_dry_run_only_says_what_it_would_do(release: Release) -> None:
    with release.load() as outcome:
        release.upgrade(*EAGER, "planner.config.dryRun=true")
        wait_for("an Event", lambda: any("would add" in said for said in events(release)), START_S)
        assert replicas(release) == 2
    assert_nothing_was_lost(outcome)
    release.upgrade()


def test_workers_come_up_to_the_budget_and_an_upgrade_leaves_them(release: Release) -> None:
    with release.load() as outcome:
        release.upgrade(*EAGER)
        wait_for("a third worker", lambda: replicas(release) == 3, START_S)
        assert any(said.startswith("Add ") for said in events(release))
        release.upgrade(*EAGER, "router.config.maxQueued=512")
        assert replicas(release) == 3
    assert_nothing_was_lost(outcome)
    release.upgrade()
    wait_for("as it was", lambda: replicas(release) == 2, START_S)
