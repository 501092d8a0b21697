"""Does the planner change numbers and roles of a real cluster's workers, within its rights and its budget?"""

from __future__ import annotations

from tests.k8s.release import START_S, Release, wait_for
from tests.k8s.test_changes import assert_nothing_was_lost

#: So little is too much that sixteen requests at a time are.
BUSY = ("planner.enabled=true", "planner.config.targetUtilization=0.05", "planner.config.planIntervalS=1")
#: Three workers are allowed.
EAGER = (*BUSY, "planner.config.budgetGpus=3", "planner.config.growAfterS=3")


def replicas(release: Release) -> int:
    return sum(len(release.pods(role)) for role in ("prefill", "decode"))


def events(release: Release) -> list[str]:
    found = release.objects("events", "--field-selector", "reportingComponent=baton-planner")
    return [str(event["message"]) for event in found]


def without_planner(release: Release) -> None:
    """As it was: workers that nobody lends another role return to that of their Deployment."""
    release.upgrade()
    wait_for("a decode worker", lambda: decoded_by(release).startswith(f"{release.name}-decode-"), START_S)


def test_a_dry_run_only_says_what_it_would_do(release: Release) -> None:
    with release.load(concurrency=16) as outcome:
        release.upgrade(*EAGER, "planner.config.dryRun=true")
        wait_for("an Event", lambda: any("would add" in said for said in events(release)), START_S)
        assert replicas(release) == 2
    assert_nothing_was_lost(outcome)
    release.upgrade()


def test_workers_come_up_to_the_budget_and_an_upgrade_leaves_them(release: Release) -> None:
    with release.load(concurrency=16) as outcome:
        release.upgrade(*EAGER)
        wait_for("a third worker", lambda: replicas(release) == 3, START_S)
        assert any(said.startswith("Add ") for said in events(release))
        release.upgrade(*EAGER, "router.config.maxQueued=512")
        assert replicas(release) == 3
    assert_nothing_was_lost(outcome)
    without_planner(release)
    wait_for("as it was", lambda: replicas(release) == 2, START_S)


def decoded_by(release: Release) -> str:
    """The pod that generates the tokens of a request now; none while no worker decodes."""
    answer = release.execute("in_cluster_ask.py", release.address, "import os", "8")
    return str(answer["headers"].get("x-baton-decode-worker", ""))


def test_a_prefill_worker_decodes_while_decoding_is_what_there_is_to_do(release: Release) -> None:
    release.upgrade("prefill.replicas=2")
    prefill = f"{release.name}-prefill-"
    with release.load(concurrency=16) as outcome:
        release.upgrade("prefill.replicas=2", *BUSY)
        wait_for("another role", lambda: decoded_by(release).startswith(prefill), START_S)
        assert any(said.startswith(f"Flip {prefill}") for said in events(release))
        assert len(release.pods("prefill")) == 2
    assert_nothing_was_lost(outcome)
    without_planner(release)
