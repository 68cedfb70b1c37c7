"""An answer taken apart: the same however it is cut, and nothing of it lost."""

import json
from collections.abc import Iterable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwen3_next.server.parsers import AnswerParser, Call, Parsed

TOOLS = {"weather", "time"}
WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'


def parsed(
    pieces: Iterable[str],
    tools: set[str] = TOOLS,
    *,
    most_calls: int | None = None,
    opened: bool | None = False,
) -> Parsed:
    parser = AnswerParser(tools, most_calls=most_calls, opened=opened)
    return sum([*(parser.push(piece) for piece in pieces), parser.finish()], Parsed())


def calls(*named: tuple[str, str]) -> list[Call]:
    return [Call(index=index, name=name, arguments=arguments) for index, (name, arguments) in enumerate(named)]


@pytest.mark.parametrize(
    ("text", "content", "named"),
    [
        ("Hello.\n", "Hello.\n", []),
        (WEATHER, "", [("weather", '{"city": "Paris"}')]),
        (f"I look.\n{WEATHER}\n{TIME}\n", "I look.", [("weather", '{"city": "Paris"}'), ("time", "{}")]),
        (f"{WEATHER}\n\nDone.\n", "\n\nDone.\n", [("weather", '{"city": "Paris"}')]),
        (
            '<tool_call>{"arguments":{"a":[1.50,1e400,"</tool_call>\\"\\\\"]} ,"name":"time"}</tool_call>',
            "",
            [("time", '{"a":[1.50,1e400,"</tool_call>\\"\\\\"]}')],
        ),
        (
            '<tool_call>{"name": "t\\u0069me", "arguments": {"ü": "\\ud83d😀"}}</tool_call>',
            "",
            [("time", '{"ü": "\\ud83d😀"}')],
        ),
    ],
)
def test_calls_are_found_and_their_arguments_stay_as_written(
    text: str, content: str, named: list[tuple[str, str]]
) -> None:
    assert parsed([text]) == Parsed(content=content, calls=calls(*named))


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "inside",
    [
        "",
        "weather(Paris)",
        "{}",
        "[1]",
        '{"name": "time"}',
        '{"name": "other", "arguments": {}}',
        '{"name": "time", "arguments": "{}"}',
        '{"name": "time", "arguments": {}, "id": 1}',
        '{"name": "time", "name": "time", "arguments": {}}',
        '{"name": "time", "arguments": {}}}',
        '{"name": "time", "arguments": {}} {}',
        '{"name": "time" "arguments": {}}',
        '{"name"; "time", "arguments": {}}',
        '{"name": "time", "arguments": {"a": NaN}}',
        '{"name": "time", "arguments": {"a": "\x01"}}',
        '{"name": "time", "arguments": {"a": "not closed}}',
        '{"name": 1, "arguments": {}}',
        '{[]: "time", "arguments": {}}',
        '{1: "time", "arguments": {}}',
        '{"name": "time", "arguments": {',
        '{"name": "time", "arguments": {},',
        '{"name": "time", "arguments": {"a": ' + DEEP + "}}",
    ],
    ids=lambda inside: inside[:40],
)
def test_what_is_no_call_is_text_as_it_was_written(inside: str) -> None:
    text = f"I look.\n <tool_call>\n{inside}\n</tool_call>\n"
    assert parsed([text]) == Parsed(content=text)
    assert parsed([text + TIME]) == Parsed(content=text.rstrip(), calls=calls(("time", "{}")))
    assert parsed([WEATHER + text]).content == text


@pytest.mark.parametrize("length", range(len(WEATHER)))
def test_a_call_that_was_cut_is_text(length: int) -> None:
    assert parsed([WEATHER[:length]]) == Parsed(content=WEATHER[:length])


def test_without_tools_a_call_is_text() -> None:
    assert parsed([WEATHER], set()) == Parsed(content=WEATHER)


