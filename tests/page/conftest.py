"""A browser without a screen, servers with the model in the box, and a stage where a test says what is answered."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from tests.page.browser import Page
from tests.page.stage import Stage

COMMAND = [sys.executable, "-c", "import sys; from qwen3_next.cli import main; sys.exit(main())", "serve"]
KEY = "a-key-for-the-test"


@pytest.fixture(scope="session")
def driver() -> Generator[webdriver.Chrome]:
    driver = browser()
    yield driver
    driver.quit()


def browser() -> webdriver.Chrome:
    program, controller = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or controller is None:
        pytest.fail("these tests need chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, Service(controller))


@pytest.fixture
def page(driver: webdriver.Chrome) -> Generator[Page]:
    """Afterwards the browser must not have complained of anything but answers with errors."""
    driver.get_log("browser")
    yield Page(driver)
    answers = re.compile(r"the server responded with a status of [45]\d\d|net::ERR_")
    complaints = [one["message"] for one in driver.get_log("browser") if one["level"] in ("SEVERE", "WARNING")]
    assert [one for one in complaints if not answers.search(one)] == []


class Server:
    """`qwen3-next serve` in a process of its own."""

    def __init__(self, *options: str) -> None:
        command = [*COMMAND, "--port", "0", "--device", "cpu", "--drain-seconds", "0", *options]
        settings = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, env=settings, **pipes)

    def address(self) -> str:
        """Once it listens."""
        assert self.process.stderr is not None
        lines: list[str] = []
        for line in self.process.stderr:
            lines.append(line)
            if found := re.search(r"http://[\d.:]+", line):
                return found[0]
        pytest.fail("the server did not start:\n" + "".join(lines))

    def end(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=60)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Generator[dict[str, str]]:
    """Addresses of an open server that always drafts, and of one with a key that serves a single request at a time."""
    keys: Path = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    running = {
        "open": Server("--drafts", "2"),
        "guarded": Server("--api-key-file", str(keys), "--sequences", "1", "--max-waiting", "0"),
    }
    try:
        yield {name: server.address() for name, server in running.items()}
    finally:
        for server in running.values():
            server.end()


@pytest.fixture(scope="session")
def running_stage() -> Generator[Stage]:
    with Stage() as stage:
        yield stage


@pytest.fixture
def stage(running_stage: Stage) -> Stage:
    running_stage.reset()
    return running_stage
