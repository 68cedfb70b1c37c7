"""The chat page in a browser, with the model in the box behind it."""

import httpx
from selenium.webdriver import Keys
from tests.page.browser import CONTROLS, Page
from tests.page.conftest import KEY

LONG = {"temperature": "5", "top_p": "1", "repetition_penalty": "1", "max_tokens": "4000"}
"""Settings with which the model hardly ever comes to an end."""


def open_requests(address: str) -> float:
    text = httpx.get(f"{address}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith("qwen3_next_open_requests ")))


def go_on_for_long(page: Page) -> None:
    for name, value in LONG.items():
        page.set(name, value)


def test_an_answer_streams_in_with_its_figures(page: Page, servers: dict[str, str]) -> None:
    page.open(servers["open"])
    go_on_for_long(page)
    page.say("I need a table for two.")
    page.until(lambda: page.answers and len(page.answers[0]) > 20, "the beginning of an answer")
    assert page.is_busy
    beginning = page.answers[0]
    page.until(lambda: len(page.answers[0]) > 2 * len(beginning), "more of it")
    assert page.answers[0].startswith(beginning)
    assert "tokens/s" in page.find(".figures").text
    assert page.find("article.assistant").get_attribute("aria-busy") == "true"
    assert page.questions == ["I need a table for two."]
    page.button("Stop").click()


def test_stop_keeps_what_came_and_frees_the_engine(page: Page, servers: dict[str, str]) -> None:
    page.open(servers["open"])
    go_on_for_long(page)
    page.say("Hello!")
    page.until(lambda: page.answers and len(page.answers[0]) > 20, "the beginning of an answer")
    page.button("Stop").click()
    page.until(lambda: not page.is_busy, "the end of the answer")
    kept = page.answers[0]
    page.until(lambda: open_requests(servers["open"]) == 0, "the engine to be free")
    assert page.answers == [kept]
    assert "stopped" in page.find(".figures").text
    assert (page.focus, page.problem) == ("text", "")


def test_regenerate_writes_the_last_answer_anew(page: Page, servers: dict[str, str]) -> None:
    page.open(servers["open"])
    for name, value in {"temperature": "2", "max_tokens": "30", "seed": "1"}.items():
        page.set(name, value)
    first = page.ask("Hello!")
    page.button("Regenerate").click()
    page.until(lambda: page.answers and not page.is_busy, "an answer")
    assert page.answers == [first], "the same seed"
    page.set("seed", "2")
    page.button("Regenerate").click()
    page.until(lambda: page.answers and not page.is_busy, "an answer")
    assert len(page.answers) == 1
    assert page.answers != [first]
    assert page.questions == ["Hello!"]


def test_accepted_drafts_are_marked_and_counted(page: Page, servers: dict[str, str]) -> None:
    page.open(servers["open"])
    page.set("temperature", "0")
    page.set("max_tokens", "60")
    answer = page.ask("Book a table for two at seven.")
    marked, others = page.all(".assistant .draft"), page.all(".assistant .text span:not(.draft)")
    assert marked
    assert others
    assert "".join(one.get_attribute("textContent") or "" for one in page.all(".assistant .text span")) == answer
    assert "drafts accepted (" in page.find(".figures").text
    colours = {one.value_of_css_property("background-color") for one in (marked[0], others[0])}
    assert len(colours) == 2
    page.find("#show-drafts").click()
    assert marked[0].value_of_css_property("background-color") == others[0].value_of_css_property("background-color")


def test_conversations_survive_a_reload(page: Page, servers: dict[str, str]) -> None:
    page.open(servers["open"])
    page.set("max_tokens", "12")
    page.set("system", "Be brief.")
    first = page.ask("Hello!")
    page.button("New conversation").click()
    assert page.answers == []
    assert page.find("#system").get_attribute("value") == ""
    second = page.ask("What is on TV?")
    marks = len(page.all(".draft"))
    page.driver.refresh()
    assert page.answers == [second]
    assert len(page.all(".draft")) == marks
    assert page.find("#max_tokens").get_attribute("value") == "12"
    page.button("Hello!").click()
    assert page.answers == [first]
    assert page.find("#system").get_attribute("value") == "Be brief."
    page.button("Delete: Hello!").click()
    page.driver.switch_to.alert.accept()
    page.driver.refresh()
    assert page.answers == [second]


def test_a_key_is_asked_for_and_then_used(page: Page, servers: dict[str, str]) -> None:
    page.open(servers["guarded"])
    page.until(lambda: page.focus == "key", "the field for a key")
    assert "needs an API key" in page.problem
    page.keys("wrong", Keys.ENTER)
    page.until(lambda: "does not accept" in page.problem, "a word about the wrong key")
    page.write_over(KEY, Keys.ENTER)
    page.until(lambda: page.focus == "text", "the key to be accepted")
    assert not page.find("#key-form").is_displayed()
    assert page.problem == ""
    page.set("max_tokens", "8")
    assert page.ask("Hello!")
    page.driver.refresh()
    assert page.ask("Once more."), "the key was kept"


def test_overload_is_told_with_the_time_to_wait(page: Page, servers: dict[str, str]) -> None:
    page.open(servers["guarded"])
    page.until(lambda: page.focus == "key", "the field for a key")
    page.keys(KEY, Keys.ENTER)
    page.until(lambda: page.focus == "text", "the key to be accepted")
    page.set("max_tokens", "8")
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"model": "qwen3-next", "prompt": "Once", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{servers['guarded']}/v1/completions", json=body, headers=headers, timeout=60) as other:
        lines = other.iter_lines()
        next(lines)
        page.say("Hello!")
        page.until(lambda: "429" in page.problem, "the refusal")
        assert "Try again in 1 second." in page.problem
        assert page.answers == []
        lines.close()
    page.until(lambda: open_requests(servers["guarded"]) == 0, "the engine to be free")
    page.button("Try again").click()
    page.until(lambda: page.answers and not page.is_busy, "an answer")
    assert page.problem == ""
    assert page.questions == ["Hello!"]


def test_every_control_has_a_name_and_the_page_its_landmarks(page: Page, servers: dict[str, str]) -> None:
    page.open(servers["open"])
    page.set("max_tokens", "8")
    page.ask("Hello!")
    shown = [one for one in page.all(CONTROLS) if one.is_displayed()]
    assert len(shown) > 15
    assert [one.get_attribute("outerHTML") for one in shown if not one.accessible_name] == []
    roles = [one.aria_role for one in page.all("header, nav, main, aside, #messages, #status")]
    assert roles == ["banner", "navigation", "main", "log", "status", "complementary"]
    assert page.find("#problem").get_attribute("role") == "alert"
    assert page.find("#messages").get_attribute("aria-live") == "polite"
    assert page.find("html").get_attribute("lang") == "en"


def test_everything_comes_from_the_server_itself(page: Page, servers: dict[str, str]) -> None:
    page.open(servers["open"])
    page.set("max_tokens", "8")
    page.ask("Hello!")
    loaded = page.run("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert len(loaded) > 5
    assert [name for name in loaded if not name.startswith(servers["open"])] == []
