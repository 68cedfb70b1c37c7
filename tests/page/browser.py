"""What a person does with the page and sees of it."""

from typing import Any

from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

CONTROLS = "button, input, textarea, summary, a[href], [tabindex]"
SECONDS = 20


class Page:
    """The page in a browser."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def open(self, address: str) -> None:
        """As somebody sees it who comes for the first time."""
        self.driver.get("about:blank")  # what was open keeps its state as it leaves
        self.driver.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": address, "storageTypes": "local_storage"})
        self.driver.get(address)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def button(self, name: str) -> WebElement:
        (found,) = [one for one in self.all("button") if one.is_displayed() and one.accessible_name == name]
        return found

    def until(self, condition: Any, what: str) -> Any:
        return WebDriverWait(self.driver, SECONDS, 0.02).until(lambda _: condition(), what)

    def keys(self, *keys: str) -> None:
        """Press keys, wherever the focus is."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def new_line(self) -> None:
        """Press Enter while Shift is held."""
        ActionChains(self.driver).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()

    def write_over(self, *keys: str) -> None:
        """Select all that stands in the field with the focus, and type."""
        ActionChains(self.driver).key_down(Keys.CONTROL).send_keys("a").key_up(Keys.CONTROL).send_keys(*keys).perform()

    def say(self, text: str) -> None:
        self.find("#text").send_keys(text, Keys.ENTER)

    def set(self, control: str, value: str) -> None:
        field = self.find(f"#{control}")
        field.clear()
        field.send_keys(value, Keys.TAB)

    def ask(self, text: str) -> str:
        """Say something and wait for the whole answer."""
        before = len(self.all("article.assistant"))
        self.say(text)
        self.until(lambda: len(self.all("article.assistant")) > before and not self.is_busy, "an answer")
        return self.answers[-1]

    @property
    def is_busy(self) -> bool:
        return self.find("#stop").is_displayed()

    @property
    def answers(self) -> list[str]:
        return self.run("return [...document.querySelectorAll('.assistant .body')].map((one) => one.textContent)")

    @property
    def questions(self) -> list[str]:
        return self.run("return [...document.querySelectorAll('.user .body')].map((one) => one.textContent)")

    @property
    def problem(self) -> str:
        return self.find("#problem").text if self.find("#problem").is_displayed() else ""

    @property
    def focus(self) -> str:
        """The id of the element with the focus."""
        return self.driver.switch_to.active_element.get_attribute("id") or ""
