"""How tests get a running cluster: the fixtures `cluster` (one for the session) and `start_cluster`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.cluster import Cluster, run_cluster, running

# How long an example takes says more of what else the machine does than of what is tested.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

StartCluster = Callable[..., AbstractContextManager[Cluster]]


@pytest.fixture(scope="session")
def start_cluster(tmp_path_factory: pytest.TempPathFactory) -> StartCluster:
    """Starts clusters: `with start_cluster("--hybrid", "1", model=folder) as cluster: ...`.

    The arguments are flags of `baton up`; ports are free ones unless given; `environ` is added to the
    environment, which has no BATON_ variables otherwise but the one that has all KV verified.
    """

    def start(
        *flags: str, model: Path | str | None = None, environ: dict[str, str] | None = None
    ) -> AbstractContextManager[Cluster]:
        verified = {"BATON_KV_VERIFY": "true", **(environ or {})}
        return run_cluster(tmp_path_factory.mktemp("cluster"), *flags, model=model, environ=verified)

    return start


@pytest.fixture(scope="session")
def cluster(start_cluster: StartCluster) -> Iterator[Cluster]:
    """The session's cluster: the bundled model, one prefill and one decode worker. Leave it running."""
    with start_cluster() as up:
        yield up


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[Any]:
    """Show what running clusters said when a test fails."""
    report = yield
    if report.failed:
        for cluster in running:
            report.sections.append(("baton up", cluster.stdout + cluster.stderr))
            for name, text in cluster.logs().items():
                report.sections.append((f"{name}.log", "\n".join(text.splitlines()[-40:])))
    return report
