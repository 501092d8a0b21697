"""Which errors baton raises, and what each becomes in HTTP and gRPC."""

from __future__ import annotations

import grpc


class BatonError(Exception):
    """Base of every error that a caller can cause or must handle.

    The message names the thing, its value and the remedy. `field` names the request field at fault,
    if one is.
    """

    http_status = 500
    grpc_code = grpc.StatusCode.INTERNAL
    openai_type = "internal_error"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class InvalidRequest(BatonError):
    """The request is wrong and will be wrong next time."""

    http_status = 400
    grpc_code = grpc.StatusCode.INVALID_ARGUMENT
    openai_type = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and output together are longer than the model or the KV pool can hold."""


class ModelNotFound(InvalidRequest):
    """No such model here."""

    http_status = 404
    grpc_code = grpc.StatusCode.NOT_FOUND


class RequestTooLarge(InvalidRequest):
    """The body is larger than the router reads."""

    http_status = 413


class Unauthenticated(BatonError):
    """The caller has not shown who it is."""

    http_status = 401
    grpc_code = grpc.StatusCode.UNAUTHENTICATED
    openai_type = "invalid_request_error"


class PermissionDenied(BatonError):
    """The caller is known and may not do this."""

    http_status = 403
    grpc_code = grpc.StatusCode.PERMISSION_DENIED
    openai_type = "permission_error"


class Overloaded(BatonError):
    """Every queue that could take the request is full.

    `retry_after_s` is when the caller should come back.
    """

    http_status = 429
    grpc_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    openai_type = "rate_limit_error"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(BatonError):
    """No live worker can take the request now."""

    http_status = 503
    grpc_code = grpc.StatusCode.UNAVAILABLE
    openai_type = "service_unavailable_error"


class DeadlineExceeded(BatonError):
    """The request's deadline passed before its answer was complete."""

    http_status = 504
    grpc_code = grpc.StatusCode.DEADLINE_EXCEEDED
    openai_type = "timeout_error"


class UnsupportedModel(BatonError):
    """The model folder cannot be served; raised at start, in one sentence that names what and why."""


class DeadlyRequest(BatonError):
    """Workers died of computing the request; it is not tried again."""


class HandoffFailed(BatonError):
    """KV could not be brought from another worker; what was read is discarded."""

    grpc_code = grpc.StatusCode.UNAVAILABLE


class PrefillRefused(HandoffFailed):
    """The prefill worker takes no prompts now: it drains or has another role."""

    grpc_code = grpc.StatusCode.ABORTED


class Misguided(HandoffFailed):
    """The prompt's KV is there, but its answer cannot be held to its grammar."""

    grpc_code = grpc.StatusCode.OUT_OF_RANGE


class PoolTooSmall(InvalidRequest):
    """The request needs more KV blocks than the pool has in all."""
