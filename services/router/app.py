"""The ASGI app: which path and method goes where, and how every failure becomes an OpenAI error."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from baton import __version__
from baton.errors import BatonError, Unavailable
from baton.openai.answer import DONE, error_shape, event
from baton.openai.openapi import document
from baton.security.access import Access
from services.router.admission import reason_of, shutting_down
from services.router.explain import RouteExplainer
from services.router.frontend import Frontend
from services.router.http import ClientGone, Exchange, MethodNotAllowed, NotFound, Receive, Scope, Send
from services.router.openai_api import OpenAiApi
from services.router.ui.page import Page

log = logging.getLogger(__name__)

Handler = Callable[[Exchange], Awaitable[None]]
Routes = Mapping[str, Mapping[str, Handler]]
_ONE_MODEL = "/v1/models/"


class App:
    """What clients see. All but what says how the process is doing needs an API key, where there are keys."""

    def __init__(self, frontend: Frontend, access: Access, *, max_body_bytes: int) -> None:
        self._frontend = frontend
        self._access = access
        self._max_body_bytes = max_body_bytes
        self._api = OpenAiApi(frontend)
        self._open: Routes = {
            "/health": {"GET": _alive},
            "/live": {"GET": _alive},
            "/ready": {"GET": self._ready},
            "/openapi.json": {"GET": _openapi},
        }
        self._keyed: Routes = {
            "/v1/completions": {"POST": self._api.completions},
            "/v1/chat/completions": {"POST": self._api.chat},
            "/v1/models": {"GET": self._api.models},
            "/tokenize": {"POST": self._api.tokenize},
            "/detokenize": {"POST": self._api.detokenize},
            "/version": {"GET": _version},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, self._max_body_bytes)
        try:
            await self._handler(exchange)(exchange)
        except ClientGone:
            log.debug("request %s: the client left", exchange.request_id)
        except BatonError as error:
            self._frontend.metrics.rejected(reason_of(error))
            await _write_error(exchange, error)
        except asyncio.CancelledError:
            if not self._frontend.door.closed:
                raise
            # Stopping, and this has had its grace.
            await _write_error(exchange, shutting_down())
        except Exception:
            log.exception("request %s failed", exchange.request_id)
            internal = BatonError(f"internal error; the router's log has it under {exchange.request_id}")
            self._frontend.metrics.rejected(reason_of(internal))
            await _write_error(exchange, internal)

    def _handler(self, exchange: Exchange) -> Handler:
        path = exchange.path
        handlers = self._open.get(path)
        if handlers is None:
            exchange.grant = self._access.admit(exchange.header("authorization"))
            handlers = self._keyed.get(path)
        if handlers is None and path.startswith(_ONE_MODEL):
            handlers = {"GET": self._one_model}
        if handlers is None:
            raise NotFound(f"no such path: {path[:128]}")
        handler = handlers.get("GET" if exchange.method == "HEAD" else exchange.method)
        if handler is None:
            allowed = ", ".join(handlers)
            raise MethodNotAllowed(f"{path} takes {allowed}, not {exchange.method}", allowed=allowed)
        return handler

    async def _one_model(self, exchange: Exchange) -> None:
        await self._api.one_model(exchange, exchange.path.removeprefix(_ONE_MODEL))

    async def _ready(self, exchange: Exchange) -> None:
        """200 when a request could be placed now."""
        try:
            if self._frontend.door.closed:
                raise Unavailable("the router is shutting down")
            self._frontend.placer.check_ready()
        except Unavailable as error:  # no request was refused, so none is counted
            await exchange.error(error)
            return
        await exchange.json(200, {"status": "ready"})


class OwnApp(App):
    """What is served on the port that a router shares with nobody: all of the above, and what is for those
    who run it. Whoever reaches the port may ask for that."""

    def __init__(
        self, frontend: Frontend, access: Access, page: Page, *, policy: str, max_body_bytes: int
    ) -> None:
        super().__init__(frontend, access, max_body_bytes=max_body_bytes)
        explainer = RouteExplainer(frontend, self._api, policy)
        self._open = {
            **self._open,
            "/debug/route": {"GET": explainer.get, "POST": explainer.post},
            "/metrics": {"GET": self._metrics},
            **page.routes(),
        }

    async def _metrics(self, exchange: Exchange) -> None:
        page, content_type = self._frontend.metrics.render()
        await exchange.respond(200, page, content_type)


async def _write_error(exchange: Exchange, error: BatonError) -> None:
    if exchange.started:
        await exchange.events(event(error_shape(error)) + DONE, last=True)
    else:
        await exchange.error(error)


async def _alive(exchange: Exchange) -> None:
    await exchange.json(200, {"status": "ok"})


async def _openapi(exchange: Exchange) -> None:
    await exchange.json(200, document())


async def _version(exchange: Exchange) -> None:
    await exchange.json(200, {"version": __version__})
