"""Calls of functions in what a model writes: how each format is parsed, constrained and chosen."""

from baton.text.tool_calls.formats import FORMATS, ToolCallFormat, format_of
from baton.text.tool_calls.hermes import Hermes
from baton.text.tool_calls.llama3_json import Llama3Json
from baton.text.tool_calls.mistral import Mistral
from baton.text.tool_calls.parser import Arguments, Call, Content, Part, ToolCallParser
from baton.text.tool_calls.rules import Function, literal

__all__ = [
    "FORMATS",
    "Arguments",
    "Call",
    "Content",
    "Function",
    "Hermes",
    "Llama3Json",
    "Mistral",
    "Part",
    "ToolCallFormat",
    "ToolCallParser",
    "format_of",
    "literal",
]
