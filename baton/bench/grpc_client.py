"""baton's own gRPC interface, `baton.v1.Inference`."""

from __future__ import annotations

from types import TracebackType

import grpc

from baton.bench.client import Arrivals, Client, Clock, NobodyAnswers
from baton.bench.load import LoadRequest
from baton.rpc.channels import open_public_channel
from baton.rpc.v1 import inference_pb2, inference_pb2_grpc


class GrpcClient(Client):
    """All requests on one channel, to HOST:PORT or, where it has TLS, https://HOST:PORT."""

    takes_token_ids = True

    def __init__(
        self,
        address: str,
        model: str | None = None,
        *,
        api_key: str = "",
        timeout_s: float = 600.0,
        ignore_eos: bool = True,
    ) -> None:
        self._encrypted = address.startswith("https://")
        self._address = address.removeprefix("https://").removeprefix("http://")
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._model = model
        self._timeout_s = timeout_s
        self._ignore_eos = ignore_eos

    async def __aenter__(self) -> GrpcClient:
        credentials = grpc.ssl_channel_credentials() if self._encrypted else None
        self._channel = open_public_channel(self._address, credentials)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._channel.close(None)

    async def model(self) -> str:
        if self._model is None:
            try:
                models = await self._stub.ListModels(
                    inference_pb2.ListModelsRequest(), timeout=10, metadata=self._metadata
                )
                self._model = str(models.models[0].id)
            except (grpc.aio.AioRpcError, IndexError) as error:
                raise NobodyAnswers(
                    f"no baton router answers gRPC at {self._address}; is the cluster up?"
                ) from error
        return self._model

    async def send(self, request: LoadRequest, tokens: Arrivals, clock: Clock) -> str:
        message = inference_pb2.GenerateRequest(
            model=self._model or "",
            sampling=inference_pb2.SamplingParams(
                max_tokens=request.output_tokens, temperature=0.0, ignore_eos=self._ignore_eos
            ),
        )
        if isinstance(request.prompt, str):
            message.text = request.prompt
        else:
            message.token_ids.ids.extend(request.prompt)
        try:
            async for response in self._stub.Generate(
                message, timeout=self._timeout_s, metadata=self._metadata
            ):
                if response.token_ids or response.text:
                    tokens.at(clock())
                if response.HasField("usage"):
                    tokens.input_tokens = response.usage.prompt_tokens
                    tokens.output_tokens = response.usage.completion_tokens
                    tokens.cached_tokens = response.usage.cached_tokens
        except grpc.aio.AioRpcError as error:
            return str(error.code().name).lower()
        return ""
