"""A collector of traces as tests and benchmarks need it: OTLP over gRPC, kept in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True)
class Span:
    """One span as it was sent. Ids are in hexadecimal, times in seconds since the epoch."""

    process: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_s: float
    end_s: float
    attributes: dict[str, object]


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """What has arrived so far, at `endpoint`."""

    endpoint: str = ""
    spans: list[Span] = field(default_factory=list)
    _arrived: threading.Condition = field(default_factory=threading.Condition)

    def Export(self, request: Any, context: Any) -> Any:
        found = [
            _read(resource.resource, span)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        with self._arrived:
            self.spans += found
            self._arrived.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait_for(self, names: set[str], prompt_tokens: int = 0, timeout_s: float = 30) -> list[Span]:
        """All spans, once there is one of each name, and the chunks of `prompt_tokens`.

        Raises:
            AssertionError: some did not come.
        """

        def complete() -> bool:
            chunks = [span.attributes["tokens"] for span in self.spans if span.name == "chunk"]
            return names <= {span.name for span in self.spans} and sum(chunks) >= prompt_tokens  # type: ignore[arg-type]

        with self._arrived:
            came = self._arrived.wait_for(complete, timeout_s)
            assert came, f"of {names} only {[span.name for span in self.spans]} came"
            return list(self.spans)


@contextmanager
def running_collector() -> Iterator[Collector]:
    """A collector on a free port."""
    server = grpc.server(ThreadPoolExecutor(2))
    collector = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()


def _read(resource: Any, span: Any) -> Span:
    return Span(
        process=_attributes(resource)["service.name"],  # type: ignore[arg-type]
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start_s=span.start_time_unix_nano / 1e9,
        end_s=span.end_time_unix_nano / 1e9,
        attributes=_attributes(span),
    )


def _attributes(one: Any) -> dict[str, object]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in one.attributes}
