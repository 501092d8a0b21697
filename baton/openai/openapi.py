"""The HTTP API as an OpenAPI document: /openapi.json."""

from __future__ import annotations

import copy
from typing import Any

import msgspec

from baton import __version__
from baton.openai.schema import (
    HARMLESS,
    UNSUPPORTED,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

Json = dict[str, Any]

_TEXT: Json = {"type": "string"}
_COUNT: Json = {"type": "integer", "minimum": 0}

_ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_USAGE: Json = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "properties": {"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT},
}
_CALL: Json = {
    "type": "object",
    "required": ["id", "type", "function"],
    "properties": {
        "id": _TEXT,
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "required": ["name", "arguments"],
            "properties": {"name": _TEXT, "arguments": _TEXT},
        },
    },
}
_CHOICE: Json = {
    "type": "object",
    "required": ["index", "finish_reason"],
    "properties": {
        "index": _COUNT,
        "finish_reason": {"enum": ["stop", "length", "tool_calls"]},
        "text": _TEXT,
        "message": {
            "type": "object",
            "required": ["role", "content"],
            "properties": {
                "role": {"const": "assistant"},
                "content": {"type": ["string", "null"]},
                "tool_calls": {"type": "array", "minItems": 1, "items": _CALL},
            },
        },
    },
}
_ANSWER: Json = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage"],
    "properties": {
        "id": _TEXT,
        "object": {"enum": ["text_completion", "chat.completion"]},
        "created": _COUNT,
        "model": _TEXT,
        "choices": {"type": "array", "items": _CHOICE},
        "usage": {"$ref": "#/components/schemas/Usage"},
    },
}
_MODEL: Json = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by", "max_model_len"],
    "properties": {"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "max_model_len": _COUNT},
}
_MODELS: Json = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {
        "object": {"const": "list"},
        "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}},
    },
}
_TOKENS: Json = {
    "type": "object",
    "required": ["count", "max_model_len", "tokens"],
    "properties": {
        "count": _COUNT,
        "max_model_len": _COUNT,
        "tokens": {"type": "array", "items": _COUNT},
        "token_strs": {"type": "array", "items": _TEXT},
    },
}
_PROMPT: Json = {"type": "object", "required": ["prompt"], "properties": {"prompt": _TEXT}}
_STATUS: Json = {"type": "object", "required": ["status"], "properties": {"status": _TEXT}}
_VERSION: Json = {"type": "object", "required": ["version"], "properties": {"version": _TEXT}}

_REFUSALS = {
    "400": "the request is wrong; `param` names the field",
    "401": "no API key, or one that is not known",
    "403": "the API key does not allow it",
    "404": "no such model",
    "408": "the request did not arrive in time",
    "413": "the body is too large",
    "415": "the body is not JSON",
    "429": "too much at the moment; `Retry-After` says when to come back",
    "500": "an error of the server",
    "503": "no worker can serve it now",
    "504": "the answer took too long",
}


def document() -> Json:
    """What the public port serves, as OpenAPI 3.1."""
    bodies = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
    _, schemas = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    for kind in (CompletionRequest, ChatRequest):
        # Fields that are no part of the struct, for asking for nothing: see `BodyParser`.
        properties = schemas[kind.__name__]["properties"]
        for name in sorted(HARMLESS):
            properties.setdefault(name, {})
        for name, neutral in sorted(UNSUPPORTED.items()):
            properties.setdefault(name, {"enum": list(neutral)})
    schemas |= {"Answer": _ANSWER, "Error": _ERROR, "Model": _MODEL, "Models": _MODELS, "Usage": _USAGE}
    which = {"name": "model", "in": "path", "required": True, "schema": _TEXT}
    return {
        "openapi": "3.1.0",
        "info": {"title": "baton", "version": __version__},
        "security": [{}, {"key": []}],
        "paths": {
            "/v1/completions": {"post": _asked("CompletionRequest", _ref("Answer"), streams=True)},
            "/v1/chat/completions": {"post": _asked("ChatRequest", _ref("Answer"), streams=True)},
            "/v1/models": {"get": _got(_ref("Models"))},
            "/v1/models/{model}": {"get": {**_got(_ref("Model")), "parameters": [which]}},
            "/tokenize": {"post": _asked("TokenizeRequest", _TOKENS)},
            "/detokenize": {"post": _asked("DetokenizeRequest", _PROMPT)},
            "/version": {"get": _got(_VERSION)},
            "/health": {"get": _got(_STATUS)},
            "/live": {"get": _got(_STATUS)},
            "/ready": {"get": _got(_STATUS)},
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _got(answer: Json) -> Json:
    refusals = {
        status: {"description": says, "content": {"application/json": {"schema": _ref("Error")}}}
        for status, says in _REFUSALS.items()
    }
    whole = {"description": "the answer", "content": {"application/json": {"schema": copy.deepcopy(answer)}}}
    return {"responses": {"200": whole, **refusals}}


def _asked(body: str, answer: Json, *, streams: bool = False) -> Json:
    operation = _got(answer)
    if streams:
        operation["responses"]["200"]["content"]["text/event-stream"] = {}
    content = {"application/json": {"schema": _ref(body)}}
    return {**operation, "requestBody": {"required": True, "content": content}}
