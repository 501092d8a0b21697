"""Do the committed gRPC stubs match the protos?"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_committed_stubs_are_what_the_protos_generate(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "protos" / "generate.py"), str(tmp_path)], check=True)
    committed = {path.name: path.read_text() for path in (ROOT / "baton/rpc/v1").glob("*.py*")}
    generated = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert generated == committed, "run `make protos` and commit what changed"
