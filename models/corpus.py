"""Which text do the bundled models learn from, and which part of it is held out?

Everything comes from the running interpreter: the standard library's Python sources, the language
reference that `help()` ships (`pydoc_data.topics`), and the docstrings of modules written in C.
"""

import ast
import hashlib
import importlib
import inspect
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Tests and generated tables would be more than half of the bytes, and almost none of the English.
_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__", "dist-packages", "encodings", "ensurepip", "idle_test", "idlelib",
        "lib2to3", "lib-dynload", "pydoc_data", "site-packages", "test", "tests", "tkinter",
        "turtledemo",
    }
)  # fmt: skip
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")
_C_MODULES = (
    "array", "binascii", "bisect", "builtins", "cmath", "collections", "datetime", "functools",
    "gc", "heapq", "itertools", "marshal", "math", "operator", "os", "random", "select", "socket",
    "struct", "sys", "time", "unicodedata", "zlib",
)  # fmt: skip
_HELD_OUT_ONE_IN = 25


@dataclass(frozen=True)
class Document:
    """One text of the corpus.

    `name` identifies it on every machine: a path relative to the standard library
    (`json/decoder.py`), `topics/<title>` for a chapter of the language reference, or
    `c/<module>.<name>` for the docstring of something written in C.
    """

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether no training step may see this text; decided by the name alone."""
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:8], "big") % _HELD_OUT_ONE_IN == 0


def source_documents() -> list[Document]:
    """Every Python file of the standard library that holds prose or code worth learning."""
    root = Path(sysconfig.get_path("stdlib"))
    return [
        Document(path.relative_to(root).as_posix(), text)
        for path in sorted(root.rglob("*.py"))
        if not _skipped(path.relative_to(root)) and (text := _read(path)) is not None
    ]


def topic_documents() -> list[Document]:
    """The chapters of the language reference, one document each, as reStructuredText."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return [Document(f"topics/{title}", text) for title, text in sorted(topics.items())]


def c_docstrings() -> list[Document]:
    """Docstrings of public names whose implementation is C and so has no source file here."""
    return [
        Document(f"c/{qualified}", inspect.cleandoc(doc))
        for module_name in _C_MODULES
        for qualified, doc in _documented_in_c(module_name)
    ]


def _documented_in_c(module_name: str) -> Iterator[tuple[str, str]]:
    prefix = "" if module_name == "builtins" else f"{module_name}."
    module = importlib.import_module(module_name)
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or not callable(value):
            continue
        if inspect.isbuiltin(value) and value.__doc__:
            yield prefix + name, value.__doc__
        if inspect.isclass(value) and not _has_source(value) and value.__doc__:
            yield prefix + name, value.__doc__
            for method_name, method in sorted(vars(value).items()):
                public = not method_name.startswith("_")
                if public and inspect.ismethoddescriptor(method) and method.__doc__:
                    yield f"{prefix}{name}.{method_name}", method.__doc__


def _has_source(value: type) -> bool:
    try:
        return inspect.getsourcefile(value) is not None
    except TypeError:
        return False


def _skipped(path: Path) -> bool:
    return any(part in _SKIPPED_FOLDERS or part.startswith(_SKIPPED_PREFIXES) for part in path.parts)


def _read(path: Path) -> str | None:
    """The file's text; None for a file that is not valid Python, which some fixtures are not."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
        ast.parse(text)
    except (SyntaxError, UnicodeDecodeError):
        return None
    return text if text.strip() else None
