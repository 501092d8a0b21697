"""Does `baton fetch` bring what a process needs of a model, once and whole?"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from baton.cli.fetch import fetch

MODEL = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": bytes(100_000),
    "pytorch_model.bin": b"pickled",
    "train.py": b"print()",
}


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    folder = tmp_path / "bucket"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "model.safetensors").write_bytes(b"older")
    for name, content in MODEL.items():
        (folder / name).write_bytes(content)
    return folder


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(fetch, arguments)
    return result.exit_code, result.output


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_worker_gets_weights_and_no_pickles(bucket: Path, tmp_path: Path) -> None:
    assert run(bucket.as_uri(), str(tmp_path / "to"))[0] == 0
    assert names(tmp_path / "to") == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (tmp_path / "to" / "model.safetensors").read_bytes() == MODEL["model.safetensors"]


def test_a_router_gets_no_weights(bucket: Path, tmp_path: Path) -> None:
    assert run(bucket.as_uri(), str(tmp_path / "to"), "--config-only")[0] == 0
    assert names(tmp_path / "to") == {"config.json", "tokenizer.json"}


def test_only_what_changed_is_copied_again(bucket: Path, tmp_path: Path) -> None:
    run(bucket.as_uri(), str(tmp_path / "to"))
    (bucket / "model.safetensors").write_bytes(bytes([1]) * 100_000)  # as long as before
    os.utime(bucket / "model.safetensors", (2_000_000_000, 2_000_000_000))
    status, output = run(bucket.as_uri(), str(tmp_path / "to"))
    assert status == 0
    assert [line for line in output.splitlines() if " MB" in line] == ["model.safetensors: 0.1 MB"]
    assert (tmp_path / "to" / "model.safetensors").read_bytes() == bytes([1]) * 100_000


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    status, output = run((tmp_path / "empty").as_uri(), str(tmp_path / "to"))
    assert status == 1
    assert "config.json" in output


@pytest.mark.parametrize("source", ["ftp://host/model", "nonsense"])
def test_a_source_of_another_kind_is_named(source: str, tmp_path: Path) -> None:
    status, output = run(source, str(tmp_path / "to"))
    assert status == 1
    assert source in output
