"""An HTTP server that OpenAI's clients talk to."""

from qwen3_next.server.app import RequestError, ServerConfig, create_app
from qwen3_next.server.run import RunConfig, Server, run

__all__ = ["RequestError", "RunConfig", "Server", "ServerConfig", "create_app", "run"]
