"""Makes docs/page.png: a conversation with the model in the box, accepted drafts marked. `make screenshot`."""

from pathlib import Path

from tests.page.browser import Page
from tests.page.conftest import Server, browser

GOAL = Path(__file__).parents[2] / "docs" / "page.png"
SETTINGS = {"temperature": "0", "max_tokens": "80"}
TURNS = ("I want to book a table for two.", "Tomorrow at 7 pm, please.", "Yes, that is right.")


def main() -> None:
    server, driver = Server("--drafts", "2"), browser()
    try:
        page = Page(driver)
        page.open(server.address())
        for name, value in SETTINGS.items():
            page.set(name, value)
        for turn in TURNS:
            page.ask(turn)
        driver.save_screenshot(str(GOAL))
    finally:
        driver.quit()
        server.end()


if __name__ == "__main__":
    main()
