"""Do the examples in examples/ run as they are against a real cluster?"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import ROOT, Cluster

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """Where the Node example's packages are; `make test` brings them, this does without it."""
    folder = EXAMPLES / "node" / "node_modules"
    if not (folder / "@grpc" / "grpc-js").is_dir():
        subprocess.run(
            ["npm", "ci", "--no-audit", "--no-fund"], cwd=EXAMPLES / "node", check=True, timeout=300
        )
    return folder


def run(cluster: Cluster, *command: str) -> str:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "BASE_URL": cluster.base_url, "GRPC_ADDRESS": cluster.grpc_address},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_curl(cluster: Cluster) -> None:
    shown = run(cluster, "examples/curl.sh")
    assert '"baton-small"' in shown
    assert '"text_completion"' in shown
    assert shown.rstrip().endswith("data: [DONE]")


def test_openai_client(cluster: Cluster) -> None:
    shown = run(cluster, sys.executable, "examples/openai_client.py")
    assert "completion: " in shown
    assert "usage: " in shown


def test_python_grpc_client(cluster: Cluster) -> None:
    shown = run(cluster, sys.executable, "examples/grpc_client.py")
    assert shown.startswith("baton-small, up to ")
    assert "+ 24 tokens" in shown


def test_asyncio_grpc_client(cluster: Cluster) -> None:
    shown = run(cluster, sys.executable, "examples/grpc_client_async.py")
    assert shown.count(" -> ") == 3


def test_node_grpc_client(cluster: Cluster, node_modules: Path) -> None:
    shown = run(cluster, "node", "examples/node/client.js")
    assert shown.startswith("baton-small, up to ")
    assert "+ 24 tokens" in shown


def test_python_and_node_get_the_same_answer(cluster: Cluster, node_modules: Path) -> None:
    assert run(cluster, sys.executable, "examples/grpc_client.py") == run(
        cluster, "node", "examples/node/client.js"
    )
