"""Sampling parameters are checked at birth; a request knows what was committed."""

import json
from typing import Any

import pytest

from qwen3_next.engine import Request, RequestOutput, SamplingParams, Structured
from qwen3_next.engine.request import common_prefix
from qwen3_next.errors import InputError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {3: float("nan")}),
        ("seed", -1),
        ("n", 0),
        ("logprobs", -1),
        ("logprobs", 101),
        ("prompt_logprobs", -1),
        ("stop", ("",)),
        ("stop_token_ids", (-1,)),
        ("min_tokens", -1),
        ("max_tokens", 0),
    ],
)
def test_a_value_outside_its_range_is_refused_with_value_range_and_remedy(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=r"cannot be served\. Allowed: .+\. .+\.") as refused:
        SamplingParams(**{name: value})
    assert name in str(refused.value)


def test_a_minimum_above_the_maximum_is_refused() -> None:
    with pytest.raises(InputError, match=r"min_tokens = 5 .* max_tokens = 4"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_every_value_of_the_ranges_is_taken() -> None:
    SamplingParams(temperature=0, top_k=0, top_p=1, min_p=1, presence_penalty=-2, logit_bias={0: -100}, seed=0)
    SamplingParams(top_p=1e-9, repetition_penalty=0.5, frequency_penalty=2, logprobs=0, prompt_logprobs=100, n=3)


@pytest.mark.parametrize(
    ("kind", "grammar"),
    [
        ("json_schema", "{"),
        ("json_schema", "[" * 60_000),
        ("json_schema", '{"a": "\ud800"}'),
        ("regex", ""),
        ("regex", "\ud800"),
        ("regex", "ä" * 32_769),
        ("regex", 5),
        ("lark", "x"),
    ],
)
def test_a_malformed_structure_is_refused(kind: Any, grammar: str) -> None:
    with pytest.raises(InputError, match="structured"):
        Structured(kind=kind, grammar=grammar)


def test_a_structure_is_taken() -> None:
    Structured(kind="regex", grammar="ä" * 32_768)
    with pytest.raises(InputError, match="a Structured"):
        SamplingParams(structured={"kind": "regex", "grammar": "a"})  # type: ignore[arg-type]
    SamplingParams(structured=Structured(kind="json_schema", grammar=json.dumps({"type": "object"})))


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InputError, match="prompt"):
        Request(request_id="a", prompt=())


def test_samples_are_requests_of_their_own() -> None:
    request = Request(request_id="a", prompt=(1, 2, 3), params=SamplingParams(n=3, seed=7), priority=2)
    samples = request.samples()
    assert [one.request_id for one in samples] == ["a#0", "a#1", "a#2"]
    assert [one.sample for one in samples] == [0, 1, 2]
    assert {(one.params.n, one.params.seed, one.priority, one.prompt) for one in samples} == {(1, 7, 2, (1, 2, 3))}
    samples[0].tokens.append(4)
    assert samples[1].tokens == [1, 2, 3]
    single = Request(request_id="b", prompt=(1,))
    assert single.samples() == [single]


def test_an_output_tells_what_is_new_and_how_much_there_is() -> None:
    request = Request(request_id="a", prompt=(1, 2, 3))
    request.tokens += [4, 5]
    output = RequestOutput.of(request, [5])
    assert (output.tokens, output.prompt_tokens, output.output_tokens, output.finish) == ((5,), 3, 2, None)
    assert list(request.output) == [4, 5]


@pytest.mark.parametrize("length", range(6))
def test_the_common_prefix_is_counted(length: int) -> None:
    a = [1, 2, 3, 4, 5]
    assert common_prefix(a, [*a[:length], 9, 9]) == length
    assert common_prefix(a[:length], a) == length
