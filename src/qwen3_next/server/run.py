"""A server on a port, from its first request to an end at which nobody is left without an answer."""

import asyncio
import ipaddress
import socket
from dataclasses import dataclass, field

import uvicorn

from qwen3_next.engine import LLM, AsyncEngine
from qwen3_next.errors import InputError
from qwen3_next.server.app import ServerConfig, create_app
from qwen3_next.server.logs import configure

GRACE = 10
"""Seconds that the last answers may take on their way to clients that read slowly."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a server listens and how it ends.

    Attributes:
        port: 0 for one that is free.
        is_insecure: serve everyone who reaches the host, without keys.
        max_waiting: requests that may be open beyond those that are computed at the same time.
        max_restarts: of the engine after steps that fail, in five minutes; then the server stays not ready.
        drain_seconds: that open requests have to end by themselves; then the rest is answered with an error.

    Raises:
        InputError: others than this machine would be served without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    is_insecure: bool = False
    max_waiting: int = 1024
    max_restarts: int = 5
    drain_seconds: float = 30.0
    server: ServerConfig = field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        if not (self.server.api_keys or self.is_insecure or _is_loopback(self.host)):
            raise InputError(
                f"host = {self.host!r} without API keys would serve everyone who reaches it. Allowed: 127.0.0.1. Give "
                "--api-key-file, or --insecure where something else guards it."
            )


class Server(uvicorn.Server):
    """uvicorn, which waits for open requests, and an engine, which ends those that take too long."""

    def __init__(self, engine: AsyncEngine, config: RunConfig) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(engine, config.server),
                host=config.host,
                port=config.port,
                server_header=False,
                access_log=False,  # `Logged` says more
                log_config=None,
                timeout_graceful_shutdown=round(config.drain_seconds) + GRACE,
            )
        )
        self.engine, self.drain_seconds = engine, config.drain_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more, and wait for what is open."""
        end = asyncio.ensure_future(self._end())
        await super().shutdown(sockets)
        end.cancel()

    async def _end(self) -> None:
        await asyncio.sleep(self.drain_seconds)
        await self.engine.close(drain=False)


def run(llm: LLM, config: RunConfig) -> None:
    """Serve until SIGINT or SIGTERM; the model itself must not be used meanwhile.

    Raises:
        InputError: a negative number of waiting requests or restarts.
    """

    configure()

    async def serve() -> None:
        engine = AsyncEngine(llm, max_waiting=config.max_waiting, max_restarts=config.max_restarts)
        try:
            await Server(engine, config).serve()
        finally:
            await engine.close(drain=False)

    asyncio.run(serve())


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
