"""Does `helm uninstall` leave anything behind?"""

from __future__ import annotations

from tests.k8s.release import KINDS, Release, wait_for


def test_uninstall_leaves_nothing(release: Release) -> None:
    second = Release("passing-baton", release.namespace)
    selector = f"app.kubernetes.io/instance={second.name}"
    second.install("prefill.replicas=0", "redis.url=redis://127.0.0.1:1", "planner.enabled=true")
    second.helm("test", second.name, "--timeout", "120s")
    assert second.objects(KINDS, "-l", selector)
    second.helm("uninstall", second.name, "--wait")
    wait_for("nothing is left", lambda: not second.objects(KINDS, "-l", selector))
