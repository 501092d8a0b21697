"""Which fields OpenAI-shaped requests may have, and what their values may be.

Optional fields are None when absent; null means the same. Ranges that depend on the model are
checked in `baton.openai.params`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOPS = 16
MAX_TOOLS = 128

Count = Annotated[int, Meta(ge=0)]
AtLeastOne = Annotated[int, Meta(ge=1)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]
Name = Annotated[str, Meta(max_length=256)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    """`include_usage`: a last chunk with the usage; `continuous_usage_stats`: usage in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False


class JsonSchemaFormat(Struct, forbid_unknown_fields=True, kw_only=True):
    """`strict` makes no difference: an answer always keeps to the schema."""

    name: Name
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, forbid_unknown_fields=True, kw_only=True):
    """OpenAI's way of asking for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Struct, forbid_unknown_fields=True, kw_only=True):
    """vLLM's way of saying what an answer must be; at most one of the first five.

    `json` is a schema, as JSON or as a string of it. There is nothing to fall back to, so `disable_fallback`
    makes no difference.
    """

    json: str | dict[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], Meta(min_length=1, max_length=4096)] | None = None
    grammar: str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    disable_fallback: bool | None = None


class SamplingFields(Struct, forbid_unknown_fields=True, kw_only=True):
    """How to choose tokens: the same for every interface of the router."""

    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Fraction | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=100.0)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Meta(ge=-100.0, le=100.0)]], Meta(max_length=1024)] | None
    ) = None
    stop: str | list[str] | None = None
    stop_token_ids: Annotated[list[Count], Meta(max_length=128)] | None = None
    seed: int | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    prompt_logprobs: TopLogprobs | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None


class RequestFields(SamplingFields, kw_only=True):
    """What completions and chats have in common beside sampling."""

    model: Name | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=1024)] | None = None
    request_id: Annotated[str, Meta(min_length=1, max_length=128)] | None = None
    slo: Literal["interactive", "batch"] | None = None
    service_tier: Name | None = None  # flex is batch; any other is interactive
    response_format: ResponseFormat | None = None
    # What `structured_outputs` was called in older versions of vLLM.
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Meta(min_length=1, max_length=4096)] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None


class CompletionRequest(RequestFields, kw_only=True):
    """The body of POST /v1/completions."""

    # One string, several, one list of token ids, or several: told apart in `prompts_of`.
    prompt: str | list[str | Count | list[Count]]
    logprobs: TopLogprobs | None = None
    echo: bool | None = None
    max_completion_tokens: Count | None = None  # of chats, but some clients send it here too


class TextPart(Struct, forbid_unknown_fields=True):
    """A piece of a message's content; text is the only kind there is."""

    type: Literal["text"]
    text: str


Empty = Annotated[list[Any], Meta(max_length=0)]


class CalledFunction(Struct, forbid_unknown_fields=True, kw_only=True):
    """`arguments` is JSON, as far as the model wrote it well."""

    name: Name
    arguments: str


class ToolCall(Struct, forbid_unknown_fields=True, kw_only=True):
    """A call that an assistant made earlier; `index` is what clients keep of its stream."""

    id: Name
    function: CalledFunction
    type: Literal["function"] = "function"
    index: Count | None = None


class Message(Struct, forbid_unknown_fields=True, kw_only=True):
    """One message of a chat; `tool_calls` are an assistant's, `tool_call_id` says which one a tool answers.

    The fields typed null are what clients send back with an assistant's earlier answer.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: Name | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Name | None = None
    annotations: Empty | None = None


# Nothing may follow, where `$` would let a line break.
FunctionName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}(?![\s\S])")]


class FunctionDefinition(Struct, forbid_unknown_fields=True, kw_only=True):
    """`parameters` is the JSON schema of an object; `strict` makes no difference: a call that the request
    demands always keeps to it, one that the model chooses to make never has to."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, forbid_unknown_fields=True, kw_only=True):
    """Something that the model may call; functions are the only kind there is."""

    type: Literal["function"]
    function: FunctionDefinition


class ChosenFunction(Struct, forbid_unknown_fields=True):
    """One of the request's tools, by name."""

    name: FunctionName


class ChosenTool(Struct, forbid_unknown_fields=True):
    """The answer is a call of this function."""

    type: Literal["function"]
    function: ChosenFunction


Tools = Annotated[list[Tool], Meta(max_length=MAX_TOOLS)]


class ChatRequest(RequestFields, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: AtLeastOne | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None  # auto where there are tools
    parallel_tool_calls: bool | None = None


class TokenizeRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of POST /tokenize: a prompt or a chat."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    tools: Tools | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of POST /detokenize."""

    model: Name | None = None
    tokens: list[Count]


# Accepted and without effect: they tell OpenAI about the caller or its account, or restate what
# is so here anyway.
HARMLESS = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "store",
        "user",
    }
)

# What baton does not do, with the values that ask for nothing. Anything else is refused by name.
_NOTHING: tuple[Any, ...] = (None, [], {})
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": _NOTHING,
    "best_of": (None, 1),
    "documents": _NOTHING,
    "function_call": (None, "none"),
    "functions": _NOTHING,
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": _NOTHING,
    "reasoning_effort": (None, "none"),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": _NOTHING,
    "truncate_prompt_tokens": _NOTHING,
    "use_beam_search": (None, False),
    "verbosity": (None, "medium"),
    "web_search_options": _NOTHING,
}
