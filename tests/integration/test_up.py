"""Does `baton up` bring up a cluster that works, say plainly why it cannot, and leave nothing behind?"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest

from baton.machine import own_cores
from tests.cluster import ROOT, UP, Cluster
from tests.conftest import StartCluster
from tests.integration.cluster_state import until


def segments_made_by(pids: Iterable[int]) -> list[str]:
    """System V segments that the processes made."""
    makers = {str(pid) for pid in pids}
    segments = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    return [line for line in segments if line.split()[4] in makers]


def shared_files_of(pids: Iterable[int]) -> set[Path]:
    """Files of shared memory that the processes use."""
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in pids)
    return set(map(Path, re.findall(r"/dev/shm/\S+", maps)))


def paste(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)


def curl_of(cluster: Cluster) -> str:
    """The command that `baton up` prints to paste."""
    printed = cluster.stdout
    return printed[printed.index("curl ") : printed.index("\n\n", printed.index("curl "))]


def assert_answers(cluster: Cluster) -> None:
    answer = paste(curl_of(cluster))
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.rstrip().endswith("data: [DONE]"), answer.stdout


def refused(*flags: str, environ: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit status and complaint of a `baton up` that must not come up."""
    done = subprocess.run(
        [*UP, "--port", "0", "--grpc-port", "0", *flags],
        env={**os.environ, **(environ or {})},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_a_newcomer_gets_a_table_a_curl_that_works_and_a_clean_stop(start_cluster: StartCluster) -> None:
    with start_cluster() as cluster:
        pids = cluster.pids()
        assert set(pids) == {"router", "kvstore", "prefill-0", "decode-0"}
        rows = {line.split()[0]: line for line in cluster.stdout.splitlines() if line.strip()}
        for name, pid in pids.items():
            assert str(pid) in rows[name]
            assert f"/{name}.log" in rows[name]
        assert set(cluster.workers()) == {"prefill-0", "decode-0"}
        if len(own_cores()) > 1:
            prefill, decode = (set(psutil.Process(pids[n]).cpu_affinity()) for n in ("prefill-0", "decode-0"))
            assert not prefill & decode, "each worker has cores of its own"
        assert cluster.workers()["decode-0"] in rows["decode-0"]
        assert_answers(cluster)
        shared = shared_files_of(pids.values())

        assert cluster.stop(signal.SIGINT) == 0
        assert not [pid for pid in pids.values() if psutil.pid_exists(pid)]
        assert list(cluster.folder.glob("baton-*")) == [], "its temporary folder is gone"
        assert segments_made_by(pids.values()) == []
        assert not [path for path in shared if path.exists()]
        with pytest.raises(ConnectionRefusedError):
            host, port = cluster.base_url.removeprefix("http://").split(":")
            socket.create_connection((host, int(port)), timeout=60)


def test_workers_that_die_come_back_and_nothing_outlives_a_killed_parent(start_cluster: StartCluster) -> None:
    with start_cluster("--hybrid", "1") as cluster:
        first = cluster.pids()
        assert set(first) == {"router", "kvstore", "hybrid-0"}, "--hybrid alone means no other workers"
        os.kill(first["hybrid-0"], signal.SIGKILL)
        until(lambda: "hybrid-0 is ready again" in cluster.stderr, "the worker is back")
        assert "hybrid-0 died (killed by SIGKILL)" in cluster.stderr
        assert cluster.pids()["hybrid-0"] != first["hybrid-0"]
        until(
            lambda: paste(f"curl -fs {cluster.base_url}/ready").returncode == 0, lambda: "the router is ready"
        )
        assert_answers(cluster)

        last = cluster.pids()
        cluster.process.kill()
        until(lambda: not any(map(psutil.pid_exists, last.values())), "every process of it is gone")


def test_several_routers_are_one_front_and_each_can_be_asked(start_cluster: StartCluster) -> None:
    with start_cluster("--hybrid", "1", "--routers", "2") as cluster:
        pids = {name: pid for name, pid in cluster.pids().items() if name.startswith("router")}
        assert len(pids) == 2
        for name, pid in pids.items():
            own = f"127.0.0.1:{name.split()[1]}"
            assert f"{own} (metrics)" in cluster.stdout
            assert str(pid) in cluster.stdout
            assert paste(f"curl -fs http://{own}/ready").returncode == 0
        port = cluster.base_url.rpartition(":")[2]
        status, said = refused("--port", port, "--routers", "2")
        assert (status, f"port {port} on 127.0.0.1 is in use" in said) == (1, True), said

        killed = psutil.Process(next(iter(pids.values())))
        killed.kill()
        killed.wait(60)  # until then the kernel may give it connections
        assert_answers(cluster)
        until(lambda: "is ready again" in cluster.stderr, "the router is back")
        assert_answers(cluster)


@pytest.mark.parametrize(
    ("flags", "status", "complaint"),
    [
        (["--prefill", "-1"], 2, "--prefill"),
        (["--device", "tpu"], 2, "--device"),
        (["--block-size", "x"], 2, "--block-size"),
        (["--prefil", "1"], 2, "--prefil"),
        (["--decode", "0"], 1, "--decode"),
        (["--model", "/nowhere/model"], 1, "/nowhere/model"),
        (["--model", str(ROOT / "docs")], 1, "config.json"),
        (["--kv-bytes", str(1 << 50)], 1, "too little memory"),
        (["--host", "192.0.2.1"], 1, "--port"),
    ],
)
def test_a_bad_flag_is_refused_in_a_sentence(
    flags: list[str], status: int, complaint: str, tmp_path: Path
) -> None:
    found, said = refused(*flags, environ={"TMPDIR": str(tmp_path)})
    assert (found, complaint in said) == (status, True), said
    assert list(tmp_path.iterdir()) == []


def test_a_taken_port_is_named_with_its_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flag in ("--port", "--grpc-port"):
            status, said = refused(flag, str(port))
            assert status == 1
            assert f"port {port}" in said
            assert flag in said


def test_what_a_worker_refuses_is_repeated_and_leaves_nothing(tmp_path: Path) -> None:
    status, said = refused("--block-size", "24", environ={"TMPDIR": str(tmp_path)})
    assert status == 1
    assert "block" in said
    assert len(said.strip().splitlines()) == 1, said
    assert list(tmp_path.iterdir()) == []


def test_logs_are_kept_when_asked_for(start_cluster: StartCluster) -> None:
    with start_cluster("--hybrid", "1", "--keep-logs") as cluster:
        assert cluster.stop(signal.SIGTERM) == 0
        assert set(cluster.logs()) == {"router", "kvstore", "hybrid-0"}
        assert "logs are kept in" in cluster.stderr
