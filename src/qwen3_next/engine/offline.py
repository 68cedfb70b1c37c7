"""A file of prompts into a file of answers, in any number of runs."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.progress import Progress

from qwen3_next.engine.answers import Completion
from qwen3_next.engine.llm import LLM
from qwen3_next.engine.request import SamplingParams, Structured
from qwen3_next.errors import InputError, Qwen3NextError

AHEAD = 4
"""Requests in the engine, as a multiple of those that it computes at the same time."""


@dataclass(frozen=True)
class Line:
    """One line of the file of prompts.

    Attributes:
        name: its "id", else the number of the line; unique in the file.
    """

    name: str
    prompt: str
    params: SamplingParams


def answer_file(llm: LLM, source: Path, target: Path, defaults: Mapping[str, Any], progress: bool = True) -> int:
    """Answer every line of a JSONL file that has no answer yet; return how many were answered now.

    A line is `{"prompt": text}` or `{"messages": [...]}`, with "id" (else the number of the line) and "params" (fields
    of `SamplingParams`; "structured" is `{"kind": ..., "grammar": ...}`) where wanted. An answer is `{"id", "text",
    "finish", "prompt_tokens", "output_tokens"}`, and "error" where a request failed; answers come in the order in which
    they are ready, each written at once. Run it again after an interruption, and it goes on; a line that was cut while
    it was written is written anew.

    Args:
        defaults: of the params of every line.

    Raises:
        InputError: the source is missing, or a line is not of this form; nothing is started then.
    """
    lines = list(_read(llm, source, defaults))
    done = _answered(target)
    missing = [line for line in lines if line.name not in done]
    waiting = iter(missing)
    size = AHEAD * llm.engine.division.limits.max_sequences
    with Progress(disable=not progress) as bar, target.open("a", encoding="utf-8") as out:
        task = bar.add_task(source.name, total=len(lines), completed=len(lines) - len(missing))
        for line, completion in llm.answers(((line, line.prompt, line.params) for line in waiting), size):
            out.write(json.dumps(_record(line, completion), ensure_ascii=False) + "\n")
            out.flush()
            bar.advance(task)
    return len(missing)


def _record(line: Line, completion: Completion | Qwen3NextError) -> dict[str, Any]:
    if isinstance(completion, Qwen3NextError):
        return {"id": line.name, "text": "", "finish": "error", "error": str(completion)}
    record = {
        "id": line.name,
        "text": completion.text,
        "finish": completion.finish.value,
        "prompt_tokens": completion.prompt_tokens,
        "output_tokens": len(completion.token_ids),
    }
    return record if completion.error is None else record | {"error": str(completion.error)}


def _read(llm: LLM, source: Path, defaults: Mapping[str, Any]) -> Iterator[Line]:
    try:
        texts = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{source} cannot be read ({error}); give a file of JSON lines in UTF-8.") from error
    seen: set[str] = set()
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = _line(llm, json.loads(text), str(number), defaults)
        except (ValueError, TypeError) as error:  # InputError and JSONDecodeError among them
            raise InputError(f"{source}, line {number}: {error}") from error
        if line.name in seen:
            raise InputError(f"{source}, line {number}: the id {line.name!r} was there before; give each its own.")
        seen.add(line.name)
        yield line


def _line(llm: LLM, found: Any, number: str, defaults: Mapping[str, Any]) -> Line:
    fields = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    unknown = fields.keys() - {"id", "prompt", "messages", "params"}
    if unknown or ("prompt" in fields) == ("messages" in fields):
        raise InputError(
            'a line is {"prompt": text} or {"messages": [...]}, with "id" and "params" where wanted'
            + (f"; it has {', '.join(sorted(unknown))}." if unknown else ".")
        )
    prompt = fields["prompt"] if "prompt" in fields else llm.render(fields["messages"])
    if not isinstance(prompt, str) or not prompt:
        raise InputError("the prompt is no text, or empty.")
    values = dict(defaults) | fields.get("params", {})
    if values.get("structured") is not None:
        values["structured"] = Structured(**values["structured"])
    params = llm.default_params(**values)
    if params.n != 1:
        raise InputError("n is 1 here; write the line several times, with ids of their own.")
    return Line(str(fields.get("id", number)), prompt, params)


def _answered(target: Path) -> set[str]:
    """The ids that have an answer. What a run that was killed left half written is cut off."""
    if not target.exists():
        return set()
    content = target.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        target.write_bytes(whole)
    try:
        return {str(json.loads(line)["id"]) for line in whole.splitlines() if line.strip()}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{target} is no file of answers ({error}); name another one.") from error
