"""Do chat, config, doctor and the process commands work as a user types them, with torch and without?"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.cluster import ROOT, Cluster

BATON = (sys.executable, "-m", "baton.cli.main")

# Runs a module as `python -m` does, in an interpreter where torch and NIXL are not installed.
WITHOUT_TORCH = (
    "import runpy, sys\n"
    "sys.modules.update(dict.fromkeys(('torch', 'nixl', 'safetensors')))\n"
    "sys.argv = sys.argv[1:]\n"
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
)


def run(*command: str, stdin: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env={**os.environ, **environ},
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_chat_streams_one_answer(cluster: Cluster) -> None:
    done = run(*BATON, "chat", "What does a list do?", "--url", cluster.base_url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_chat_holds_a_conversation(cluster: Cluster) -> None:
    done = run(*BATON, "chat", stdin="What is a list?\n\nAnd a tuple?\n", BATON_URL=cluster.base_url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("baton-small at ")
    assert done.stdout.count("\n> ") == 4, "three lines and the end of input"


def test_an_interrupt_stops_the_answer_and_not_the_conversation(cluster: Cluster) -> None:
    chat = subprocess.Popen(
        [*BATON, "chat", "--url", cluster.base_url],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    assert chat.stdin is not None
    assert chat.stdout is not None
    try:
        shown = b""
        chat.stdin.write(b"Write a long story.\n")
        while len(shown.partition(b"\n> ")[2]) < 10:
            shown += chat.stdout.read(1)
        chat.send_signal(signal.SIGINT)
        while shown.count(b"\n> ") < 2:
            shown += chat.stdout.read(1)
        chat.stdin.close()
        assert chat.wait(60) == 0
    finally:
        chat.kill()
        chat.wait()
        chat.stdout.close()
    deadline = time.monotonic() + 30
    while cluster.status("decode-0").load.running:
        assert time.monotonic() < deadline, "the interrupted answer is still being computed"
        time.sleep(0.05)


def test_chat_says_that_no_cluster_runs() -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    done = run(*BATON, "chat", "hello", "--url", f"http://127.0.0.1:{port}")
    assert done.returncode == 1
    assert "baton up" in done.stderr
    assert "Traceback" not in done.stderr


def test_config_says_where_each_value_came_from() -> None:
    done = run(*BATON, "config", "--decode", "3", "--json", BATON_GRPC_PORT="50099")
    shown = json.loads(done.stdout)
    assert (shown["decode"]["value"], shown["decode"]["source"]) == (3, "flag --decode")
    assert (shown["grpc_port"]["value"], shown["grpc_port"]["source"]) == (50099, "env BATON_GRPC_PORT")
    assert shown["policy"]["source"] == "default"
    table = run(*BATON, "config", "--decode", "3").stdout
    assert "flag --decode" in table


def test_config_hides_passwords() -> None:
    for form in ((), ("--json",)):
        shown = run(*BATON, "config", *form, BATON_REDIS="redis://user:hunter2@127.0.0.1:6379/0").stdout
        assert "hunter2" not in shown
        assert "127.0.0.1:6379" in shown


def test_doctor_finds_this_machine_fit() -> None:
    done = run(*BATON, "doctor", "--port", "0", "--grpc-port", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    for subject in ("Python", "torch", "NIXL", "NIXL read", "shared memory", "open files", "GPU", "model"):
        assert f" {subject} " in done.stdout
    assert "GB/s" in done.stdout


def test_doctor_fails_on_what_is_required_and_says_what_to_do() -> None:
    done = run(sys.executable, "-c", WITHOUT_TORCH, "baton.cli.main", "doctor", "--model", "/nowhere/model")
    assert done.returncode == 1
    assert "/nowhere/model" in done.stdout
    assert "→" in done.stdout


def test_doctor_works_in_the_base_install() -> None:
    done = run(sys.executable, "-c", WITHOUT_TORCH, "baton.cli.main", "doctor", "--model", "")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "base install" in done.stdout


def test_up_says_what_the_base_install_lacks() -> None:
    done = run(sys.executable, "-c", WITHOUT_TORCH, "baton.cli.main", "up")
    assert done.returncode == 1
    assert "baton-serve[worker]" in done.stderr


@pytest.mark.parametrize("module", ["baton.cli.main", "services.router", "services.kvstore"])
def test_the_base_install_runs_without_torch(module: str) -> None:
    done = run(sys.executable, "-c", WITHOUT_TORCH, module, "--help")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["router", "kvstore", "prefill", "decode", "worker"])
def test_each_process_has_a_command(name: str) -> None:
    done = run(*BATON, name, "--help")
    assert done.returncode == 0, done.stderr
    assert "--log-level" in done.stdout
