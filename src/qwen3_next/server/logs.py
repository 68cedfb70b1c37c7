"""One JSON object a line on stderr for everything that happens, and the names of requests."""

import json
import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("qwen3_next.server")

_NAME = re.compile(r"[A-Za-z0-9._:-]{1,64}")


@dataclass(eq=False)
class Report:
    """What is logged of one request.

    Attributes:
        name: its `X-Request-Id`: the client's where that is short and plain, or else a new one.
        details: what its route found out, such as counts of tokens.
    """

    name: str
    details: dict[str, Any] = field(default_factory=dict[str, Any])


class Formatter(logging.Formatter):
    """A record as a line of JSON: time, level, event, and the fields that came with it."""

    def format(self, record: logging.LogRecord) -> str:
        """Text of an exception included, so that a line stays a line."""
        content = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content, default=str)


def configure() -> None:
    """Write this package's records, uvicorn's and everybody's warnings to stderr; for a process that only serves."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in ("qwen3_next", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)


class Logged:
    """An application whose requests have names and are logged at their end; `scope["report"]` is theirs."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        report = scope["report"] = Report(given if _NAME.fullmatch(given) else uuid.uuid4().hex)
        start, status = time.perf_counter(), 499  # of a client that left before its answer began

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = report.name
            await send(message)

        try:
            await self.app(scope, receive, named)
        finally:
            route = getattr(scope.get("route"), "path", None)  # not the path, which a client may fill with anything
            fields = {"request_id": report.name, "method": scope["method"], "route": route, "status": status}
            fields |= {"seconds": round(time.perf_counter() - start, 6)} | report.details
            level = logging.ERROR if status >= 500 else logging.INFO
            logger.log(level, "request", extra={"fields": fields})
