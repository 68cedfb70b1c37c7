"""A text that must have a form has it, whoever is served beside it, and a wrong form is refused alone."""

import itertools
import json
import random
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import torch
from tests.engine.test_engine import KNOWN, engine_of, greedy, ids, prompts
from tests.engine.test_engine import checkpoint as checkpoint
from tests.engine.test_engine import memory_is_checked as memory_is_checked

from qwen3_next.engine import LLM, EngineConfig, FinishReason, Request, SamplingParams, Structured
from qwen3_next.engine.grammar import GrammarCompiler, GrammarState
from qwen3_next.errors import InputError

DATE = Structured(kind="regex", grammar=r"(19|20)\d\d-(0[1-9]|1[0-2])-[0-3]\d")
SUM = Structured(kind="grammar", grammar='start: NUMBER (" + " NUMBER){2}\nNUMBER: /[1-9][0-9]{0,3}/')
PERSON = Structured(
    kind="json_schema",
    grammar=json.dumps(
        {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 99}},
            "required": ["name", "age"],
            "additionalProperties": False,
        }
    ),
)


@pytest.fixture(scope="module")
def shipped() -> LLM:
    return LLM(dtype="float32", config=EngineConfig(max_sequences=8, token_budget=256, memory_bytes=2**27))


@pytest.fixture(scope="module")
def compiler(shipped: LLM) -> GrammarCompiler:
    loaded = shipped.engine.loaded
    return GrammarCompiler(loaded.tokenizer, KNOWN, loaded.eos_ids)


def regex(text: str) -> Structured:
    return Structured(kind="regex", grammar=text)


def tokens_of(llm: LLM, text: str) -> list[int]:
    return llm.engine.loaded.tokenizer.encode(text, add_special_tokens=False).ids


def follow(state: GrammarState, tokens: Sequence[int]) -> GrammarState:
    for token in tokens:
        assert state.allowed()[token]
        state.accept(token)
    return state


@pytest.mark.parametrize("temperature", [0, 0.7, 3])
def test_each_kind_holds_and_ends_with_its_text(shipped: LLM, temperature: float) -> None:
    kinds = [DATE, SUM, PERSON] * 3
    params = [
        SamplingParams(temperature=temperature, structured=kind, seed=seed, max_tokens=200)
        for seed, kind in enumerate(kinds)
    ]
    completions = [group[0] for group in shipped.generate(["The answer is "] * len(kinds), params)]
    for kind, completion in zip(kinds, completions, strict=True):
        assert completion.finish is FinishReason.STOP
        if kind is DATE:
            assert re.fullmatch(DATE.grammar, completion.text)
        elif kind is SUM:
            assert re.fullmatch(r"[1-9]\d{0,3}( \+ [1-9]\d{0,3}){2}", completion.text)
        else:
            jsonschema_rs.validate(json.loads(PERSON.grammar), json.loads(completion.text))


