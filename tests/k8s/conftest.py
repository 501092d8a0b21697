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
from collections.abc import Generator, Iterator

import pytest

from tests.k8s.release import COMPONENTS, Release

FIRST_TOKEN = pytest.StashKey[float]()
RELEASE = pytest.StashKey[Release]()


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
    made = pytestconfig.stash[RELEASE] = Release("trial-baton", namespace)
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
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the pods said when a test fails, also one whose release never came up."""
    report = yield
    release = item.config.stash.get(RELEASE, None)
    if report.failed and release is not None:
        for component in COMPONENTS:
            selector = f"app.kubernetes.io/instance={release.name},app.kubernetes.io/component={component}"
            log = ("logs", "-l", selector, "--all-containers", "--prefix", "--tail=40", "--ignore-errors")
            report.sections.append((component, release.kubectl(*log)))
        report.sections.append(("pods", release.kubectl("get", "pods", "-o", "wide")))
        report.sections.append(("events", release.kubectl("get", "events", "--sort-by=.lastTimestamp")))
    return report
