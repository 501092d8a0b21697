"""A model folder from a stranger is refused or harmless: nothing in it is ever run or followed outside."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from baton.errors import UnsupportedModel
from baton.models.loader import load_model
from baton.text import ChatTemplate, TemplateError, Tokenizer

TINY = Path(__file__).resolve().parents[3] / "models" / "baton-tiny"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


@pytest.fixture
def struck(tmp_path: Path) -> Path:
    """A file that is there once hostile code has run."""
    return tmp_path / "struck"


def unpickles_to(struck: Path) -> bytes:
    """A pickle, protocol 0, that writes a file when it is loaded."""
    return f"cbuiltins\nexec\n(Vopen({str(struck)!r}, 'w').close()\ntR.".encode()


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_never_opened(folder: Path, struck: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(unpickles_to(struck))
    with pytest.raises(UnsupportedModel, match="only safetensors"):
        load_model(folder, "cpu")
    assert not struck.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pickle_by_another_name_is_not_unpickled(folder: Path, struck: Path, name: str) -> None:
    (folder / name).write_bytes(unpickles_to(struck))
    with pytest.raises(UnsupportedModel):
        Tokenizer.load(folder)
        load_model(folder, "cpu")
    assert not struck.exists()


def test_code_beside_the_weights_is_never_imported(folder: Path, struck: Path) -> None:
    code = f"open({str(struck)!r}, 'w').close()\n"
    for name in ("modeling_evil.py", "tokenization_evil.py", "__init__.py", "sitecustomize.py"):
        (folder / name).write_text(code)
    load_model(folder, "cpu")
    change_config(
        folder,
        architectures=["EvilForCausalLM"],
        auto_map={"AutoModelForCausalLM": "modeling_evil.EvilForCausalLM", "AutoConfig": "modeling_evil.C"},
    )
    with pytest.raises(UnsupportedModel, match="EvilForCausalLM"):
        load_model(folder, "cpu")
    assert not struck.exists()


@pytest.mark.parametrize(
    "name", ["../elsewhere.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "weights.bin"]
)
def test_an_index_leads_nowhere_outside_the_folder(folder: Path, name: str) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedModel, match="no safetensors file beside it"):
        load_model(folder, "cpu")


def _header(claims: object) -> bytes:
    text = json.dumps(claims).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        _header({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}}) + b"\x00" * 16,
        _header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**50]}}),
        _header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}) + b"\x00" * 16,
        struct.pack("<Q", 200_000) + b"[" * 200_000,
    ],
)
def test_weights_that_lie_about_themselves_are_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UnsupportedModel, match="not a readable safetensors file"):
        load_model(folder, "cpu")


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "[" * 200_000, '{"architectures":' + "[" * 200_000, "\x00", '{"a": 1e999}']
)
def test_a_config_that_is_none_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(UnsupportedModel):
        load_model(folder, "cpu")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch STRUCK') }}",
        "{{ self.__init__.__globals__.__builtins__.open('STRUCK', 'w') }}",
        "{{ raise_exception.__globals__['jinja2'].os.system('touch STRUCK') }}",
        "{{ messages.append({'role': 'system', 'content': 'x'}) }}",
        "{{ ('%s' | format).__globals__ }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.system('touch STRUCK') }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(struck: Path, template: str) -> None:
    messages = [{"role": "user", "content": "Hi"}]

    def render() -> str:
        return ChatTemplate(template.replace("STRUCK", str(struck)), {}).render(messages)

    _raises(render)
    assert not struck.exists()
    assert len(messages) == 1


def test_what_a_client_says_is_never_a_template(struck: Path) -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    said = "{{ 7 * 7 }}{% for x in ().__class__.__mro__ %}{% endfor %}"
    assert template.render([{"role": "user", "content": said}], variables={"extra": said}) == said


def _raises(render: Callable[[], str]) -> None:
    with pytest.raises((TemplateError, UnsupportedModel)):
        render()
