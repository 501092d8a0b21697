"""What ends a placement before its request, and what that means for the request."""

from __future__ import annotations

from baton.errors import BatonError, DeadlineExceeded, InvalidRequest, Overloaded, Unavailable
from baton.routing import Placement
from baton.rpc.v1 import inference_pb2, worker_pb2
from services.router.poison import Loss

_RETRY_AFTER_S = 1.0
_Error = worker_pb2.RequestError


class PlacementFailed(Exception):
    """A placement ended before its request did; another one may work.

    `avoid` is the worker to keep away from, None where others may still read what it holds; `final` is what
    the client is told when no placement is left. `loss` is set when its session broke.
    """

    def __init__(self, reason: str, avoid: str | None, final: BatonError, loss: Loss | None = None) -> None:
        super().__init__(f"{reason}: {final.message}")
        self.reason = reason
        self.avoid = avoid
        self.final = final
        self.loss = loss


def failed(output: worker_pb2.RequestOutput, placement: Placement) -> Exception | None:
    """Why the placement ends with this output, if it does and the choice does not."""
    if output.HasField("error"):
        return _failure(output.error, placement)
    if output.finish_reason == inference_pb2.FINISH_REASON_CANCELLED:
        # Not by this router, which would not be listening any more.
        worker_id = placement.decode.worker_id
        given_up = Unavailable(f"worker {worker_id} gave the request up")
        return PlacementFailed("cancelled", worker_id, given_up)
    return None


def _failure(error: worker_pb2.RequestError, placement: Placement) -> Exception:
    """What a worker's error means: another placement, or the end."""
    decode, prefill = placement.decode.worker_id, placement.prefill
    match error.kind:
        case _Error.INVALID:
            return InvalidRequest(error.message)
        case _Error.HANDOFF_FAILED:
            at_fault = prefill.worker_id if prefill is not None else decode
            return PlacementFailed("handoff_failed", at_fault, Unavailable(error.message))
        case _Error.OVERLOADED:
            overloaded = Overloaded(error.message, retry_after_s=_RETRY_AFTER_S)
            return PlacementFailed("overloaded", decode, overloaded)
        case _Error.DRAINING:
            return PlacementFailed("draining", None, Unavailable(error.message))
        case _Error.PREFILL_REFUSED:
            at_fault = prefill.worker_id if prefill is not None else decode
            return PlacementFailed("prefill_refused", at_fault, Unavailable(error.message))
        case _Error.MOVED:
            return PlacementFailed("moved", decode, Unavailable(error.message))
        case _Error.EXPIRED:
            return DeadlineExceeded(f"the request's time was over on worker {decode}")
        case _:
            return BatonError(f"worker {decode} failed: {error.message}")
