"""The model the router fronts: its name, its limits, its tokenizer and its chat template."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.config import ModelSettings, ToolCallFormatName
from baton.errors import InvalidRequest, ModelNotFound
from baton.grammar.check import Checker
from baton.model_folder import CONFIG_PATTERNS, model_folder
from baton.models.config import read_config
from baton.openai.params import ModelLimits, check_prompt, check_prompt_length
from baton.openai.schema import Message, ToolCall
from baton.text import ChatTemplate, TemplateError, Tokenizer
from baton.text.tool_calls import ToolCallFormat, format_of

log = logging.getLogger(__name__)

# Tokenizing this much takes about as long as handing it to a thread and back is worth.
_INLINE_CHARACTERS = 16_384


@dataclass(frozen=True)
class ServedModel:
    """Read once at start. `created` is when, in Unix seconds; `grammars` is to be closed; `calls` is how the
    model writes calls of tools, None where that is not known or it is never told of any."""

    name: str
    limits: ModelLimits
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    calls: ToolCallFormat | None
    grammars: Checker
    created: int

    @classmethod
    def load(cls, settings: ModelSettings, tool_call_parser: ToolCallFormatName) -> ServedModel:
        """
        Raises:
            UnsupportedModel: the folder is missing or is no model baton can serve.
        """
        folder = model_folder(settings.model, CONFIG_PATTERNS)
        config = read_config(folder, settings.max_model_len)
        tokenizer = Tokenizer.load(folder)
        if tokenizer is None:
            log.warning("%s has no tokenizer.json: prompts must be token ids, answers have no text", folder)
        template = ChatTemplate.load(folder) if tokenizer is not None else None
        return cls(
            name=settings.served_model_name or Path(settings.model).expanduser().name,
            limits=ModelLimits(config.max_model_len, config.vocab_size, config.sampling),
            tokenizer=tokenizer,
            template=template,
            calls=_calls(template, tool_call_parser),
            grammars=Checker(folder / "tokenizer.json", config.vocab_size, config.eos_token_ids),
            created=int(time.time()),
        )

    def check_name(self, name: str | None) -> None:
        """
        Raises:
            ModelNotFound: `name` is given and is not this model's.
        """
        if name and name != self.name:
            raise ModelNotFound(
                f"model: {name!r} is not served here; this cluster serves {self.name!r}", field="model"
            )

    def require_tokenizer(self, field: str) -> Tokenizer:
        """
        Raises:
            InvalidRequest: the model has none, so `field` cannot be text.
        """
        if self.tokenizer is None:
            raise InvalidRequest(
                f"{field}: this model has no tokenizer, so text cannot be used; send token ids as `prompt`",
                field=field,
            )
        return self.tokenizer

    async def encode(
        self, text: str, field: str, limits: ModelLimits, *, add_special_tokens: bool
    ) -> list[int]:
        """The token ids of a prompt given as text in `field`, checked against `limits`.

        Raises:
            InvalidRequest: there is no tokenizer, or the prompt is empty or too long.
        """
        tokenizer = self.require_tokenizer(field)
        if not text:
            raise InvalidRequest(f"{field}: must not be empty", field=field)
        check_prompt_length(tokenizer.fewest_tokens(text), limits, field)
        token_ids = await self.tokenize(text, field, add_special_tokens=add_special_tokens)
        check_prompt(token_ids, limits, field)
        return token_ids

    async def tokenize(self, text: str, field: str, *, add_special_tokens: bool) -> list[int]:
        """The token ids of a text of any length; a long one is no other request's wait.

        Raises:
            InvalidRequest: there is no tokenizer.
        """
        tokenizer = self.require_tokenizer(field)
        if len(text) <= _INLINE_CHARACTERS:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool | None,
        variables: Mapping[str, Any] | None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The prompt of a chat, whose answer may call `tools`.

        Raises:
            InvalidRequest: there is no tokenizer or template, or the template refuses the chat.
        """
        self.require_tokenizer("messages")
        if self.template is None:
            raise InvalidRequest(
                "messages: this model has no chat template; use /v1/completions", field="messages"
            )
        plain = [_plain(at, message) for at, message in enumerate(messages)]
        try:
            return self.template.render(
                plain,
                add_generation_prompt=add_generation_prompt is not False,
                variables=variables,
                tools=tools,
            )
        except TemplateError as error:
            raise InvalidRequest(
                f"messages: the model's chat template refuses them: {error}", field="messages"
            ) from error


def _calls(template: ChatTemplate | None, setting: ToolCallFormatName) -> ToolCallFormat | None:
    if template is None or not template.takes_tools:
        log.info("the model has no chat template that takes tools: calls can be demanded, not chosen")
        return None
    calls = format_of(setting, template.tool_source)
    name = "none" if calls is None else calls.name
    why = "by the model's chat template" if setting == "auto" else "by --tool-call-parser"
    log.info("calls of tools are read as: %s, %s", name, why)
    return calls


def _plain(at: int, message: Message) -> dict[str, Any]:
    """A message as templates expect it: content is one string, the arguments of calls are objects."""
    if message.tool_calls and message.role != "assistant":
        field = f"messages[{at}].tool_calls"
        raise InvalidRequest(f"{field}: only an assistant calls tools", field=field)
    if (message.tool_call_id is not None) != (message.role == "tool"):
        field = f"messages[{at}].tool_call_id"
        raise InvalidRequest(f"{field}: goes with role tool, and only with it", field=field)
    content = message.content
    if content is None:
        if message.role != "assistant":
            field = f"messages[{at}].content"
            raise InvalidRequest(f"{field}: must be text, got null", field=field)
        content = ""
    if not isinstance(content, str):
        content = "\n".join(part.text for part in content)
    # OpenAI's newer name for the same role; templates know the older one.
    plain: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content,
    }
    if message.name is not None:
        plain["name"] = message.name
    if message.reasoning_content is not None:
        plain["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        plain["tool_calls"] = [_plain_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    return plain


def _plain_call(call: ToolCall) -> dict[str, Any]:
    arguments: object = call.function.arguments
    try:
        read = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):  # it is what a model wrote once
        read = None
    if isinstance(read, dict):
        arguments = read
    return {
        "id": call.id,
        "type": call.type,
        "function": {"name": call.function.name, "arguments": arguments},
    }
