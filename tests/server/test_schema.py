"""Requests as pydantic reads them, and the page that describes them."""

from pathlib import Path

import pytest
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from pydantic import ValidationError

from qwen3_next.server import responses_schema
from qwen3_next.server.responses_schema import ResponsesRequest
from qwen3_next.server.schema import REFUSED, ChatRequest, CompletionRequest, DetokenizeRequest, explained

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("field", sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, *REFUSED}))
def test_the_page_names_every_field(field: str) -> None:
    assert f"`{field}`" in PAGE


@pytest.mark.parametrize("field", sorted({*ResponsesRequest.model_fields, *responses_schema.REFUSED}))
def test_the_page_names_every_field_of_responses(field: str) -> None:
    assert f"`{field}`" in PAGE.partition("## Responses\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("field", sorted(responses_schema.REFUSED))
def test_what_responses_refuse_comes_with_its_reason(field: str) -> None:
    assert field not in ResponsesRequest.model_fields
    with pytest.raises(ValidationError) as caught:
        ResponsesRequest.model_validate({"model": "m", "input": "x", field: 1})
    message, param = explained(caught.value, responses_schema.REFUSED)
    assert param == field
    assert responses_schema.REFUSED[field] in message


def test_every_field_of_the_official_client_is_honoured_or_refused() -> None:
    fields = {*ResponseCreateParamsBase.__annotations__, "stream"}
    assert fields - {*ResponsesRequest.model_fields, *responses_schema.REFUSED} == set()


def test_no_field_is_both_honoured_and_refused() -> None:
    assert not REFUSED.keys() & {*ChatRequest.model_fields, *CompletionRequest.model_fields}


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_what_is_refused_comes_with_its_reason(field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"model": "m", "prompt": "x", field: 1})
    message, param = explained(caught.value)
    assert param == field
    assert REFUSED[field] in message
    CompletionRequest.model_validate({"model": "m", "prompt": "x", field: None})


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1, 2], [3]], [[1, 2], [3]])],
)
def test_prompts_are_texts_or_tokens_one_or_several(prompt: object, expected: object) -> None:
    assert CompletionRequest.model_validate({"model": "m", "prompt": prompt}).prompts() == expected


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], {}, 5, [True], ["a"] * 129])
def test_other_prompts_are_refused(prompt: object) -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"model": "m", "prompt": prompt})
    _, param = explained(caught.value)
    assert param is not None
    assert param.startswith("prompt")


MANY = 3000
BASE = {"model": "m", "prompt": "x"}


@pytest.mark.parametrize(
    "body",
    [
        {"model": "m", "prompt": [True] * MANY},
        {"model": "m", "prompt": [[True]] * MANY},
        {"model": "m", "prompt": [[True] * MANY]},
        {"model": "m", "messages": [{}] * MANY},
        {"model": "m", "messages": [{"role": "user", "content": [{}] * MANY}]},
        BASE | {"stop": [1] * MANY},
        BASE | {"stop_token_ids": [""] * MANY},
        BASE | {"metadata": dict.fromkeys(map(str, range(MANY)), 1)},
        BASE | {"logit_bias": dict.fromkeys(map(str, range(MANY)), "x")},
        BASE | dict.fromkeys(map(str, range(MANY)), 1),
        {"tokens": [-1] * MANY},
    ],
    ids=lambda body: ",".join(body)[:30],
)
def test_thousands_of_mistakes_are_not_all_written_down(body: dict[str, object]) -> None:
    kind = ChatRequest if "messages" in body else DetokenizeRequest if "tokens" in body else CompletionRequest
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() < 10
