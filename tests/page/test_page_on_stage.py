"""The chat page in a browser, with answers that a test has written: what it sends, shows, and says of errors."""

import pytest
from fastapi.responses import JSONResponse
from selenium.webdriver import Keys
from tests.page.browser import CONTROLS, Page
from tests.page.stage import DONE, WAIT, Stage, delta

END = [delta(finish="stop"), DONE]
MARKUP = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script> &amp; <b>bold</b>"


def failure(status: int, message: str, **headers: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message}}, status, headers)


def test_settings_and_turns_reach_the_request(page: Page, stage: Stage) -> None:
    stage.scripts += [[delta("One."), *END], [delta("Two."), *END]]
    page.open(stage.address)
    assert page.ask("Plain.") == "One."
    values = {"temperature": 0.5, "top_p": 0.75, "top_k": 7, "min_p": 0.125, "repetition_penalty": 1.25}
    values |= {"max_tokens": 33, "seed": -5}
    for name, value in values.items():
        page.set(name, str(value))
    page.set("system", "Be brief.")
    assert page.ask("Again.") == "Two."
    plain, given = stage.bodies
    assert plain == {
        "model": "on-stage",
        "messages": [{"role": "user", "content": "Plain."}],
        "stream": True,
        "stream_options": {"include_drafts": True},
    }
    assert {name: given[name] for name in values} == values
    turns = [("system", "Be brief."), ("user", "Plain."), ("assistant", "One."), ("user", "Again.")]
    assert [(one["role"], one["content"]) for one in given["messages"]] == turns


def test_markup_stays_text_wherever_it_comes_from(page: Page, stage: Stage) -> None:
    stage.scripts += [[delta(MARKUP, reasoning_content=MARKUP), delta(MARKUP, accepted=2), *END], failure(400, MARKUP)]
    page.open(stage.address)
    assert page.ask(MARKUP) == MARKUP + MARKUP
    assert page.questions == [MARKUP]
    assert page.find(".reasoning .text").get_attribute("textContent") == MARKUP
    page.say("Again.")
    page.until(lambda: MARKUP in page.problem, "the error")
    page.driver.refresh()
    assert page.answers == [MARKUP + MARKUP]
    assert page.all("main img, main script, main b") == []
    assert page.driver.title == "qwen3-next"


def test_reasoning_is_folded_away_and_not_sent_back(page: Page, stage: Stage) -> None:
    thoughts = [delta(reasoning_content=one) for one in ("First this, ", "then that.")]
    stage.scripts += [[*thoughts, delta("So."), *END], [delta("Yes."), *END]]
    page.open(stage.address)
    assert page.ask("Why?") == "So."
    text = page.find(".reasoning .text")
    assert not text.is_displayed()
    page.find(".reasoning summary").click()
    assert text.text == "First this, then that."
    page.ask("Really?")
    assert [one["content"] for one in stage.bodies[1]["messages"]] == ["Why?", "So.", "Really?"]


def test_lines_between_fences_become_code(page: Page, stage: Stage) -> None:
    text = "See:\n```python\ndef f():\n    return `1`\n```\nThat ``is`` all.\n``"
    halves = [delta(text[place : place + 2], accepted=place % 3) for place in range(0, len(text), 2)]
    stage.scripts += [[*halves, *END]]
    page.open(stage.address)
    page.ask("Code?")
    code = page.run("return [...document.querySelectorAll('.assistant pre code')].map((one) => one.textContent)")
    plain = page.run("return [...document.querySelectorAll('.assistant .text')].map((one) => one.textContent)")
    assert code == ["def f():\n    return `1`\n"]
    assert plain == ["See:\n", "That ``is`` all.\n``"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (failure(429, "3 requests are open.", **{"Retry-After": "7"}), ["429", "3 requests are open.", "in 7 seconds"]),
        (failure(503, "The engine failed."), ["503", "The engine failed."]),
        (failure(400, "temperature = -1 cannot be served."), ["400", "temperature = -1 cannot be served."]),
        ([delta("Half"), {"error": {"message": "the engine failed."}}, DONE], ["broke off", "the engine failed."]),
        ([delta("Half")], ["broke off", "before it was complete"]),
    ],
    ids=("overload", "unavailable", "refused", "error in the stream", "no end of the stream"),
)
def test_errors_are_told_and_can_be_tried_again(page: Page, stage: Stage, answer: object, said: list[str]) -> None:
    stage.scripts += [answer, [delta("Whole."), *END]]
    page.open(stage.address)
    page.say("Hello!")
    page.until(lambda: page.problem, "the error")
    assert [one for one in said if one not in page.problem] == []
    assert page.answers == (["Half"] if isinstance(answer, list) else [])
    page.button("Try again").click()
    page.until(lambda: page.answers == ["Whole."], "the answer")
    page.until(lambda: not page.is_busy, "its end")
    assert page.problem == ""
    assert [one["content"] for one in stage.bodies[1]["messages"]] == ["Hello!"]


