"""The chat page as it is served and packaged."""

import re
import tomllib
from pathlib import Path

import httpx
from tests.server.conftest import Ask

from qwen3_next.engine import AsyncEngine
from qwen3_next.server import ServerConfig

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "qwen3_next"
FILES = sorted((PACKAGE / "server" / "page").iterdir())


def test_the_page_and_its_files_need_no_key_and_may_load_nothing_else(ask: Ask) -> None:
    async def use(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        paths = {file: "/" if file.name == "index.html" else f"/page/{file.name}" for file in FILES}
        for file, path in paths.items():
            answer = (await client.get(path)).raise_for_status()
            assert answer.content == file.read_bytes()
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none';")
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            for name in re.findall(r'(?:href|src)="(/[^"]+)"', file.read_text(encoding="utf-8")):
                assert name in paths.values()
        assert (await client.get("/page/../app.py")).status_code == 404

    ask(use, ServerConfig(api_keys=("key",)))


def test_the_distribution_contains_the_page() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packaged = {file for pattern in settings["package-data"]["qwen3_next"] for file in PACKAGE.glob(pattern)}
    assert len(FILES) > 3
    assert set(FILES) <= packaged
