"""Do upgrades, rollbacks and scaling cost no request?"""

from __future__ import annotations

from typing import Any

from tests.k8s.release import Release, wait_for


def assert_nothing_was_lost(outcome: dict[str, Any]) -> None:
    assert outcome["failed"] == []
    assert outcome["answered"] > 0
    # Whatever moved or was begun anew: the same prompt has the same answer.
    assert [prompt for prompt, texts in outcome["texts"].items() if len(texts) > 1] == []


def test_an_upgrade_and_its_rollback_lose_no_request(release: Release) -> None:
    before = {one["metadata"]["name"] for one in release.pods("decode")}
    # Another drain time is another pod template: both kinds of worker are replaced.
    values = ("decode.config.drainTimeoutS=25", "prefill.config.drainTimeoutS=25", "decode.replicas=2")
    release.upgrade("decode.replicas=2")
    with release.load() as outcome:
        release.upgrade(*values)
        during = {one["metadata"]["name"] for one in release.pods("decode")}
        assert before.isdisjoint(during)
        release.rollback()
    assert_nothing_was_lost(outcome)
    release.upgrade()


def test_scaling_down_drains(release: Release) -> None:
    release.upgrade("decode.replicas=2")
    with release.load() as outcome:
        release.kubectl("scale", f"deployment/{release.name}-decode", "--replicas=1")
        wait_for("one decode worker", lambda: len(release.objects("pods", "-l", _decode(release))) == 1)
    assert_nothing_was_lost(outcome)
    release.upgrade()


def _decode(release: Release) -> str:
    return f"app.kubernetes.io/instance={release.name},app.kubernetes.io/component=decode"
