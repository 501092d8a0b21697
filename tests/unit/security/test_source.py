"""What the source never does: run code that comes from data."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = ("baton", "services", "deploy", "protos", "charts", "benchmarks")

MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "_pickle", "code", "codeop"}
CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    ("torch", "load"),
    ("numpy", "load"),
    ("np", "load"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("os", "system"),
    ("os", "popen"),
    ("asyncio", "create_subprocess_shell"),
    ("tempfile", "mktemp"),
}
ARGUMENTS = {"trust_remote_code", "allow_pickle", "shell"}


def sources() -> list[Path]:
    return [path for folder in SHIPPED for path in sorted((ROOT / folder).rglob("*.py"))]


def offences(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names if name.name.split(".")[0] in MODULES)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in MODULES:
                yield module
            case ast.Call(func=ast.Name(id=name)) if name in CALLS:
                yield f"{name}()"
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if (owner, name) in ATTRIBUTES:
                yield f"{owner}.{name}"
            case ast.keyword(arg=str(name)) if name in ARGUMENTS:
                yield f"{name}="


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_unpickles_evaluates_or_trusts_remote_code(path: Path) -> None:
    assert list(offences(path.read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "exec(text)",
        "torch.load(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_the_scan_sees_what_it_looks_for(line: str) -> None:
    assert list(offences(line))


def test_model_templates_are_compiled_in_the_sandbox_alone() -> None:
    # The report of `baton bench` has a template of baton's own.
    assert _where("Environment(") == {"baton/text/chat.py", "baton/bench/html.py"}
    assert "ImmutableSandboxedEnvironment(" in (ROOT / "baton" / "text" / "chat.py").read_text()


def test_grpc_is_opened_in_one_place() -> None:
    assert _where("insecure_channel(") == {"baton/rpc/channels.py"}
    assert _where("secure_channel(") == {"baton/rpc/channels.py", "baton/security/identity.py"}
    assert _where("_port(") & _where("grpc.aio.server(") == {"baton/rpc/server.py"}
    assert _where("grpc.aio.server(") == {"baton/rpc/server.py"}


def _where(text: str) -> set[str]:
    """Files of the processes that hold `text`."""
    folders = ("baton", "services")
    return {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if text in path.read_text() and "rpc/v1" not in str(path)
    }
