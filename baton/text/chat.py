"""How a chat becomes the prompt its model was trained on: the model's own Jinja template, sandboxed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import orjson
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.errors import UnsupportedModel

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TemplateError(Exception):
    """The template refuses this chat; the message is the template author's or Jinja's."""


class _GenerationTag(jinja2.ext.Extension):
    """Accepts `{% generation %}...{% endgeneration %}`, which marks the assistant's part for training."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class ChatTemplate:
    """One compiled template, or one for chats with tools too, and the special tokens they may mention.

    `tool_source` is what chats with tools are rendered from, and `takes_tools` whether it looks at them.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], tool_source: str | None = None
    ) -> None:
        """
        Raises:
            UnsupportedModel: the template is not valid Jinja.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            self.tool_source = tool_source or source
            self._tool_template = environment.from_string(self.tool_source)
            mentioned = jinja2.meta.find_undeclared_variables(environment.parse(self.tool_source))
        except jinja2.TemplateError as error:
            raise UnsupportedModel(f"the model's chat template is not valid Jinja: {error}") from error
        self.takes_tools = "tools" in mentioned
        self._special_tokens = dict(special_tokens)

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """The template of a model folder, or None when it has none.

        `chat_template.jinja` wins over the entry of tokenizer_config.json; of several named templates
        there, the one named default is taken, and the one named tool_use for chats with tools.

        Raises:
            UnsupportedModel: a file is there and cannot be read.
        """
        config = _read_json(folder / "tokenizer_config.json")
        source, tool_source = config.get("chat_template"), None
        if isinstance(source, list):
            named = {entry["name"]: entry["template"] for entry in source}
            source, tool_source = named.get("default"), named.get("tool_use")
        file = folder / "chat_template.jinja"
        if file.is_file():
            source, tool_source = file.read_text(encoding="utf-8"), None
        if not source:
            return None
        special_tokens = _special_tokens({**_read_json(folder / "special_tokens_map.json"), **config})
        return cls(source, special_tokens, tool_source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt of a chat, whose answer may call `tools`. `variables` are further names the template may
        ask for.

        Raises:
            TemplateError: the template refuses the chat.
        """
        # Templates are written for transformers, where tools are there and None if there are none.
        names = {**self._special_tokens, "tools": None, **(variables or {})}
        names.update(messages=messages, add_generation_prompt=add_generation_prompt)
        template = self._template
        if tools:
            names["tools"], template = tools, self._tool_template
        try:
            return template.render(names)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise TemplateError(str(error)) from error
        except RecursionError as error:
            raise TemplateError("nested too deeply") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise UnsupportedModel(f"{path} is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name; a file may give one as a string or as an object with `content`."""
    tokens = {}
    for name in _SPECIAL_TOKENS:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(value: object, indent: int | None = None, sort_keys: bool = False) -> str:
    """Unlike Jinja's own, without escaping for HTML: the result is a prompt."""
    return json.dumps(value, ensure_ascii=False, indent=indent, sort_keys=sort_keys)
