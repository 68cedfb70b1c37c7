"""The page on a server without a model: a test says what the next answers are, and reads what the page sent."""

import asyncio
import json
import threading
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from qwen3_next.server.schema import ChatRequest
from qwen3_next.server.static import page_routes

Script = list[Any]


def delta(content: str = "", *, accepted: int = 0, finish: str | None = None, **more: str) -> dict[str, Any]:
    """A chunk of one choice."""
    drafts = {"tokens": max(accepted, 1), "accepted": accepted, "rejected": 0}
    return {"choices": [{"index": 0, "delta": {"content": content, **more}, "drafts": drafts, "finish_reason": finish}]}


DONE, WAIT = "[DONE]", "wait"
"""The end of a whole stream; a stop until `Stage.release` is called."""


class Stage:
    """Answers by scripts: a `Response`, or chunks of a stream."""

    def __init__(self) -> None:
        app = FastAPI(openapi_url=None)
        app.include_router(page_routes())
        app.add_api_route("/v1/models", self._models, methods=["GET"])
        app.add_api_route("/v1/chat/completions", self._answer, methods=["POST"])
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
        self.thread = threading.Thread(target=self.server.run)
        self.reset()

    def reset(self) -> None:
        self.scripts: deque[Response | Script] = deque()
        self.requests: list[ChatRequest] = []
        self.bodies: list[dict[str, Any]] = []
        self.gate = threading.Event()

    def release(self) -> None:
        """Let the stream that waits go on."""
        self.gate.set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def __enter__(self) -> "Stage":
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.set()
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(30)

    async def _models(self) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "on-stage"}]})

    async def _answer(self, request: Request) -> Response:
        data = await request.body()
        self.requests.append(ChatRequest.model_validate_json(data))
        self.bodies.append(json.loads(data))
        script = self.scripts.popleft()
        return script if isinstance(script, Response) else StreamingResponse(self._events(script))

    async def _events(self, script: Script) -> AsyncGenerator[str]:
        gate = self.gate
        for one in script:
            if one == WAIT:
                while not gate.is_set():
                    await asyncio.sleep(0.01)
            else:
                yield f"data: {one if one == DONE else json.dumps(one)}\n\n"
