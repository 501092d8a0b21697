"""Where on this machine is the folder of the model that `--model` names?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from baton.errors import UnsupportedModel

CONFIG_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model")
"""Files of a model that a process without weights needs."""

PATTERNS = (*CONFIG_PATTERNS, "*.safetensors")
"""Files of a model that a worker needs."""


def model_folder(model: str, patterns: Sequence[str] = PATTERNS) -> Path:
    """The folder with config.json, tokenizer and weights; downloads a Hugging Face id on first use.

    Args:
        patterns: which files of a Hugging Face id to download.

    Raises:
        UnsupportedModel: there is no such folder, and no such id either or no way to get it.
    """
    if not model:
        raise UnsupportedModel("no model: give --model a folder in Hugging Face layout or a Hugging Face id")
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UnsupportedModel(f"--model {model}: the folder has no config.json")
        return folder.resolve()
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UnsupportedModel(f"--model {model}: there is no such folder")
    return _download(model, patterns)


def _download(model: str, patterns: Sequence[str]) -> Path:
    # Here, not above: it takes a process half a second to import, and most have a folder.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModel(
            f"--model {model}: not a folder here, and it could not be had from Hugging Face: {first}"
        ) from error


def has_chat_template(folder: Path) -> bool:
    """Whether the model in `folder` can be asked with chat messages."""
    if (folder / "chat_template.jinja").is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(json.loads(config.read_text()).get("chat_template"))
