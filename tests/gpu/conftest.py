"""Tests that need an NVIDIA GPU. `make test-gpu` runs them; nothing else collects this folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# The reference models and the driver that CPU tests use.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "unit" / "models"))


def pytest_sessionstart() -> None:
    if not torch.cuda.is_available():
        raise pytest.UsageError("tests/gpu needs an NVIDIA GPU and torch sees none; `baton doctor` says why")
