"""Are the compiled kernels optional, and compiled once?"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from baton.models import native


def test_without_a_compiler_torch_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    assert native.library.__wrapped__() is None


def test_a_compiler_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    assert native.library.__wrapped__() is None
    assert list((tmp_path / "baton").iterdir()) == []


def test_shipped_kernels_are_used_where_the_processor_can_run_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shipped = tmp_path / "native.so"
    shipped.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_shipped", lambda: shipped)
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setattr(native, "_processor", lambda: b"flags: " + b" ".join(native._NEEDED))
    assert native._compiled() == shipped
    monkeypatch.setattr(native, "_processor", lambda: b"flags: avx512f")
    with pytest.raises(subprocess.CalledProcessError):
        native._compiled()
