"""baton.v1.Inference: the typed, streaming form of what the HTTP front serves."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import grpc
import msgspec

from baton.errors import BatonError, DeadlineExceeded, InvalidRequest, Overloaded
from baton.openai.answer import Piece
from baton.openai.params import ModelLimits, OutputBudget, check_prompt
from baton.openai.parse import invalid
from baton.openai.schema import Message, SamplingFields, TopLogprobs
from baton.rpc.v1 import inference_pb2, inference_pb2_grpc
from baton.sampling import FinishReason
from baton.security.access import Access
from services.router.admission import reason_of
from services.router.caller import Caller
from services.router.frontend import Frontend
from services.router.generation import Placed
from services.router.http import retry_after

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

_FINISHED = {
    None: inference_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}
_MAX_NAME = 1024


class _GrpcSampling(SamplingFields, kw_only=True):
    """SamplingParams, held to the same ranges as the HTTP fields of the same names."""

    logprobs: TopLogprobs | None = None


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Serves Inference with the same parts as the HTTP front."""

    def __init__(self, frontend: Frontend, access: Access) -> None:
        self._frontend = frontend
        self._access = access
        self._model = frontend.model

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        request_id = request.request_id or uuid.uuid4().hex
        limit_s = self._frontend.callers.timeout_s
        try:
            caller = self._caller(context)
            limit_s = caller.timeout_s
            async with asyncio.timeout(limit_s) as scope:
                await self._generate(request, request_id, caller, context)
        except BatonError as error:
            await self._abort(context, error)
        except TimeoutError:
            if not scope.expired():
                raise
            late = f"the answer was not complete after {limit_s:g} s, the call's limit"
            await self._abort(context, DeadlineExceeded(late))
        except Exception:
            log.exception("request %s failed", request_id)
            await self._abort(
                context, BatonError(f"internal error; the router's log has it under {request_id}")
            )

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        await self._admitted(context)
        model = inference_pb2.Model(
            id=self._model.name,
            max_model_len=self._frontend.limits().max_model_len,
            created=self._model.created,
        )
        return inference_pb2.ListModelsResponse(models=[model])

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        await self._admitted(context)
        try:
            self._model.check_name(request.model)
            token_ids = await self._prompt(request, self._frontend.limits())
        except BatonError as error:
            await self._abort(context, error)
            raise
        return inference_pb2.TokenizeResponse(token_ids=token_ids)

    async def _generate(
        self, request: inference_pb2.GenerateRequest, request_id: str, caller: Caller, context: Context
    ) -> None:
        self._model.check_name(request.model)
        for field, value in (("request_id", request_id), ("cache_salt", request.cache_salt)):
            if len(value) > _MAX_NAME:
                raise InvalidRequest(f"{field}: at most {_MAX_NAME} characters", field=field)
        limits = self._frontend.limits()
        fields = _sampling_fields(request.sampling)
        prompt = await self._prompt(request, limits)
        generations = self._frontend.generations(
            fields,
            limits,
            prompt_token_ids=prompt,
            caller=caller,
            budget=OutputBudget("max_tokens", fields.max_tokens, None),
            logprobs=fields.logprobs,
            request_id=request_id,
            cache_salt=request.cache_salt,
            grammar=await self._frontend.grammar(fields),
        )
        usage = inference_pb2.Usage(prompt_tokens=len(prompt))
        writing = asyncio.Lock()  # a stream takes one message at a time

        async def emit(index: int, placed: Placed, pieces: Sequence[Piece]) -> None:
            async with writing:
                for piece in pieces:
                    usage.completion_tokens += len(piece.delta.token_ids)
                    if piece.first and index == 0:
                        usage.cached_tokens = placed.cached_tokens
                    await context.write(_response(request_id, index, piece))

        await self._frontend.run(generations, emit)
        await context.write(inference_pb2.GenerateResponse(request_id=request_id, usage=usage))

    def _caller(self, context: Context) -> Caller:
        """Who calls, by the metadata of the same names as the HTTP headers, and until when."""
        metadata = _metadata(context)
        grant = self._access.admit(metadata.get("authorization", ""))
        caller = self._frontend.callers.read(lambda name: metadata.get(name, ""), grant)
        remaining_s = context.time_remaining()
        if remaining_s is None:
            return caller
        return replace(caller, timeout_s=max(0.0, min(caller.timeout_s, remaining_s)))

    async def _admitted(self, context: Context) -> None:
        """Ends the call of whoever may not come in."""
        try:
            self._access.admit(_metadata(context).get("authorization", ""))
        except BatonError as error:
            await self._abort(context, error)

    async def _prompt(
        self, request: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest, limits: ModelLimits
    ) -> list[int]:
        if isinstance(request, inference_pb2.GenerateRequest) and request.HasField("token_ids"):
            token_ids = list(request.token_ids.ids)
            check_prompt(token_ids, limits, "token_ids")
            return token_ids
        if request.HasField("chat"):
            try:
                messages = [
                    msgspec.convert({"role": message.role, "content": message.content}, Message)
                    for message in request.chat.messages
                ]
            except msgspec.ValidationError as error:
                raise InvalidRequest(f"chat.{invalid(error).message}", field="chat") from error
            if not messages:
                raise InvalidRequest("chat: must hold at least one message", field="chat")
            text = self._model.render(messages, add_generation_prompt=True, variables=None)
            return await self._model.encode(text, "chat", limits, add_special_tokens=False)
        if request.HasField("text"):
            return await self._model.encode(request.text, "text", limits, add_special_tokens=True)
        raise InvalidRequest("prompt: one of text, token_ids or chat is required", field="prompt")

    async def _abort(self, context: Context, error: BatonError) -> None:
        """End the call with the error's code; `baton-field` names the field at fault."""
        self._frontend.metrics.rejected(reason_of(error))
        trailers: list[tuple[str, str | bytes]] = []
        if error.field is not None and error.field.isascii() and error.field.isprintable():
            trailers.append(("baton-field", error.field))
        if isinstance(error, Overloaded):
            trailers.append(("retry-after", str(retry_after(error))))
        await context.abort(error.grpc_code, error.message, tuple(trailers))


def _metadata(context: Context) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


def _sampling_fields(sampling: inference_pb2.SamplingParams) -> _GrpcSampling:
    """
    Raises:
        InvalidRequest: naming the field that is out of range.
    """
    given: dict[str, Any] = {}
    for field, value in sampling.ListFields():
        if field.name == "logit_bias":
            value = {str(token_id): bias for token_id, bias in value.items()}
        elif field.name == "structured_outputs":
            value = _structured_outputs(value)
        elif field.is_repeated:
            value = list(value)
        given[field.name] = value
    try:
        fields = msgspec.convert(given, _GrpcSampling)
    except msgspec.ValidationError as error:
        raise invalid(error) from error
    if fields.max_tokens == 0:
        raise InvalidRequest("max_tokens: must be at least 1, got 0", field="max_tokens")
    return fields


def _structured_outputs(asked: inference_pb2.StructuredOutputs) -> dict[str, Any]:
    given = {field.name: value for field, value in asked.ListFields()}
    if asked.WhichOneof("constraint") == "choice":
        given["choice"] = list(asked.choice.texts)
    return given


def _response(request_id: str, index: int, piece: Piece) -> inference_pb2.GenerateResponse:
    delta = piece.delta
    return inference_pb2.GenerateResponse(
        request_id=request_id,
        index=index,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=delta.logprobs,
        finish_reason=_FINISHED[delta.finish_reason],
        stop_reason="" if delta.stop_reason is None else str(delta.stop_reason),
        prompt_logprobs=piece.prompt_logprobs,
    )
