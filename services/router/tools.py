"""What a chat's tools come to with the model that is served: how it calls them, and what holds it to that."""

from __future__ import annotations

from baton.errors import InvalidRequest
from baton.openai.schema import ChatRequest
from baton.openai.tools import call_constraint, may_call, must_call, parts_of
from baton.text.tool_calls import Llama3Json, ToolCallFormat, literal
from services.router.model import ServedModel


def calls_of(request: ChatRequest, model: ServedModel) -> ToolCallFormat | None:
    """How the calls that the answer may or must have are written; None where it has none.

    Raises:
        InvalidRequest: the model is not told of the tools, or what it would answer could not be read.
    """
    if not may_call(request):
        return None
    if model.calls is not None:
        return model.calls
    if must_call(request):
        return Llama3Json  # as plain as can be: the answer is held to it, so the model need not know it
    takes_tools = model.template is not None and model.template.takes_tools
    why = "calls are not read here (--tool-call-parser)" if takes_tools else "the chat template takes none"
    raise InvalidRequest(
        f"tools: {why}, so the model cannot be left the choice; set tool_choice to required or to a function",
        field="tools",
    )


def shown_tokens(calls: ToolCallFormat | None, model: ServedModel) -> frozenset[int]:
    """The special tokens that are marks of calls."""
    if calls is None or model.tokenizer is None:
        return frozenset()
    ids = map(model.tokenizer.special_id, calls.marks)
    return frozenset(token_id for token_id in ids if token_id is not None)


async def call_grammar(request: ChatRequest, calls: ToolCallFormat, model: ServedModel) -> str:
    """What the answer of a chat with tools must match, in the form that workers take; empty if nothing.

    Raises:
        InvalidRequest: naming the field that cannot be kept to.
        Overloaded: too many others wait for the same.
    """
    tokenizer = model.require_tokenizer("tools")

    def mark(text: str) -> str:
        token_id = tokenizer.special_id(text)  # matched by its id alone, never by its text
        return literal(text) if token_id is None else f"<[{token_id}]>"

    whole = call_constraint(request, calls, mark)
    if whole is None:
        return ""
    try:
        return await model.grammars.grammar(whole, "tools")
    except InvalidRequest:
        for constraint, field in parts_of(request):
            await model.grammars.grammar(constraint, field)
        raise