def random_schema(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    """Texts and lists are bounded, so that any model ends them."""
    kind = chance.choice(["string", "integer", "boolean", "null", "enum", "number"] + ["object", "array"] * (depth < 3))
    if kind == "enum":
        return {"enum": chance.sample(["red", "green", 'a "quoted" one', 7, None, [1, 2], "süß 🙂"], 3)}
    if kind == "string":
        return {"type": kind, "minLength": chance.randrange(3), "maxLength": chance.randrange(3, 9)}
    if kind in ("integer", "number"):
        return {"type": kind, "minimum": chance.randrange(-40, 0), "maximum": chance.randrange(1, 2000)}
    if kind == "array":
        return {"type": kind, "items": random_schema(chance, depth + 1), "minItems": 1, "maxItems": 3}
    if kind == "object":
        names = chance.sample(["a", "long name", "ключ", "x-1", "_"], chance.randrange(1, 4))
        return {
            "type": kind,
            "properties": {name: random_schema(chance, depth + 1) for name in names},
            "required": names[: chance.randrange(len(names) + 1)],
            "additionalProperties": False,
        }
    return {"type": kind}


@pytest.mark.parametrize("seed", range(3))
def test_random_schemas_hold_at_any_temperature(shipped: LLM, compiler: GrammarCompiler, seed: int) -> None:
    chance = random.Random(seed)
    schemas = [random_schema(chance) for _ in range(16)]
    params = [
        SamplingParams(
            temperature=chance.choice([0, 0.5, 1, 2, 10]),
            top_p=chance.choice([0.3, 1]),
            repetition_penalty=chance.choice([1, 1.3]),
            min_tokens=chance.choice([0, 30]),
            ignore_eos=chance.random() < 0.5,
            seed=number,
            max_tokens=150,
            structured=Structured(kind="json_schema", grammar=json.dumps(schema)),
        )
        for number, schema in enumerate(schemas)
    ]
    ended = 0
    for schema, one, (completion,) in zip(
        schemas, params, shipped.generate(["Data as JSON: "] * len(schemas), params), strict=True
    ):
        assert one.structured is not None
        follow(compiler.matcher(one.structured), completion.token_ids)
        if completion.finish is FinishReason.STOP:
            jsonschema_rs.validate(schema, json.loads(completion.text))
            ended += 1
        else:
            assert completion.finish is FinishReason.LENGTH
    assert ended > 8


def test_batched_preempted_and_cached_equal_alone(checkpoint: Path) -> None:
    """A random model that has no end of its own."""
    long = prompts((60, 61, 62, 61))
    forms = [regex("[a-z ]{150,300}"), PERSON, SUM, regex("(yes|no)( (yes|no)){60}")]
    params = [
        SamplingParams(temperature=t, seed=3, max_tokens=100, structured=form)
        for form, t in zip(forms, (0, 1, 2, 1), strict=True)
    ]
    llm = engine_of(checkpoint, prefix_cache=False)
    alone = [llm.generate(prompt, one)[0][0] for prompt, one in zip(long, params, strict=True)]
    assert [one.finish for one in alone[1:3]] == [FinishReason.STOP] * 2
    expected = [one.token_ids for one in alone]
    assert ids(engine_of(checkpoint).generate(long, params)) == expected
    llm = engine_of(checkpoint, max_context=192, memory_bytes=176_000, drafts=0)  # pages for one of them and a half
    assert ids(llm.generate(long, params)) == expected
    assert llm.engine.scheduler.figures.preemptions > 0
    llm, twice = engine_of(checkpoint), prompts((130,))[0]
    first, second = (llm.generate(twice, params[3])[0][0] for _ in range(2))
    assert second.token_ids == first.token_ids
    assert second.cached_tokens > 0


def test_a_wrong_grammar_is_refused_alone(checkpoint: Path) -> None:
    engine = engine_of(checkpoint).engine
    good = Request(request_id="good", prompt=(1, 2), params=greedy(40, structured=SUM))
    engine.add(good)
    engine.step()
    with pytest.raises(InputError, match="unclosed group"):
        engine.add(Request(request_id="bad", prompt=(1, 2), params=greedy(structured=regex("a("))))
    outputs = [output for _ in range(60) for output in engine.step()]
    assert {output.state.request_id for output in outputs} == {"good"}
    assert good.finish is FinishReason.STOP


@pytest.mark.parametrize(
    ("kind", "grammar", "reason"),
    [
        ("regex", "a(", "unclosed group"),
        ("regex", "()", "lets no text follow"),
        ("regex", r"[^\s\S]", "NoExtension"),
        ("json_schema", '{"type": "objec"}', "Invalid type: objec"),
        ("json_schema", '{"allOf": [{"type": "string"}, {"type": "integer"}]}', "incompatible types"),
        ("json_schema", "5", "must be an object or boolean"),
        ("json_schema", '{"const": 1e400}', "out of range"),
        ("json_schema", '{"type": "array", "items": ' * 500 + "{}" + "}" * 500, "recursion limit"),
        ("json_schema", '{"$ref": "http://127.0.0.1/x.json"}', "does not fetch"),
        ("grammar", "start: foo", "unknown name"),
        ("grammar", 'start: a\na: a "x"', "NoExtension"),
        ("grammar", 'start: x\nx[capture, temperature=0.5]: "a"', "temperature"),
        ("grammar", '{"grammars": [{"lark_grammar": "start: /a/"}]}', "as grammar"),
        ("grammar", "start: " + "(" * 30_000 + '"a"' + ")" * 30_000, "nested"),
    ],
)
def test_what_no_text_can_follow_is_refused(compiler: GrammarCompiler, kind: Any, grammar: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        compiler.matcher(Structured(kind=kind, grammar=grammar))
    assert len(str(caught.value)) < 600


def test_json_is_laid_out_as_people_do_without_endless_blanks(compiler: GrammarCompiler, shipped: LLM) -> None:
    for indent in (None, 2, 4):
        text = json.dumps({"name": "Ada", "age": 36}, indent=indent)
        assert follow(compiler.matcher(PERSON), tokens_of(shipped, text)).is_finished
    state, (blank,) = compiler.matcher(PERSON), tokens_of(shipped, " ")
    follow(state, [*tokens_of(shipped, "{"), blank, blank])
    assert not state.allowed()[blank]
    assert compiler.matcher(Structured(kind="json_schema", grammar="true")).allowed().sum() > 10


def test_a_temperature_that_is_only_text_is_none(compiler: GrammarCompiler, shipped: LLM) -> None:
    grammar = Structured(kind="grammar", grammar='start: "[temperature=" /\\d[temperature]?/ "]"')
    state = compiler.matcher(grammar)
    assert follow(state, tokens_of(shipped, "[temperature=7]")).is_finished


def test_rules_that_refer_to_each_other_in_a_long_chain_compile(compiler: GrammarCompiler, shipped: LLM) -> None:
    """An ordinary stack overflows here, which no exception tells."""
    size = threading.stack_size()
    names = ["start", *(f"r{n}" for n in range(4500))]
    chain = "".join(f"{name}:{other}\n" for name, other in itertools.pairwise(names))
    state = compiler.matcher(Structured(kind="grammar", grammar=f'{chain}{names[-1]}:"a" | "ab"'))
    assert threading.stack_size() == size
    assert follow(state, tokens_of(shipped, "ab")).is_finished


def test_states_of_one_grammar_go_their_own_ways(compiler: GrammarCompiler, shipped: LLM) -> None:
    first, second = compiler.matcher(DATE), compiler.matcher(DATE)
    beginning = second.allowed().clone()
    follow(first, tokens_of(shipped, "19"))
    assert not torch.equal(first.allowed(), beginning)
    assert torch.equal(second.allowed(), beginning)
    assert torch.equal(compiler.matcher(DATE).allowed(), beginning)


def test_masks_along_drafts_are_those_of_the_texts_with_them(compiler: GrammarCompiler, shipped: LLM) -> None:
    for form, text in ((DATE, "2024-05-17"), (SUM, "1 + 22 + 4444"), (PERSON, '{"name": "Ada", "age": 36}')):
        tokens = tokens_of(shipped, text)
        for split in range(len(tokens)):
            state = follow(compiler.matcher(form), tokens[:split])
            drafts = tokens[split:]
            masks = state.masks_along(drafts)
            assert len(masks) == len(drafts) + 1
            for count, mask in enumerate(masks):
                one = follow(compiler.matcher(form), tokens[: split + count])
                assert torch.equal(mask, one.allowed())
            # A forbidden draft ends them, and the state is where it was.
            (wrong, *_) = (~masks[1]).nonzero()[:, 0].tolist()
            assert len(state.masks_along([drafts[0], wrong, *drafts[1:]])) == 2
            assert torch.equal(state.allowed(), masks[0])
            assert follow(state, drafts).is_finished


def test_the_models_end_comes_where_the_text_may_end_and_ends_it(shipped: LLM) -> None:
    ends = shipped.engine.loaded.eos_ids
    for end in ends:
        eager = greedy(30, structured=regex("[ab]{4}c*"), logit_bias={end: 1e4})
        completion = shipped.generate("Once", eager)[0][0]
        assert completion.finish is FinishReason.STOP
        assert re.fullmatch("[ab]{4}c*", completion.text)
        assert completion.token_ids[-1] == end
    late = greedy(30, structured=regex("[ab]{4}c*"), logit_bias=dict.fromkeys(ends, 1e4), min_tokens=12)
    completion = shipped.generate("Once", late)[0][0]
    assert len(completion.token_ids) == 13
    assert completion.text.startswith(completion.text.rstrip("c") + "ccc")
    deaf = greedy(60, structured=regex("[ab]{4}c{0,20}"), logit_bias=dict.fromkeys(ends, 1e4), ignore_eos=True)
    completion = shipped.generate("Once", deaf)[0][0]
    assert completion.finish is FinishReason.STOP
    assert completion.text.endswith("c" * 20)


def test_the_grammar_decides_where_min_tokens_would_leave_nothing(shipped: LLM) -> None:
    for ignore_eos in (False, True):
        params = greedy(30, structured=regex("[ab]{2}"), min_tokens=20, ignore_eos=ignore_eos)
        completion = shipped.generate("Once", params)[0][0]
        assert completion.finish is FinishReason.STOP
        assert re.fullmatch("[ab]{2}", completion.text)
    (a,), (b,) = tokens_of(shipped, "a"), tokens_of(shipped, "b")
    stopping = greedy(3, structured=regex("(ab)+"), min_tokens=3, stop_token_ids=(a, b), logit_bias={a: 9, b: 9})
    assert shipped.generate("Once", stopping)[0][0].text[:2] == "ab"


def test_log_probabilities_stay_the_models_own(shipped: LLM) -> None:
    free = shipped.generate("Once", greedy(1, logprobs=100))[0][0]
    held = shipped.generate("Once", greedy(1, logprobs=100, structured=regex("[0-9]{9}")))[0][0]
    assert free.logprobs is not None
    assert held.logprobs is not None
    assert held.token_ids != free.token_ids
    assert held.logprobs[0].top_logprobs == free.logprobs[0].top_logprobs
    assert held.logprobs[0].logprob is not None
    assert held.logprobs[0].logprob < free.logprobs[0].top_logprobs[0][1]


@pytest.mark.parametrize("name", ["allowed", "accept"])
def test_a_grammar_that_fails_on_the_way_ends_its_request_alone(
    shipped: LLM, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    expected = shipped.generate("Once", greedy(5))[0][0]
    original, calls = getattr(GrammarState, name), 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise InputError("too complex")
        return original(*arguments)

    monkeypatch.setattr(GrammarState, name, failing)
    failed, fine = shipped.generate(["Once", "Once"], [greedy(9, structured=regex("[ab]+")), greedy(5)])
    assert (failed[0].finish, len(failed[0].token_ids)) == (FinishReason.ERROR, 2)
    assert "too complex" in str(failed[0].error)
    assert fine[0].token_ids == expected.token_ids


def test_a_tokenizer_with_more_words_than_the_model_fails_with_the_reason(compiler: GrammarCompiler) -> None:
    few = GrammarCompiler(compiler.tokenizer, 3, frozenset())
    state = few.matcher(regex("[a-z]+"))
    with pytest.raises(InputError, match="no token that its grammar lets follow"):
        state.allowed()