def test_what_follows_the_most_calls_is_left_out() -> None:
    text = f"I look.\n{WEATHER}\n{TIME}\nDone."
    assert parsed([text], most_calls=1) == Parsed(content="I look.", calls=calls(("weather", '{"city": "Paris"}')))


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>\nSo.\n\nYes.\n</think>\n\nHello.", False, Parsed(reasoning="So.\n\nYes.", content="Hello.")),
        ("\n<think>So.</think>Hello.", False, Parsed(reasoning="So.", content="Hello.")),
        ("So.\n</think>\n\nHello.", True, Parsed(reasoning="So.", content="Hello.")),
        ("\n\n</think>\n\nHello.", True, Parsed(content="Hello.")),
        ("So, <think>\n", True, Parsed(reasoning="So, <think>\n")),
        ("</think>", True, Parsed()),
        ("  Hello <think>So.</think>", False, Parsed(content="  Hello <think>So.</think>")),
        (" \n<thin", False, Parsed(content=" \n<thin")),
        ("<think>So.</think>", None, Parsed(content="<think>So.</think>")),
        (f"{WEATHER}</think>{TIME}", True, Parsed(reasoning=WEATHER, calls=calls(("time", "{}")))),
        (f"<think>\n{TIME}\n</think>\n\n{TIME}", False, Parsed(reasoning=TIME, calls=calls(("time", "{}")))),
    ],
)
def test_reasoning_stands_before_the_rest(text: str, opened: bool | None, expected: Parsed) -> None:
    assert parsed([text], opened=opened) == expected


TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
JSON = st.recursive(
    st.none() | st.integers() | st.text() | st.sampled_from([*TAGS, '"', "\\", "é\n", "😀"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
WRITTEN = st.builds(
    lambda value, is_ascii: json.dumps(value, ensure_ascii=is_ascii),
    st.dictionaries(st.sampled_from(["city", "</tool_call>", "ü"]), JSON, max_size=2),
    st.booleans(),
)
ANY_CALL = st.builds(
    lambda name, arguments, blank: (
        f'<tool_call>{blank}{{"name": "{name}", "arguments": {arguments}}}{blank}</tool_call>'
    ),
    st.sampled_from(["time", "weather", "other"]),
    WRITTEN,
    st.sampled_from(["\n", "", " \t"]),
)
SCRAPS = st.text(max_size=4) | st.sampled_from(
    [*TAGS, "<tool_", "</th", "\n", " ", '"', "\\", "{", "Hello.", '{"name":']
)
ANSWERS = st.lists(SCRAPS | ANY_CALL, max_size=8).map("".join)


@st.composite
def cut(draw: st.DrawFn) -> list[str]:
    text = draw(ANSWERS)
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@given(cut(), st.sampled_from([False, True, None]), st.sampled_from([None, 1, 2]))
@example(list(f"<think>\nSo.\n</think>\n\nI look.\n{WEATHER}\n{TIME} "), False, None)
@example(list('<tool_call>{"name": "time", "arguments": {"</tool_call>": "\\\\\\""}}</tool_call>'), False, None)
def test_how_a_text_is_cut_changes_nothing(pieces: list[str], opened: bool | None, most_calls: int | None) -> None:
    whole = parsed(["".join(pieces)], opened=opened, most_calls=most_calls)
    assert parsed(pieces, opened=opened, most_calls=most_calls) == whole
    assert parsed("".join(pieces), opened=opened, most_calls=most_calls) == whole


@given(ANSWERS)
def test_every_character_is_somewhere(text: str) -> None:
    found = parsed([text], opened=None)
    assert [call.index for call in found.calls] == list(range(len(found.calls)))
    if not found.calls:
        assert found.content == text
    for call in found.calls:
        assert call.arguments in text
        assert isinstance(json.loads(call.arguments), dict)


@given(st.sampled_from(sorted(TOOLS)), WRITTEN, st.text().filter(lambda text: "<tool_call>" not in text))
def test_a_call_that_the_template_would_write_is_read_back(name: str, arguments: str, before: str) -> None:
    text = f'{before}\n<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
    assert parsed([text], opened=None) == Parsed(content=before.rstrip(), calls=calls((name, arguments)))
