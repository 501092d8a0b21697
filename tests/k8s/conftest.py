"""How tests get a release, on the cluster of KUBECONFIG with images that its nodes can start.

| variable | what |
|---|---|
| K8S_ROUTER_IMAGE, K8S_KVSTORE_IMAGE, K8S_WORKER_IMAGE | images as name:tag [baton-router:VERSION, ...] |
| K8S_PLANNER_IMAGE | likewise |
| K8S_NAMESPACE | a namespace that does not exist yet [baton-test-...] |
| K8S_VALUES | another values file, for pull secrets or node selectors |
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator

import pytest

from tests.k8s.release import COMPONENTS, Release

FIRST_TOKEN = pytest.StashKey[float]()


@pytest.fixture(scope="session")
def namespace() -> Iterator[str]:
    name = os.environ.get("K8S_NAMESPACE") or f"baton-test-{uuid.uuid4().hex[:6]}"
    cluster = Release("none", name)
    cluster.kubectl("create", "namespace", name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="session")
def release(namespace: str, pytestconfig: pytest.Config) -> Iterator[Release]:
    """The session's release: one prefill and one decode worker. Leave it as it was."""
    made = Release("trial-baton", namespace)
    made.start_client()
    began = time.monotonic()
    made.install()
    answer = made.execute("in_cluster_ask.py", made.address, "import os", "1")
    assert answer["status"] == 200, answer
    pytestconfig.stash[FIRST_TOKEN] = time.monotonic() - began
    yield made
    made.helm("uninstall", made.name, "--wait")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if (seconds := config.stash.get(FIRST_TOKEN, None)) is not None:
        terminalreporter.write_line(f"helm install to the first token through the Service: {seconds:.1f} s")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[object]:
    """Show what the pods said when a test fails."""
    report = yield
    release = getattr(item, "funcargs", {}).get("release")
    if report.failed and release is not None:  # type: ignore[attr-defined]
        for component in COMPONENTS:
            selector = f"app.kubernetes.io/instance={release.name},app.kubernetes.io/component={component}"
            log = release.kubectl("logs", "-l", selector, "--prefix", "--tail=40")
            report.sections.append((component, log))  # type: ignore[attr-defined]
        report.sections.append(("pods", release.kubectl("get", "pods", "-o", "wide")))  # type: ignore[attr-defined]
    return report
