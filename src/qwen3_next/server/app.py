"""The routes: OpenAI's completions over an `AsyncEngine`, and what those who run a server look at."""

import asyncio
import hmac
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from qwen3_next.engine import AsyncEngine
from qwen3_next.errors import CapacityError, DeadlineError, EngineError, InputError, OverloadedError, Qwen3NextError
from qwen3_next.server import bridge, responses, responses_schema, schema
from qwen3_next.server.logs import Logged, Report
from qwen3_next.server.metrics import Metrics
from qwen3_next.server.static import page_routes

Body = TypeVar("Body", bound=schema.Strict)
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How a server answers.

    Attributes:
        model_name: what clients call the model.
        api_keys: one of them must come with each request but those for its health; none: everyone is served.
        max_body_bytes: of a request.
        ready_seconds: that the trial behind /ready may take.
        request_timeout: seconds for the body of a request, and again from there to the end of its answer, waiting
            included; None for as long as it takes.
        log_prompts: write the fields of requests into the log, prompts among them.

    Raises:
        InputError: no time at all.
    """

    model_name: str = "qwen3-next"
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_body_bytes: int = 16 * 2**20
    ready_seconds: float = 30.0
    request_timeout: float | None = 600.0
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if self.request_timeout is not None and not 0 < self.request_timeout < float("inf"):
            raise InputError(
                f"request_timeout = {self.request_timeout} cannot be served. Allowed: seconds above 0. Leave it out "
                "for ten minutes."
            )


class RequestError(Exception):
    """A request that is answered with an error of HTTP."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def create_app(engine: AsyncEngine, config: ServerConfig | None = None) -> FastAPI:
    """The ASGI application; whoever calls this closes the engine.

    Its routes take raw bodies: pydantic reads them faster than `json`, and refuses what is nested too deeply.
    """
    app = _Application(title="qwen3-next", docs_url=None, redoc_url=None)
    routes = _Routes(engine, config or ServerConfig())
    app.include_router(page_routes())
    app.include_router(routes.open())
    app.include_router(routes.guarded(), dependencies=[Depends(routes.require_key)])
    for kind in (RequestError, ClientDisconnect, ValidationError, HTTPException, Qwen3NextError, Exception):
        app.add_exception_handler(kind, routes.explain)
    return app


class _Application(FastAPI):
    def build_middleware_stack(self) -> ASGIApp:
        """With the log outside of everything, where answers to unforeseen exceptions pass too."""
        return Logged(super().build_middleware_stack())

    def openapi(self) -> dict[str, Any]:
        """The description of the interface, with the bodies that routes read themselves."""
        found = super().openapi()
        found.setdefault("components", {})["schemas"] = schema.definitions(responses_schema.ResponsesRequest)
        return found