def test_a_server_that_is_gone_is_told(page: Page) -> None:
    with Stage() as gone:
        page.open(gone.address)
        page.until(lambda: page.find("#model").text == "on-stage", "the model")
    page.say("Hello!")
    page.until(lambda: "cannot be reached" in page.problem, "the error")


def test_the_keyboard_is_enough(page: Page, stage: Stage) -> None:
    stage.scripts += [[delta("Slow"), WAIT, *END], [delta("New."), *END]]
    page.open(stage.address)
    assert page.focus == "text"
    page.keys("One")
    page.new_line()
    page.keys("Two", Keys.ENTER)
    page.until(lambda: page.answers == ["Slow"], "the answer")
    assert page.questions == ["One\nTwo"]
    page.keys("not yet", Keys.ENTER)
    assert len(stage.bodies) == 1, "while an answer comes nothing is sent"
    page.keys(Keys.ESCAPE)
    page.until(lambda: not page.is_busy, "the end")
    assert page.answers == ["Slow"]
    assert page.find("#text").get_attribute("value").strip() == "not yet"
    reached = set[str]()
    shown = {one.id for one in page.all(CONTROLS) if one.is_displayed()}
    for _ in range(2 * len(shown)):
        reached.add(page.driver.switch_to.active_element.id)
        page.keys(Keys.TAB)
    assert shown <= reached
    while page.driver.switch_to.active_element.accessible_name != "Regenerate":
        page.keys(Keys.TAB)
    page.keys(Keys.ENTER)
    page.until(lambda: page.answers == ["New."] and not page.is_busy, "another answer")
    assert page.focus == "text"


def test_the_last_question_can_be_edited(page: Page, stage: Stage) -> None:
    stage.scripts += [[delta("One."), *END], [delta("Two."), *END], [delta("Three."), *END]]
    page.open(stage.address)
    page.ask("First.")
    page.ask("Secnd.")
    page.button("Edit").click()
    assert (page.focus, page.find("#text").accessible_name) == ("text", "Edit message")
    page.keys(Keys.ESCAPE)
    assert page.find("#text").get_attribute("value") == ""
    page.button("Edit").click()
    page.write_over("Second.", Keys.ENTER)
    page.until(lambda: page.answers == ["One.", "Three."] and not page.is_busy, "the answer")
    assert page.questions == ["First.", "Second."]
    assert [one["content"] for one in stage.bodies[2]["messages"]] == ["First.", "One.", "Second."]


def test_light_and_dark_follow_the_system_or_the_button(page: Page, stage: Stage) -> None:
    def ground() -> str:
        return page.find("body").value_of_css_property("background-color")

    def system_is(scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    page.open(stage.address)
    system_is("light")
    light = ground()
    system_is("dark")
    dark = ground()
    assert light != dark
    page.button("Theme: system").click()
    assert ground() == light
    page.driver.refresh()
    assert ground() == light, "it was kept"
    system_is("light")
    page.button("Theme: light").click()
    assert ground() == dark
    page.button("Theme: dark").click()
    assert ground() == light
    system_is("")


def test_leaving_a_conversation_stops_its_answer_and_keeps_it(page: Page, stage: Stage) -> None:
    stage.scripts += [[delta("Begun"), WAIT, *END], [delta("Other."), *END]]
    page.open(stage.address)
    page.say("First.")
    page.until(lambda: page.answers == ["Begun"], "the answer")
    page.button("New conversation").click()
    assert page.answers == []
    assert page.ask("Second.") == "Other."
    page.button("First.").click()
    assert page.answers == ["Begun"]


def test_what_was_kept_wrongly_is_replaced(page: Page, stage: Stage) -> None:
    stage.scripts += [[delta("Here."), *END]]
    page.open(stage.address)
    page.run("addEventListener('pagehide', () => localStorage.setItem('qwen3-next', '{broken'))")
    page.driver.refresh()
    assert page.ask("Hello!") == "Here."
    (warning,) = page.driver.get_log("browser")
    assert "cannot be read" in warning["message"]
