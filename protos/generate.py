"""How the stubs in baton/rpc/v1 are made from protos/baton/v1: `python protos/generate.py [OUT_DIR]`."""

import re
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent
STUBS = PROTOS.parent / "baton" / "rpc" / "v1"


def generate(out: Path) -> None:
    """Write `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` for every proto into the folder `out`.

    protoc derives Python module names from proto paths (`baton.v1`); the imports are rewritten so
    that the stubs live in `baton.rpc.v1` while the wire names stay `baton.v1`.

    Raises:
        SystemExit: protoc refused a proto; its message is on stderr.
    """
    sources = sorted((PROTOS / "baton" / "v1").glob("*.proto"))
    include = resources.files("grpc_tools") / "_proto"
    with tempfile.TemporaryDirectory() as scratch:
        status = protoc.main(
            [
                "protoc",
                f"-I{PROTOS}",
                f"-I{include}",
                f"--plugin=protoc-gen-mypy={Path(sys.executable).parent / 'protoc-gen-mypy'}",
                f"--python_out={scratch}",
                f"--mypy_out={scratch}",
                f"--grpc_python_out={scratch}",
                *map(str, sources),
            ]
        )
        if status != 0:
            raise SystemExit(status)
        out.mkdir(parents=True, exist_ok=True)
        (out / "__init__.py").write_text('"""Generated from protos/baton/v1 by `make protos`."""\n')
        for stub in sorted((Path(scratch) / "baton" / "v1").iterdir()):
            text = re.sub(r"\bbaton\.v1( import|\.\w+_pb2)", r"baton.rpc.v1\1", stub.read_text())
            (out / stub.name).write_text(text)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else STUBS)