class _Routes:
    def __init__(self, engine: AsyncEngine, config: ServerConfig) -> None:
        self.engine, self.config = engine, config
        self.started = int(time.time())
        self.metrics = Metrics(engine)
        self._trial: asyncio.Task[str | None] | None = None

    def open(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/health", self.health, methods=["GET"])
        router.add_api_route("/ready", self.ready, methods=["GET"])
        return router

    def guarded(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/v1/models", self.models, methods=["GET"])
        router.add_api_route("/v1/models/{name:path}", self.model, methods=["GET"])
        router.add_api_route("/metrics", self.figures, methods=["GET"])
        router.add_api_route(
            "/v1/chat/completions", self.chat, methods=["POST"], openapi_extra=_takes(schema.ChatRequest)
        )
        for path, route, kind in (
            ("/v1/completions", self.complete, schema.CompletionRequest),
            ("/v1/responses", self.respond, responses_schema.ResponsesRequest),
            ("/tokenize", self.tokenize, schema.TokenizeRequest),
            ("/detokenize", self.detokenize, schema.DetokenizeRequest),
        ):
            router.add_api_route(path, route, methods=["POST"], openapi_extra=_takes(kind))
        router.add_api_route("/v1/embeddings", self.refuse, methods=["POST"])
        return router

    def require_key(self, request: Request) -> None:
        """Compare with every key, so that the time tells nothing."""
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        given = given.strip().encode("latin-1") if kind.lower() == "bearer" else b""
        right = [hmac.compare_digest(given, key.encode()) for key in self.config.api_keys]
        if self.config.api_keys and not any(right):
            raise RequestError(401, "a valid API key is needed: Authorization: Bearer <key>.", code="invalid_api_key")

    async def health(self) -> Response:
        is_healthy = self.engine.is_healthy
        if is_healthy:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "failed", "reason": self.engine.reason}, 503)

    async def ready(self) -> Response:
        """Whether a token can be written now; whoever asks meanwhile waits for the same trial."""
        if self._trial is None or self._trial.done():
            self._trial = asyncio.ensure_future(self._tried())
        reason = await asyncio.shield(self._trial)
        return JSONResponse({"ready": reason is None, "reason": reason}, 200 if reason is None else 503)

    async def _tried(self) -> str | None:
        llm = self.engine.llm
        params = llm.default_params(temperature=0, max_tokens=1)
        try:
            async with asyncio.timeout(self.config.ready_seconds):
                (completion,) = await self.engine.generate(llm.encoded("a"), params, priority=2**20)
            bridge.raise_for(completion)
        except TimeoutError:
            return f"no token within {self.config.ready_seconds} seconds"
        except Qwen3NextError as error:
            return str(error)
        return None

    async def figures(self) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, name: str) -> Response:
        self._require_model(name)
        return JSONResponse(self._card())

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, await self._body(request, schema.ChatRequest))

    async def complete(self, request: Request) -> Response:
        return await self._generate(request, await self._body(request, schema.CompletionRequest))

    async def respond(self, request: Request) -> Response:
        body = await self._body(request, responses_schema.ResponsesRequest)
        return await self._generate(request, body.as_chat(), body)

    async def tokenize(self, request: Request) -> Response:
        body = await self._body(request, schema.TokenizeRequest)
        self._require_model(body.model)
        tokens = await asyncio.to_thread(self.engine.llm.encoded, body.prompt)
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": self._max_context()})

    async def detokenize(self, request: Request) -> Response:
        body = await self._body(request, schema.DetokenizeRequest)
        self._require_model(body.model)
        return JSONResponse({"prompt": await asyncio.to_thread(bridge.text_of, self.engine.llm, body.tokens)})

    async def refuse(self, request: Request) -> Response:
        message = f"{request.url.path} is not served. Use /v1/chat/completions, /v1/completions or /v1/responses."
        raise RequestError(404, message, code="not_served")

    async def _generate(
        self,
        request: Request,
        body: schema.ChatRequest | schema.CompletionRequest,
        asked: responses_schema.ResponsesRequest | None = None,
    ) -> Response:
        """Answer in the shape of the body, or of the response that was asked for and became this chat."""
        self._require_model(body.model)
        job = await asyncio.to_thread(bridge.job_of, self.engine.llm, body)
        self._require_room(job)
        report: Report = request.scope["report"]
        report.details |= {"stream": body.stream} | ({"request": body.model_dump()} if self.config.log_prompts else {})
        if not body.stream:
            rest = self.config.request_timeout, report.details
            if asked is None:
                return JSONResponse(await _unless_gone(request, bridge.answer(self.engine, job, *rest)))
            return JSONResponse(await _unless_gone(request, responses.answer(self.engine, job, asked, *rest)))
        updates = self.metrics.timed(bridge.updates_of(self.engine, job, self.config.request_timeout))
        try:
            first = await _unless_gone(request, anext(updates))  # what is refused has a status of its own
            bridge.raise_for(first.update)
        except BaseException:
            await updates.aclose()
            raise
        if asked is None:
            return _Events(updates, bridge.chunks(self.engine, job, updates, first, report.details))
        return _Events(updates, responses.chunks(self.engine, job, asked, updates, first, report.details))

    async def _body(self, request: Request, kind: type[Body]) -> Body:
        most, data = self.config.max_body_bytes, bytearray()
        too_long = RequestError(413, f"the request is longer than the {most} bytes that are allowed. Shorten it.")
        if int(request.headers.get("content-length", 0)) > most:
            raise too_long  # before a client that asks first has sent it
        try:
            async with asyncio.timeout(self.config.request_timeout):
                async for piece in request.stream():
                    data += piece
                    if len(data) > most:
                        raise too_long
        except TimeoutError as error:
            raise RequestError(408, f"no whole body after {self.config.request_timeout} seconds.") from error
        return kind.model_validate_json(bytes(data))

    def _require_room(self, job: bridge.Job) -> None:
        asked, most = len(job.prompts) * job.params.n, self.engine.most_open
        if asked > most:
            raise InputError(
                f"n = {job.params.n} answers to {len(job.prompts)} prompts cannot be open at once. Allowed: {most} in "
                "all, which are --sequences and --max-waiting. Send several requests."
            )

    def _require_model(self, name: str | None) -> None:
        if name not in (None, self.config.model_name):
            message = f"the model {name!r} is not here. Allowed: {self.config.model_name!r}."
            raise RequestError(404, message, param="model", code="model_not_found")

    def _card(self) -> bridge.Json:
        name = {"id": self.config.model_name, "object": "model", "created": self.started}
        return {**name, "owned_by": "qwen3-next", "max_model_len": self._max_context()}

    def _max_context(self) -> int | None:
        return self.engine.llm.engine.division.limits.max_context

    async def explain(self, request: Request, error: Exception) -> Response:
        """Any exception as an answer."""
        status, param, code = 500, None, None
        message = str(error)
        headers: dict[str, str] = {}
        match error:
            case RequestError():
                status, param, code = error.status, error.param, error.code
            case HTTPException():
                status, message = error.status_code, f"{request.method} {request.url.path}: {error.detail}."
            case ValidationError():
                is_response = error.title == responses_schema.ResponsesRequest.__name__
                refused = responses_schema.REFUSED if is_response else schema.REFUSED
                status, (message, param) = 400, schema.explained(error, refused)
            case CapacityError():
                status, code = 400, "context_length_exceeded"
            case InputError():
                status = 400
            case OverloadedError():
                status, code, headers = 429, "overloaded", {"Retry-After": "1"}
            case ClientDisconnect():  # nobody reads this
                status = 499
            case DeadlineError():
                status, code = 504, "timeout"
            case EngineError():
                status, headers = 503, {"Retry-After": "1"}
            case Qwen3NextError():
                status = 500
            case _:
                message = "the server failed; its log says how."
        kind = {401: "authentication_error", 429: "overloaded_error"}.get(
            status, "invalid_request_error" if status < 500 else "server_error"
        )
        self.metrics.errors.labels(status).inc()
        if status >= 500:  # what is wrong with a request may quote it
            request.scope["report"].details["error"] = f"{type(error).__name__}: {error}"
        return JSONResponse(bridge.failure(message, kind, param, code), status, headers)


def _takes(kind: type[schema.Strict]) -> bridge.Json:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
    return {"requestBody": {"required": True, "content": content}}


class _Events(StreamingResponse):
    """A stream whose source is closed however it ends, begun or not, so that the request leaves the engine at once."""

    def __init__(self, updates: AsyncGenerator[bridge.Part], chunks: AsyncGenerator[str]) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.updates, self.chunks = updates, chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.updates), aclosing(self.chunks):
            await super().__call__(scope, receive, send)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Wait for some work, but no longer than the client does.

    Raises:
        ClientDisconnect: the client left, and the work was cancelled.
    """
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_leaving(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, leaving):
            one.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _leaving(request: Request) -> None:
    """Return when the client leaves; its request was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
