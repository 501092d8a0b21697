"""OpenAI's endpoints: which checks, prompts and choices a body becomes, and how its answer is written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from baton import __version__
from baton.errors import InvalidRequest
from baton.openai.answer import DONE, Head, Piece, Usage
from baton.openai.chat import ChatShapes
from baton.openai.completions import CompletionShapes, EchoedPrompt
from baton.openai.logprobs import LogprobShapes
from baton.openai.params import ModelLimits, OutputBudget, check_prompt
from baton.openai.parse import BodyParser
from baton.openai.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    RequestFields,
    TokenizeRequest,
)
from baton.openai.tool_chat import ToolChatShapes
from baton.openai.tools import check_tools, tools_as_sent
from baton.sampling import FinishReason
from baton.text import Delta
from baton.text.tool_calls import ToolCallFormat
from services.router.caller import Caller
from services.router.frontend import Frontend
from services.router.generation import Generation, Placed
from services.router.http import Exchange, Headers
from services.router.tools import call_grammar, calls_of, shown_tokens

_COMPLETION_TOKENS = 16  # OpenAI's default for completions; chats go on until they end
_MAX_PROMPTS = 1024
_FINGERPRINT = f"baton-{__version__}"


class _Shapes(Protocol):
    """What answers look like: `CompletionShapes` or `ChatShapes`."""

    def chunk(self, index: int, piece: Piece, usage: Usage | None) -> bytes: ...
    def usage_chunk(self, usage: Usage) -> bytes: ...
    def whole(self, choices: Sequence[Sequence[Piece]], usage: Usage) -> dict[str, object]: ...


@dataclass(frozen=True)
class AskedCompletion:
    """A completion request that has been read: its prompts, and n choices for each in turn."""

    request: CompletionRequest
    prompts: list[EchoedPrompt]
    generations: list[Generation]


@dataclass(frozen=True)
class AskedChat:
    """A chat request that has been read, how calls of its tools are written, and its n choices."""

    request: ChatRequest
    calls: ToolCallFormat | None
    generations: list[Generation]


class OpenAiApi:
    """The endpoints that need a model. Errors are raised; the app writes them."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._model = frontend.model
        self._completions = BodyParser(CompletionRequest)
        self._chats = BodyParser(ChatRequest)
        self._tokenizes = BodyParser(TokenizeRequest)
        self._detokenizes = BodyParser(DetokenizeRequest)

    async def completions(self, exchange: Exchange) -> None:
        asked = await self.read_completion(await exchange.json_body(), exchange)
        request = asked.request
        shapes = CompletionShapes(request, asked.prompts, self._head("cmpl", exchange), self._names(request))
        answer = _Answer(self._frontend, exchange, shapes, asked.generations, per_prompt=request.n or 1)
        await answer.write(request, without_output=_only_echoes(request))

    async def chat(self, exchange: Exchange) -> None:
        asked = await self.read_chat(await exchange.json_body(), exchange)
        request, generations = asked.request, asked.generations
        head, names = self._head("chatcmpl", exchange), self._names(request)
        prompt = generations[0].prompt_token_ids
        if asked.calls is None:
            shapes = ChatShapes(request, prompt, head, names)
        else:
            shapes = ToolChatShapes(request, prompt, head, names, asked.calls)
        answer = _Answer(self._frontend, exchange, shapes, generations, per_prompt=len(generations))
        await answer.write(request, without_output=False)

    async def read_completion(self, body: bytes, exchange: Exchange) -> AskedCompletion:
        """The choices that a body of /v1/completions asks for.

        Raises:
            InvalidRequest: naming the field at fault.
        """
        request = self._completions.parse(body)
        self._check(request)
        caller = self._caller(request, exchange)
        limits = self._frontend.limits()
        prompts = await self._prompts(request, limits)
        asked = request.max_completion_tokens if request.max_tokens is None else request.max_tokens
        wanted = 1 if _only_echoes(request) else asked
        budget = OutputBudget("max_tokens", wanted, _COMPLETION_TOKENS)
        if request.echo and request.logprobs is not None:
            request.prompt_logprobs = max(request.logprobs, request.prompt_logprobs or 0)
        grammar = await self._frontend.grammar(request)
        generations: list[Generation] = []
        for prompt in prompts:
            generations += self._frontend.generations(
                request,
                limits,
                prompt_token_ids=list(prompt.token_ids),
                caller=caller,
                budget=budget,
                logprobs=request.logprobs,
                request_id=exchange.request_id,
                cache_salt=request.cache_salt or "",
                grammar=grammar,
            )
        return AskedCompletion(request, prompts, generations)

    async def read_chat(self, body: bytes, exchange: Exchange) -> AskedChat:
        """The choices that a body of /v1/chat/completions asks for.

        Raises:
            InvalidRequest: naming the field at fault.
        """
        request = self._chats.parse(body)
        self._check(request)
        if request.top_logprobs is not None and not request.logprobs:
            raise InvalidRequest("top_logprobs: needs logprobs to be true", field="top_logprobs")
        check_tools(request)
        calls = calls_of(request, self._model)
        caller = self._caller(request, exchange)
        limits = self._frontend.limits()
        text = self._model.render(
            request.messages,
            add_generation_prompt=request.add_generation_prompt,
            variables=request.chat_template_kwargs,
            tools=tools_as_sent(body) if request.tools else (),
        )
        prompt = await self._model.encode(
            text, "messages", limits, add_special_tokens=request.add_special_tokens or False
        )
        if request.max_completion_tokens is not None:
            budget = OutputBudget("max_completion_tokens", request.max_completion_tokens, None)
        else:
            budget = OutputBudget("max_tokens", request.max_tokens, None)
        if calls is None:
            grammar = await self._frontend.grammar(request)
        else:
            grammar = await call_grammar(request, calls, self._model)
        generations = self._frontend.generations(
            request,
            limits,
            prompt_token_ids=prompt,
            caller=caller,
            budget=budget,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            request_id=exchange.request_id,
            cache_salt=request.cache_salt or "",
            grammar=grammar,
            shown_tokens=shown_tokens(calls, self._model),
        )
        return AskedChat(request, calls, generations)

    async def tokenize(self, exchange: Exchange) -> None:
        body = await exchange.json_body()
        request = self._tokenizes.parse(body)
        self._model.check_name(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise InvalidRequest("prompt: give either prompt or messages", field="prompt")
        if request.messages is not None:
            text = self._model.render(
                request.messages,
                add_generation_prompt=request.add_generation_prompt,
                variables=request.chat_template_kwargs,
                tools=tools_as_sent(body) if request.tools else (),
            )
            special = request.add_special_tokens or False
        else:
            text = request.prompt or ""
            special = request.add_special_tokens is not False
        tokenizer = self._model.require_tokenizer("prompt")
        token_ids = await self._model.tokenize(text, "prompt", add_special_tokens=special)
        content: dict[str, object] = {
            "count": len(token_ids),
            "max_model_len": self._model.limits.max_model_len,
            "tokens": token_ids,
        }
        if request.return_token_strs:
            content["token_strs"] = [tokenizer.token_text(token_id) for token_id in token_ids]
        await exchange.json(200, content)

    async def detokenize(self, exchange: Exchange) -> None:
        request = self._detokenizes.parse(await exchange.json_body())
        self._model.check_name(request.model)
        if request.tokens:
            check_prompt(request.tokens, self._model.limits, "tokens")
        tokenizer = self._model.require_tokenizer("tokens")
        await exchange.json(200, {"prompt": tokenizer.decode(request.tokens, skip_special_tokens=False)})

    async def models(self, exchange: Exchange) -> None:
        await exchange.json(200, {"object": "list", "data": [self._model_shape()]})

    async def one_model(self, exchange: Exchange, name: str) -> None:
        self._model.check_name(name)
        await exchange.json(200, self._model_shape())

    def _model_shape(self) -> dict[str, object]:
        return {
            "id": self._model.name,
            "object": "model",
            "created": self._model.created,
            "owned_by": "baton",
            "root": self._model.name,
            "parent": None,
            "max_model_len": self._frontend.limits().max_model_len,
        }

    def _check(self, request: RequestFields) -> None:
        self._model.check_name(request.model)
        if request.stream_options is not None and not request.stream:
            raise InvalidRequest("stream_options: only when stream is true", field="stream_options")
        if request.prompt_logprobs is not None and request.stream:
            raise InvalidRequest("prompt_logprobs: only when stream is false", field="prompt_logprobs")

    def _caller(self, request: RequestFields, exchange: Exchange) -> Caller:
        return self._frontend.callers.read(
            exchange.header, exchange.grant, slo=request.slo, service_tier=request.service_tier
        )

    def _head(self, kind: str, exchange: Exchange) -> Head:
        return Head(f"{kind}-{exchange.request_id}", int(time.time()), self._model.name, _FINGERPRINT)

    def _names(self, request: RequestFields) -> LogprobShapes:
        return LogprobShapes(self._model.tokenizer, as_token_ids=request.return_tokens_as_token_ids or False)

    async def _prompts(self, request: CompletionRequest, limits: ModelLimits) -> list[EchoedPrompt]:
        """The prompts of a completions request, told apart by what is in the list."""
        given = request.prompt
        if isinstance(given, str):
            return [await self._text_prompt(given, request, limits)]
        kinds = set(map(type, given))
        if not given:
            raise InvalidRequest("prompt: must not be empty", field="prompt")
        if kinds == {int}:
            return [self._token_prompt([item for item in given if isinstance(item, int)], request, limits)]
        if len(given) > _MAX_PROMPTS:
            raise InvalidRequest(f"prompt: at most {_MAX_PROMPTS} prompts, got {len(given)}", field="prompt")
        if kinds == {str}:
            return [await self._text_prompt(str(item), request, limits) for item in given]
        if kinds == {list}:
            return [self._token_prompt(item, request, limits) for item in given if isinstance(item, list)]
        raise InvalidRequest(
            "prompt: must be a string, a list of strings, a list of token ids or a list of such lists",
            field="prompt",
        )

    async def _text_prompt(self, text: str, request: CompletionRequest, limits: ModelLimits) -> EchoedPrompt:
        token_ids = await self._model.encode(
            text, "prompt", limits, add_special_tokens=request.add_special_tokens is not False
        )
        return EchoedPrompt(text, token_ids)

    def _token_prompt(
        self, token_ids: list[int], request: CompletionRequest, limits: ModelLimits
    ) -> EchoedPrompt:
        check_prompt(token_ids, limits, "prompt")
        text = ""
        if request.echo and self._model.tokenizer is not None:
            text = self._model.tokenizer.decode(
                token_ids, skip_special_tokens=request.skip_special_tokens is not False
            )
        return EchoedPrompt(text, token_ids)


class _Answer:
    """Writes one request's answer. Choices `i * per_prompt` and up answer prompt i."""

    def __init__(
        self,
        frontend: Frontend,
        exchange: Exchange,
        shapes: _Shapes,
        generations: Sequence[Generation],
        *,
        per_prompt: int,
    ) -> None:
        self._frontend = frontend
        self._exchange = exchange
        self._shapes = shapes
        self._generations = generations
        self._per_prompt = per_prompt
        self._unfinished = len(generations)
        self._prompt_tokens = sum(len(g.prompt_token_ids) for g in generations[::per_prompt])
        self._completion_tokens = 0
        self._cached_tokens = 0
        self._without_output = False

    async def write(self, request: RequestFields, *, without_output: bool) -> None:
        """Run the choices and write what they say; `without_output` keeps the prompt's echo alone."""
        self._without_output = without_output
        async with self._exchange.while_connected(self._generations[0].caller.timeout_s):
            if request.stream:
                await self._stream(request)
            else:
                await self._collect()

    async def _collect(self) -> None:
        choices: list[list[Piece]] = [[] for _ in self._generations]
        headers: Headers = {}

        async def emit(index: int, placed: Placed, pieces: Sequence[Piece]) -> None:
            nonlocal headers
            headers = headers or _placed_headers(placed)
            choices[index] += [self._count(index, placed, piece) for piece in pieces]

        await self._frontend.run(self._generations, emit)
        await self._exchange.json(200, self._shapes.whole(choices, self._usage()), headers)

    async def _stream(self, request: RequestFields) -> None:
        exchange, shapes = self._exchange, self._shapes
        options = request.stream_options
        last_usage = options is not None and options.include_usage
        every_usage = last_usage and options is not None and options.continuous_usage_stats

        async def emit(index: int, placed: Placed, pieces: Sequence[Piece]) -> None:
            if not exchange.started:
                await exchange.start_events(_placed_headers(placed))
            events = b""
            for piece in pieces:
                piece = self._count(index, placed, piece)
                events += shapes.chunk(index, piece, self._usage() if every_usage else None)
            if self._unfinished:
                await exchange.events(events, last=False)
                return
            # What ends the stream travels with the last piece.
            if last_usage:
                events += shapes.usage_chunk(self._usage())
            await exchange.events(events + DONE, last=True)

        await self._frontend.run(self._generations, emit)

    def _count(self, index: int, placed: Placed, piece: Piece) -> Piece:
        if self._without_output:
            piece = Piece(Delta("", (), (), FinishReason.LENGTH), piece.first, piece.prompt_logprobs)
        if piece.first and index % self._per_prompt == 0:
            self._cached_tokens += placed.cached_tokens
        self._completion_tokens += len(piece.delta.token_ids)
        if piece.delta.finish_reason is not None:
            self._unfinished -= 1
        return piece

    def _usage(self) -> Usage:
        return Usage(self._prompt_tokens, self._completion_tokens, self._cached_tokens)


def _only_echoes(request: CompletionRequest) -> bool:
    """Whether the prompt and its log-probabilities are all that is wanted."""
    return request.echo is True and request.max_tokens == 0


def _placed_headers(placed: Placed) -> Headers:
    headers = {
        "x-baton-prefill": placed.prefill,
        "x-baton-decode-worker": placed.decode_worker,
        "x-baton-cached-tokens": str(placed.cached_tokens),
        "x-baton-predicted-s": f"{placed.predicted_s:.4f}",
        "x-baton-queue-s": f"{placed.queue_s:.4f}",
    }
    if placed.prefill_worker:
        headers["x-baton-prefill-worker"] = placed.prefill_worker
    return headers
