"""The shipped tokenizer: 4096 entries, any text comes back, and Qwen's chat protocol."""

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import qwen3_next

ASSETS = Path(qwen3_next.__file__).parent / "assets"
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKUP = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"zone": "Zürich", "a": 1}}}
TOKENIZER = AutoTokenizer.from_pretrained(ASSETS)


def render(messages: list[dict[str, object]], **options: object) -> str:
    return TOKENIZER.apply_chat_template(messages, tokenize=False, **options)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return TOKENIZER


def test_vocabulary_has_4096_entries_with_the_added_tokens_last(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 4096
    assert sorted(tokenizer.get_vocab().values()) == list(range(4096))
    assert tokenizer.convert_tokens_to_ids(CONTROL + MARKUP) == list(range(4087, 4096))


def test_special_tokens_are_qwens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    assert tokenizer.model_max_length == 2048
    assert tokenizer("text").input_ids == tokenizer("text", add_special_tokens=False).input_ids


@pytest.mark.parametrize("token", CONTROL + MARKUP)
def test_added_tokens_are_one_token_even_inside_words(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    ids = tokenizer(f"a{token}b").input_ids
    assert ids[1] == tokenizer.convert_tokens_to_ids(token)
    assert tokenizer.decode(ids) == f"a{token}b"


def test_only_control_tokens_are_skipped(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("".join(CONTROL + MARKUP)).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "".join(MARKUP)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_in_normal_form(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == unicodedata.normalize("NFC", text)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from([" ", "\n", "\t", "def f(x):", "'ll", "12", "é", "e\u0301", "你好", "🙂", *CONTROL, *MARKUP])
    )
)
def test_mixtures_of_code_space_and_added_tokens_come_back(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == unicodedata.normalize("NFC", text)


def test_digits_are_single_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer("20481").input_ids) == 5


def test_saved_tokenizer_is_the_same(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f():\n    return 'é' <think>"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.chat_template == tokenizer.chat_template
    assert again.eos_token == "<|im_end|>"


def test_chat_without_system_turn_has_no_default_one() -> None:
    assert render([{"role": "user", "content": "Hi"}]) == "<|im_start|>user\nHi<|im_end|>\n"


def test_generation_prompt_opens_the_assistants_turn() -> None:
    text = render([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_system_turn_comes_first_and_later_ones_stay_in_place() -> None:
    turns = [("system", "A"), ("user", "B"), ("system", "C"), ("assistant", "D")]
    text = render([{"role": role, "content": content} for role, content in turns])
    assert text == "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


def test_tools_are_listed_one_per_line_behind_the_system_text() -> None:
    text = render([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}], tools=[TOOL, TOOL])
    assert text.startswith("<|im_start|>system\nBe kind.\n\n# Tools\n\n")
    line = json.dumps(TOOL, ensure_ascii=False)
    assert f"<tools>\n{line}\n{line}\n</tools>" in text
    assert text.count("<|im_start|>system") == 1
    assert text.endswith("</tool_call><|im_end|>\n<|im_start|>user\nHi<|im_end|>\n")


def test_tools_without_system_text_open_a_system_turn() -> None:
    assert render([{"role": "user", "content": "Hi"}], tools=[TOOL]).startswith("<|im_start|>system\n# Tools\n\n")


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("arguments", [{"city": "Köln"}, '{"city": "Köln"}'])
def test_tool_calls_are_json_between_tags(wrapped: bool, arguments: object) -> None:
    call: dict[str, object] = {"name": "weather", "arguments": arguments}
    calls = [{"type": "function", "function": call} if wrapped else call] * 2
    block = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    silent = render([{"role": "assistant", "content": "", "tool_calls": calls}])
    assert silent == f"<|im_start|>assistant\n{block}\n{block}<|im_end|>\n"
    spoken = render([{"role": "assistant", "content": "Wait.", "tool_calls": calls}])
    assert spoken == f"<|im_start|>assistant\nWait.\n{block}\n{block}<|im_end|>\n"


def test_a_call_without_content_key_renders() -> None:
    text = render([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}])
    assert text == '<|im_start|>assistant\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>\n'


def test_tool_results_that_follow_one_another_share_a_user_turn() -> None:
    results = [{"role": "tool", "content": text} for text in ("1", "2")]
    text = render([*results, {"role": "user", "content": "So?"}, {"role": "tool", "content": "3"}])
    response = "\n<tool_response>\n{}\n</tool_response>"
    first = response.format(1) + response.format(2)
    assert text == (
        f"<|im_start|>user{first}<|im_end|>\n<|im_start|>user\nSo?<|im_end|>\n"
        f"<|im_start|>user{response.format(3)}<|im_end|>\n"
    )


def test_content_that_is_no_string_renders_empty() -> None:
    parts = [{"type": "text", "text": "Hi"}]
    assert render([{"role": "user", "content": parts}]) == "<|im_start|>user\n<|im_end|>\n"
