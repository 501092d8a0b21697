"""The served HTTP API: what its own description allows, and what HTTP does not."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from functools import cache

import httpx
import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis import BaseSchema, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from baton.security.access import Access
from services.router.app import App
from tests.fuzz.explore import explore
from tests.fuzz.mutations import mutated
from tests.fuzz.served import served_router
from tests.unit.router.fakes import RunningRouter

BODY = json.dumps({"prompt": [5, 6], "max_tokens": 2}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n"
CHUNKED = (
    b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"
)
REQUESTS = [
    HEAD % len(BODY) + BODY,
    CHUNKED % (len(BODY), BODY),
    b"GET /v1/models HTTP/1.1\r\nhost: a\r\nx-request-id: mine\r\nx-baton-slo: batch\r\n\r\n",
    b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n" * 3,
]
OPERATIONS = [
    ("/v1/completions", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/v1/models/{model}", "GET"),
    ("/tokenize", "POST"),
    ("/detokenize", "POST"),
]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
_router: list[RunningRouter] = []


@pytest.fixture(scope="module", autouse=True)
def router() -> Iterator[None]:
    with served_router() as up:
        _router.append(up)
        yield
        _router.clear()


@explore(examples=40, request=mutated(REQUESTS), stays=st.booleans())
def test_bytes_on_the_wire_never_cause_an_internal_error(request: bytes, stays: bool) -> None:
    """`stays`: the client waits for an answer; else it leaves at once."""
    answer = b""
    address = ("127.0.0.1", _router[0].router.http_port)
    with socket.create_connection(address, timeout=60) as client, contextlib.suppress(ConnectionError):
        client.sendall(request)
        if stays and request:
            answer = client.recv(65536)
    assert not answer or answer.startswith((b"HTTP/1.1 ", b"HTTP/1.0 "))
    assert answer[9:12] != b"500", answer
    assert httpx.get(f"{_router[0].base_url}/health", timeout=60).status_code == 200


@cache
def document(base_url: str) -> BaseSchema:
    """What is served says of itself."""
    return schemathesis.openapi.from_dict(httpx.get(f"{base_url}/openapi.json", timeout=60).json())


@explore(examples=25, data=st.data())
def test_what_is_served_is_what_the_openapi_document_says(data: st.DataObject) -> None:
    base_url = _router[0].base_url
    schema = document(base_url)
    path, method = data.draw(st.sampled_from(OPERATIONS))
    mode = data.draw(st.sampled_from(GenerationMode))
    case = data.draw(schema[path][method].as_strategy(generation_mode=mode))
    response = case.call(base_url=base_url, timeout=60)
    case.validate_response(response, checks=CHECKS)


def test_the_openapi_document_knows_every_path() -> None:
    paths = httpx.get(f"{_router[0].base_url}/openapi.json", timeout=60).json()["paths"]
    app = App(_router[0].router.frontend, Access(""), max_body_bytes=1024)
    served = {**app._open, **app._keyed}.keys() - {"/openapi.json"}
    assert paths.keys() == served | {"/v1/models/{model}"}
