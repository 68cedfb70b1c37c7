"""A file of prompts is answered line by line, in any number of runs."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.engine.test_engine import checkpoint as checkpoint
from tests.engine.test_engine import engine_of

from qwen3_next.engine import LLM, SamplingParams
from qwen3_next.engine.offline import answer_file
from qwen3_next.errors import InputError

DEFAULTS = {"temperature": 0, "max_tokens": 4}


@pytest.fixture
def llm(checkpoint: Path) -> LLM:
    return engine_of(checkpoint)


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: Any) -> Path:
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
        return path

    return write


def answers(path: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line for line in lines}


def test_every_line_gets_the_answer_that_its_prompt_gets_alone(
    llm: LLM, source: Callable[..., Path], tmp_path: Path
) -> None:
    texts = [f"Story number {n} begins" for n in range(30)]
    lines: list[dict[str, Any]] = [{"prompt": text} for text in texts]
    lines[3] |= {"id": "third", "params": {"max_tokens": 2}}
    lines[4] |= {"params": {"structured": {"kind": "regex", "grammar": "[0-9]{3}"}, "max_tokens": 9}}
    target = tmp_path / "answers.jsonl"
    assert answer_file(llm, source(*lines, ""), target, DEFAULTS, progress=False) == 30
    found = answers(target)
    assert found.keys() == {"third", *(str(n) for n in range(1, 31) if n != 4)}
    for name, text, length in (("third", texts[3], 2), ("1", texts[0], 4), ("30", texts[29], 4)):
        expected = llm.generate(text, SamplingParams(temperature=0, max_tokens=length))[0][0]
        assert found[name]["text"] == expected.text
        assert (found[name]["finish"], found[name]["output_tokens"]) == ("length", length)
    assert re.fullmatch("[0-9]{3}", found["5"]["text"])
    assert not llm.engine.has_work


def test_a_run_that_was_killed_goes_on_and_a_torn_line_is_written_anew(
    llm: LLM, source: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, target = source(*({"prompt": f"Line {n}"} for n in range(12))), tmp_path / "answers.jsonl"
    step, steps = llm.engine.step, 0

    def interrupted() -> Any:
        nonlocal steps
        steps += 1
        if steps == 7:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer_file(llm, file, target, DEFAULTS, progress=False)
    assert not llm.engine.has_work
    first = target.read_bytes()
    assert first.count(b"\n") in range(1, 12)
    target.write_bytes(first + b'{"id": "9", "te')
    missing = 12 - first.count(b"\n")
    assert answer_file(llm, file, target, DEFAULTS, progress=False) == missing
    assert target.read_bytes().startswith(first)
    assert len(answers(target)) == 12
    assert answer_file(llm, file, target, DEFAULTS, progress=False) == 0


def test_a_prompt_that_is_too_long_is_answered_with_the_reason(
    llm: LLM, source: Callable[..., Path], tmp_path: Path
) -> None:
    file, target = source({"prompt": "a b c " * 400}, {"prompt": "Short"}), tmp_path / "answers.jsonl"
    assert answer_file(llm, file, target, DEFAULTS, progress=False) == 2
    assert answers(target)["1"]["finish"] == "error"
    assert "cannot be served" in answers(target)["1"]["error"]
    assert answers(target)["2"]["finish"] == "length"


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["{"], "line 1: "),
        ([{"prompt": "a"}, {"text": "b"}], "line 2: .*it has text"),
        ([{"prompt": "a", "messages": []}], "line 1: a line is"),
        ([{"prompt": ""}], "line 1: the prompt is no text"),
        ([{"prompt": "a", "params": {"top_p": 7}}], "line 1: top_p = 7"),
        ([{"prompt": "a", "params": {"warmth": 7}}], "line 1: .*warmth"),
        ([{"prompt": "a", "params": {"n": 2}}], "line 1: n is 1"),
        ([{"prompt": "a", "params": {"structured": {"regex": "a"}}}], "line 1: .*regex"),
        ([{"prompt": "a", "params": {"structured": "a+"}}], "line 1: "),
        ([{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"}], "line 2: the id 'x'"),
    ],
)
def test_a_wrong_line_is_refused_before_anything_is_written(
    llm: LLM, source: Callable[..., Path], tmp_path: Path, lines: list[Any], reason: str
) -> None:
    target = tmp_path / "answers.jsonl"
    with pytest.raises(InputError, match=reason):
        answer_file(llm, source(*lines), target, DEFAULTS, progress=False)
    assert not target.exists()


def test_files_that_cannot_be_used_are_refused(llm: LLM, source: Callable[..., Path], tmp_path: Path) -> None:
    target = tmp_path / "answers.jsonl"
    with pytest.raises(InputError, match="cannot be read"):
        answer_file(llm, tmp_path / "nowhere.jsonl", target, DEFAULTS, progress=False)
    target.write_text("something else\n", encoding="utf-8")
    with pytest.raises(InputError, match="no file of answers"):
        answer_file(llm, source({"prompt": "a"}), target, DEFAULTS, progress=False)
