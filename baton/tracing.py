"""Traces: off unless --otlp-endpoint names a collector, then one trace per request, over all its processes.

Spans are recorded when what they cover is over, from times that are taken anyway, so a request that is not
traced costs a look at an empty string here and there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from baton.config import BadSetting, ObservabilitySettings

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

Attributes = Mapping[str, str | int | float]

# As with logging, there is one per process.
_tracer: Tracer | None = None
_epoch_ns = time.time_ns() - time.monotonic_ns()


def configure(process: str, settings: ObservabilitySettings) -> None:
    """Send this process's spans to the collector that the settings name, if they name one.

    Raises:
        BadSetting: the libraries that this needs are not installed.
    """
    global _tracer
    if not settings.otlp_endpoint:
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ImportError as error:
        raise BadSetting(
            "--otlp-endpoint needs OpenTelemetry; install it: pip install 'baton-serve[otel]'",
            field="otlp_endpoint",
        ) from error
    resource = Resource.create({"service.namespace": "baton", "service.name": process})
    provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(settings.trace_share)), resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(settings.otlp_endpoint)))
    _tracer = provider.get_tracer("baton")


def begin(name: str, parent: str, began_s: float) -> Span | None:
    """A span that others will name as their parent; None when it is not to be recorded.

    Args:
        parent: W3C traceparent; empty, or not one, for a new trace.
        began_s: `time.monotonic()` at its start.
    """
    if _tracer is None:
        return None
    span = _tracer.start_span(name, _context(parent), start_time=_ns(began_s))
    return span if span.is_recording() else None


def traceparent(span: Span) -> str:
    """The span as W3C traceparent, for those who work for it."""
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def end(span: Span, ended_s: float, attributes: Attributes, *, failed: bool = False) -> None:
    """The end of what `begin` began."""
    from opentelemetry.trace import StatusCode

    span.set_attributes(attributes)
    if failed:
        span.set_status(StatusCode.ERROR)
    span.end(_ns(ended_s))


def record(
    parent: str, name: str, began_s: float, ended_s: float, attributes: Attributes | None = None
) -> str:
    """A span that is over, under `parent`; its own traceparent, or nothing when it was not recorded."""
    span = begin(name, parent, began_s) if parent else None
    if span is None:
        return ""
    end(span, ended_s, attributes or {})
    return traceparent(span)


@lru_cache(maxsize=256)  # a request's spans come close together and name the same parent
def _context(parent: str) -> Context:
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": parent}, Context())


def _ns(seconds: float) -> int:
    return _epoch_ns + round(seconds * 1e9)
