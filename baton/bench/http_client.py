"""OpenAI-compatible servers: completions and chats, streamed."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Literal

import aiohttp
import orjson

from baton.bench.client import Arrivals, Client, Clock, NobodyAnswers
from baton.bench.load import LoadRequest

Endpoint = Literal["completions", "chat"]
_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_DATA = b"data:"


class HttpClient(Client):
    """One connection per request in flight, kept alive between requests.

    Args:
        url: of the server, with or without `/v1`.
        model: name to send; None asks the server.
        timeout_s: for one request in all.
        ignore_eos: ask for exactly as many tokens as the workload says, which vLLM, SGLang and baton know.
    """

    def __init__(
        self,
        url: str,
        endpoint: Endpoint,
        model: str | None = None,
        *,
        api_key: str = "",
        timeout_s: float = 600.0,
        ignore_eos: bool = True,
    ) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._endpoint = endpoint
        self._model = model
        self._timeout_s = timeout_s
        self._ignore_eos = ignore_eos
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.takes_token_ids = endpoint == "completions"

    async def __aenter__(self) -> HttpClient:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            headers=self._headers,
            read_bufsize=1 << 18,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def model(self) -> str:
        if self._model is None:
            try:
                async with self._session.get(f"{self._url}/v1/models") as response:
                    self._model = str(orjson.loads(await response.read())["data"][0]["id"])
            except aiohttp.ClientConnectionError as error:
                raise NobodyAnswers(f"nobody answers at {self._url}; is the server up?") from error
            except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError) as error:
                raise NobodyAnswers(
                    f"{self._url}/v1/models does not name a model; give one with --model"
                ) from error
        return self._model

    async def send(self, request: LoadRequest, tokens: Arrivals, clock: Clock) -> str:
        body = orjson.dumps(self._body(request))
        try:
            async with self._session.post(self._url + _PATHS[self._endpoint], data=body) as response:
                if response.status != 200:
                    return f"HTTP {response.status}"
                return await self._read(response, tokens, clock)
        except TimeoutError:
            return "timeout"
        except aiohttp.ClientConnectorError:
            return "connection refused"
        except (aiohttp.ClientError, ValueError) as error:
            return type(error).__name__

    async def _read(self, response: aiohttp.ClientResponse, tokens: Arrivals, clock: Clock) -> str:
        """Note the tokens of a stream of server-sent events; why it failed."""
        rest = b""
        async for data in response.content.iter_any():
            now_s = clock()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if not line.startswith(_DATA):
                    continue
                payload = line[len(_DATA) :].strip()
                if payload == b"[DONE]":
                    return ""
                event = orjson.loads(payload)
                if "error" in event:
                    return "error in the stream"
                self._take(event, tokens, now_s)
        # Not all servers say [DONE]; a finished answer without it is one.
        return "" if tokens.pieces else "no tokens"

    def _take(self, event: dict[str, Any], tokens: Arrivals, now_s: float) -> None:
        if usage := event.get("usage"):
            tokens.input_tokens = usage.get("prompt_tokens")
            tokens.output_tokens = usage.get("completion_tokens")
            tokens.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        for choice in event.get("choices") or ():
            if self._endpoint == "completions":
                new = choice.get("text") or choice.get("finish_reason") is None
            else:
                delta = choice.get("delta") or {}
                new = delta.get("content") or delta.get("reasoning_content")
            if new:
                tokens.at(now_s)

    def _body(self, request: LoadRequest) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": request.output_tokens,
            "temperature": 0,
        }
        if self._ignore_eos:
            body["ignore_eos"] = True
        if self._endpoint == "chat":
            body["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            body["prompt"] = request.prompt
        return body
