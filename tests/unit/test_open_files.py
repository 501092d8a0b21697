"""May a process hold many connections, whatever the shell that started it allows?"""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource, sys
from baton.process import allow_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, tuple(json.loads(sys.argv[1])))
allow_open_files()
print(json.dumps(resource.getrlimit(resource.RLIMIT_NOFILE)))
"""


@pytest.mark.parametrize(
    ("limits", "raised"),
    [((256, 1024), 1024), ((256, None), 65_536), ((None, None), None)],
    ids=["up to the hard limit", "as far as is wanted", "never lowered"],
)
def test_the_limit_of_open_files_is_raised(limits: tuple[int | None, int | None], raised: int | None) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (most if limit is None else limit for limit in limits)
    command = [sys.executable, "-c", PROGRAM, json.dumps([soft, hard])]
    told = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    assert told == [most if raised is None else min(raised, hard), hard]
