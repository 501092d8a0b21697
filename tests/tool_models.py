"""The bundled model as models that call tools: a template in each family's style, and its marks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

MODEL = Path(__file__).resolve().parent.parent / "models" / "baton-small"

HERMES = """
{%- if tools %}
{{- '[system]You may call these functions:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' ~ (tool | tojson) }}{%- endfor %}
{{- '\\n</tools>\\nA call looks like <tool_call>{"name": ..., "arguments": {...}}</tool_call>.\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '[' ~ message.role ~ ']' }}
{%- if message.role == 'tool' %}<tool_response>{{ message.content }}</tool_response>
{%- else %}{{ message.content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
{{- (call.function.arguments | tojson) ~ '}\\n</tool_call>' }}
{%- endfor %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}[assistant]{%- endif %}
"""

LLAMA3 = """
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{{- bos_token }}
{%- if tools is not none %}
{{- '<|start_header_id|>system<|end_header_id|>Answer with {"name": ..., "parameters": {...}} to call:\\n' }}
{%- for tool in tools %}{{ tool.function | tojson(indent=4) }}{{ '\\n\\n' }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>' ~ (message.content | tojson) }}
{%- elif message.tool_calls is defined and message.tool_calls %}
{%- if message.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{%- endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|python_tag|>{"name": "' ~ call.name ~ '", "parameters": ' ~ (call.arguments | tojson) ~ '}' }}
{%- else %}
{{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>' ~ message.content | trim }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{%- endif %}
"""

MISTRAL = """
{{- bos_token }}
{%- for message in messages %}
{%- if loop.last and tools %}{{ '[AVAILABLE_TOOLS]' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' }}{%- endif %}
{%- if message.role == 'user' %}{{ '[INST]' ~ message.content ~ '[/INST]' }}
{%- elif message.role == 'tool' %}
{%- if message.tool_call_id | length != 9 %}{{ raise_exception('ids have nine letters') }}{%- endif %}
{{- '[TOOL_RESULTS]{"content": ' ~ message.content ~ ', "call_id": "' ~ message.tool_call_id ~ '"}' }}
{%- elif message.tool_calls %}
{{- '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}
{{- (call.function | tojson)[:-1] ~ ', "id": "' ~ call.id ~ '"}' }}
{%- if not loop.last %}, {% endif %}
{%- endfor %}{{ ']' }}
{%- else %}{{ message.content ~ eos_token }}{%- endif %}
{%- endfor %}
"""

TEMPLATES = {"hermes": HERMES, "llama3_json": LLAMA3, "mistral": MISTRAL}
_MARKS = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama3_json": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]", "[ARGS]"),
}


def model_with_tools(folder: Path, calls: str) -> Path:
    """A copy in `folder` of the bundled model, as one that writes its calls in this format."""
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "model.safetensors").symlink_to(MODEL / "model.safetensors")
    config = json.loads((MODEL / "tokenizer_config.json").read_text())
    config["chat_template"] = TEMPLATES[calls]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    # Special tokens that the template has no use for become the marks.
    text = (MODEL / "tokenizer.json").read_text()
    for unused, mark in zip(("<|system|>", "<|user|>"), _MARKS[calls], strict=False):
        assert unused in text
        text = text.replace(json.dumps(unused)[1:-1], mark)
    (folder / "tokenizer.json").write_text(text)
    return folder
