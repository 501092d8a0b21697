"""What is wrong with a command's flags is said in a sentence, before any work is done."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from baton.cli.main import main

ONE = "--request-rate 1 --num-prompts 1"
PROFILE = "--profile distserve:opt-13b:1"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("bench --num-prompts 1", "--request-rate, --concurrency, or a --trace"),
        ("bench --request-rate 1 --concurrency 1 --num-prompts 1", "give one of them"),
        ("bench --request-rate -1 --num-prompts 1", "rates must be above 0"),
        ("bench --request-rate 1", "--num-prompts or --duration"),
        ("bench --trace /nowhere/trace.jsonl", "'/nowhere/trace.jsonl' does not exist"),
        (f"bench {ONE} --out /nowhere/a.json", "no folder '/nowhere'"),
        (f"bench {ONE} --html /nowhere/a.html", "no folder '/nowhere'"),
        ("profile --out /nowhere/a.json", "no folder '/nowhere'"),
        (f"plan {PROFILE} {ONE} --slo-ttft 1 --values /nowhere/a.yaml", "no folder '/nowhere'"),
        (f"plan {PROFILE} {ONE}", "--slo-ttft, --slo-tpot, or both"),
        (f"plan {PROFILE} {ONE} --slo-ttft 1 --block-size 24", "24 is not a power of two"),
        (f"simulate {PROFILE} --hybrid 1 {ONE} --block-size 24", "24 is not a power of two"),
        (f"simulate {PROFILE} {ONE}", "no worker that decodes"),
        ("keys new --api-keys keys.json --requests-per-minute -1", "-1 is not in the range"),
        ("keys new --api-keys keys.json --weight 0", "0.0 is not in the range"),
        ("up --decode some", "'some' is not a valid integer"),
        ("up --nothing", "--nothing"),
        ("top", "HOST:PORT"),
        ("chat --url nowhere", "must look like http://"),
    ],
)
def test_it_is_refused_with_status_2(command: str, words: str) -> None:
    ended = CliRunner().invoke(main, command.split())
    assert ended.exit_code == 2, ended.output
    complaint = ended.output.splitlines()[-1]
    assert complaint.startswith("Error: ")
    assert words in complaint
