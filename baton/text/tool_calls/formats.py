"""Which format a model writes its calls in, by its chat template."""

from __future__ import annotations

from baton.text.tool_calls.hermes import Hermes
from baton.text.tool_calls.llama3_json import Llama3Json
from baton.text.tool_calls.mistral import Mistral
from baton.text.tool_calls.parser import ToolCallParser

ToolCallFormat = type[ToolCallParser]
FORMATS: dict[str, ToolCallFormat] = {kind.name: kind for kind in (Hermes, Llama3Json, Mistral)}


def format_of(setting: str, template: str) -> ToolCallFormat | None:
    """The format that `setting` names; auto is what `template` asks the model for. None: none of them."""
    return _asked_for(template) if setting == "auto" else FORMATS.get(setting)


def _asked_for(template: str) -> ToolCallFormat | None:
    # Others write something else between the same marks, such as <function=...> or <arg_key>.
    if "<tool_call>" in template:
        others = "<function=" in template or "<arg_key>" in template
        return Hermes if '"arguments' in template and not others else None
    if "[TOOL_CALLS]" in template:
        return Mistral
    llama = "<|python_tag|>" in template or "<|start_header_id|>" in template
    return Llama3Json if llama and '"parameters"' in template else None
