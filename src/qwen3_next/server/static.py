"""The chat page: its files, and the headers that let it do nothing but talk with this server."""

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import Response

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def page_routes() -> APIRouter:
    """The page at / and what it loads below /page/; no key is needed to read it."""
    router = APIRouter()
    for file in (files("qwen3_next") / "server" / "page").iterdir():
        path = "/" if file.name == "index.html" else f"/page/{file.name}"
        router.add_api_route(
            path, _Served(file.read_bytes(), file.name), methods=["GET", "HEAD"], include_in_schema=False
        )
    return router


class _Served:
    """A file that was read once."""

    def __init__(self, content: bytes, name: str) -> None:
        self.content, self.kind = content, TYPES[name[name.rindex(".") :]]

    async def __call__(self) -> Response:
        return Response(self.content, media_type=self.kind, headers=HEADERS)
