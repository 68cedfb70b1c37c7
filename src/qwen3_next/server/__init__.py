"""An HTTP server that OpenAI's clients talk to."""

from qwen3_next.server.app import Gone, RequestError, ServerConfig, create_app

__all__ = ["Gone", "RequestError", "ServerConfig", "create_app"]
