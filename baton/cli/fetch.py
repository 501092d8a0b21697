"""`baton fetch`: copy a model from where it is published into a folder, before processes start."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

import click
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from baton.errors import BatonError
from baton.model_folder import CONFIG_PATTERNS, PATTERNS

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

FETCH_EXTRA = "models in buckets need obstore: pip install 'baton-serve[fetch]'"
_HUGGING_FACE = "hf://"


@click.command(short_help="Copy a model from a hub or a bucket.")
@click.argument("source")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--config-only", is_flag=True, help="leave the weights out: a router needs none")
def fetch(source: str, folder: Path, config_only: bool) -> None:
    """Copy the model at SOURCE into FOLDER: configuration, tokenizer and safetensors.

    SOURCE is hf://ORG/NAME[@REVISION], or a folder in a bucket: s3://BUCKET/FOLDER, gs:// or az://.
    Credentials come from the variables that Hugging Face and the clouds' own tools read. What is
    there and unchanged stays; several may fetch into one folder at the same time.
    """
    patterns = CONFIG_PATTERNS if config_only else PATTERNS
    try:
        if source.startswith(_HUGGING_FACE):
            _from_hugging_face(source.removeprefix(_HUGGING_FACE), folder, patterns)
        else:
            _from_bucket(source, folder, patterns)
    except BatonError as error:
        raise click.ClickException(error.message) from error


def _from_hugging_face(name: str, folder: Path, patterns: Sequence[str]) -> None:
    name, _, revision = name.partition("@")
    try:
        snapshot_download(name, revision=revision or None, local_dir=folder, allow_patterns=list(patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BatonError(f"hf://{name}: {_first_line(error)}") from error
    click.echo(f"hf://{name} is in {folder}")


def _from_bucket(source: str, folder: Path, patterns: Sequence[str]) -> None:
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError as error:
        raise BatonError(FETCH_EXTRA) from error
    try:
        store = from_url(source)
        found = [
            item
            for item in store.list_with_delimiter()["objects"]
            if any(fnmatch(item["path"], pattern) for pattern in patterns)
        ]
        if not any(item["path"] == "config.json" for item in found):
            raise BatonError(f"{source}: no config.json there, so no model in Hugging Face layout")
        folder.mkdir(parents=True, exist_ok=True)
        for item in found:
            _copy(store, item, folder)
    except (BaseError, ValueError, OSError) as error:
        raise BatonError(f"{source}: {_first_line(error)}") from error
    click.echo(f"{source} is in {folder}")


def _copy(store: ObjectStore, item: ObjectMeta, folder: Path) -> None:
    """Have `item` in `folder`, whole or not at all; size and time say whether it is there already."""
    target, modified = folder / item["path"], item["last_modified"].timestamp()
    if target.exists():
        there = target.stat()
        if (there.st_size, there.st_mtime) == (item["size"], modified):
            return
    click.echo(f"{item['path']}: {item['size'] / 1e6:.1f} MB")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as scratch:
        part = Path(scratch) / target.name
        with part.open("wb") as file:
            for chunk in store.get(item["path"]).stream():
                file.write(chunk)
        os.utime(part, (modified, modified))
        part.replace(target)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
