"""The command line: what it writes, that it reads each token once, and that every fault is one line."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import scramble, tiny_config
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import qwen3_next
from qwen3_next import Qwen3NextConfig, Qwen3NextForCausalLM, engine
from qwen3_next.cli import main
from qwen3_next.cli_info import SHORT_CONTEXT, USABLE, capacity
from qwen3_next.cli_text import SamplingOptions
from qwen3_next.engine import LLM, Plan, SamplingParams, StreamUpdate
from qwen3_next.engine.loading import choose_dtype
from qwen3_next.engine.runner import Runner
from qwen3_next.engine.text import Characters, StopStrings
from qwen3_next.ops.backend import OPERATIONS
from qwen3_next.ops.selfcheck import Check, Finding
from qwen3_next.train import TrainResult

ASSETS = Path(qwen3_next.__file__).parent / "assets"
TOKENIZER = Tokenizer.from_file(str(ASSETS / "tokenizer.json"))
KNOWN = 4096
UNKNOWN = 1000
CONTEXT = 256
END_OF_TURN = 4089
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that ends no text by itself, whose head has rows beyond the tokenizer."""
    directory = tmp_path_factory.mktemp("checkpoint")
    config = tiny_config(
        vocab_size=KNOWN + UNKNOWN, max_position_embeddings=CONTEXT, eos_token_id=None, dtype="float32"
    )
    model = Qwen3NextForCausalLM(config)
    scramble(model)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, directory)
    return directory


@pytest.fixture
def changed(checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make a copy of the checkpoint in which fields of one JSON file are changed."""

    def change(file: str, **fields: object) -> Path:
        directory = Path(shutil.copytree(checkpoint, tmp_path / "changed"))
        content = json.loads((directory / file).read_text(encoding="utf-8"))
        (directory / file).write_text(json.dumps(content | fields), encoding="utf-8")
        return directory

    return change


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line; return exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put text on stdin."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


@dataclass
class Asked:
    """What a command asked of the engine, and what it got so far."""

    params: SamplingParams
    token_ids: list[int]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """Everything that commands ask of the engine; the tokens are those of the prompt and of the answer."""
    made: list[Asked] = []
    begin = LLM.stream

    def remember(llm: LLM, prompt: str | list[int], params: SamplingParams) -> Generator[StreamUpdate]:
        one = Asked(params, llm.encoded(prompt) if isinstance(prompt, str) else list(prompt))
        made.append(one)
        for update in begin(llm, prompt, params):
            one.token_ids += update.token_ids
            yield update

    monkeypatch.setattr(LLM, "stream", remember)
    return made


@pytest.fixture
def tokens_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of the network has read, of the text alone: there are no drafts."""
    monkeypatch.setattr(engine.EngineConfig, "most_drafts", lambda *_: 0)
    counts: list[int] = []
    run = Runner.run

    def count(runner: Runner, plan: Plan, earlier: Any = None) -> Any:
        counts.append(plan.token_count)
        return run(runner, plan, earlier)

    monkeypatch.setattr(Runner, "run", count)
    return counts


def python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


# generate


def test_greedy_text_is_that_of_transformers_generate(checkpoint: Path, run: Any, asked: list[Asked]) -> None:
    code, out, err = run("generate", PROMPT, "--model", checkpoint, "--greedy", "--max-tokens", 12)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = Qwen3NextForCausalLM.from_pretrained(checkpoint)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    expected = model.generate(
        **inputs, max_new_tokens=12, do_sample=False, suppress_tokens=list(range(KNOWN, KNOWN + UNKNOWN))
    )
    assert asked[0].token_ids == expected[0].tolist()
    written = tokenizer.decode(expected[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert code == 0
    assert out == written.rstrip("\N{REPLACEMENT CHARACTER}") + "\n"
    assert "12 tokens" in err
    assert "tokens/s" in err


def test_the_prompt_comes_from_stdin_where_it_is_a_dash(
    checkpoint: Path, run: Any, type_in: Any, asked: list[Asked]
) -> None:
    type_in("def f():\n    return 1\n")
    assert run("generate", "-", "--model", checkpoint, "--max-tokens", 1)[0] == 0
    assert TOKENIZER.decode(asked[0].token_ids[:-1]) == "def f():\n    return 1"


def test_a_prompt_is_tokenised_as_transformers_does(checkpoint: Path, run: Any, asked: list[Asked]) -> None:
    prompt = "<|im_start|>user\nÀ bientôt, 你好 🙂<|im_end|>\n"
    run("generate", prompt, "--model", checkpoint, "--max-tokens", 1)
    assert asked[0].token_ids[:-1] == AutoTokenizer.from_pretrained(checkpoint)(prompt).input_ids


def test_each_token_is_read_once(checkpoint: Path, run: Any, tokens_read: list[int]) -> None:
    run("generate", PROMPT, "--model", checkpoint, "--max-tokens", 5)
    assert tokens_read == [len(TOKENIZER.encode(PROMPT).ids), 1, 1, 1, 1]


def test_a_seed_repeats_the_text_and_another_one_does_not(checkpoint: Path, run: Any) -> None:
    texts = [
        run("generate", PROMPT, "--model", checkpoint, "--temperature", 1, "--max-tokens", 16, "--seed", seed)[1]
        for seed in (3, 3, 4)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_without_a_seed_the_text_differs(checkpoint: Path, run: Any) -> None:
    command = ("generate", PROMPT, "--model", checkpoint, "--temperature", 2, "--max-tokens", 16)
    assert run(*command)[1] != run(*command)[1]


def test_ids_beyond_the_tokenizer_are_never_drawn(checkpoint: Path, run: Any, asked: list[Asked]) -> None:
    run("generate", PROMPT, "--model", checkpoint, "--temperature", 1000, "--max-tokens", 100)
    assert len(asked[0].token_ids) > 100
    assert max(asked[0].token_ids) < KNOWN


def test_every_end_token_ends_the_text(changed: Any, run: Any, asked: list[Asked]) -> None:
    # Every second token ends: a text of 60 tokens without one has the probability 2 ** -60.
    ends = list(range(0, KNOWN, 2))
    directory = changed("generation_config.json", eos_token_id=ends)
    for _ in range(4):
        _, _, err = run("generate", PROMPT, "--model", directory, "--temperature", 100, "--max-tokens", 60)
        assert "60 tokens" not in err
        prompt = len(TOKENIZER.encode(PROMPT).ids)
        *before, end = asked[-1].token_ids[prompt:]
        assert end in ends
        assert not set(before) & set(ends)


def test_a_single_end_token_of_the_model_configuration_ends_the_text(
    checkpoint: Path, changed: Any, run: Any, asked: list[Asked]
) -> None:
    arguments = ("generate", PROMPT, "--greedy", "--max-tokens", 8, "--model")
    run(*arguments, checkpoint)
    end = asked[0].token_ids[-1]
    first = asked[0].token_ids.index(end, len(TOKENIZER.encode(PROMPT).ids))
    run(*arguments, changed("config.json", eos_token_id=end))
    assert asked[1].token_ids == asked[0].token_ids[: first + 1]


@pytest.mark.parametrize(
    ("asked", "capability", "share_of_ram", "expected"),
    [
        ("auto", "AVX2", 0.5, torch.float32),
        ("auto", "AVX2", 0.51, torch.bfloat16),
        ("auto", "AVX512", 0.01, torch.bfloat16),
        ("bfloat16", "AVX2", 0.01, torch.bfloat16),
    ],
)
def test_a_cpu_that_emulates_bf16_computes_in_fp32_where_half_of_the_memory_holds_that(
    monkeypatch: pytest.MonkeyPatch, asked: str, capability: str, share_of_ram: float, expected: torch.dtype
) -> None:
    config = tiny_config(dtype="bfloat16")
    ram = int(config.weight_bytes(torch.float32) / share_of_ram)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr("qwen3_next.engine.loading.ram_bytes", lambda: ram)
    assert choose_dtype(asked, config, torch.device("cpu")) == expected
    assert choose_dtype(asked, config, torch.device("cuda")) == torch.bfloat16


def test_a_stop_string_ends_the_text_before_it(checkpoint: Path, run: Any) -> None:
    command = ("generate", PROMPT, "--model", checkpoint, "--greedy", "--max-tokens", 24)
    whole = run(*command)[1][:-1]
    stop = whole[len(whole) // 2 :][:3]
    assert run(*command, "--stop", "\x00never", "--stop", stop)[1][:-1] == whole[: whole.index(stop)]


def test_the_text_ends_where_the_context_does(checkpoint: Path, run: Any, asked: list[Asked]) -> None:
    assert run("generate", "a " * 240, "--model", checkpoint, "--max-tokens", 1000)[0] == 0
    assert len(asked[0].token_ids) == CONTEXT


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT}


def test_the_published_recipe_for_long_texts_lengthens_the_context(changed: Any, run: Any, asked: list[Asked]) -> None:
    directory = changed("config.json", rope_scaling=YARN, rope_parameters=None)
    assert run("generate", "a " * CONTEXT, "--model", directory, "--max-tokens", 3)[0] == 0
    assert len(asked[0].token_ids) == len(TOKENIZER.encode("a " * CONTEXT).ids) + 3
    assert f"{4 * CONTEXT:,} tokens" in run("info", "--model", directory)[1]


def test_sampling_defaults_are_those_of_the_generation_configuration(
    changed: Any, run: Any, asked: list[Asked]
) -> None:
    stored = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1}
    directory = changed("generation_config.json", **stored)
    run("generate", PROMPT, "--model", directory, "--max-tokens", 1, "--top-p", 0.9)
    settings = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1}
    assert asked[0].params == SamplingParams(**settings, max_tokens=1)


def test_a_model_whose_configuration_does_not_sample_is_greedy_until_it_is_asked_to() -> None:
    assert SamplingOptions().changes({}) == {}
    assert SamplingOptions(top_k=5).changes({}) == {"temperature": 1, "top_k": 5}
    assert SamplingOptions(top_k=5).changes({"do_sample": True, "temperature": 0.7}) == {"top_k": 5}
    assert SamplingOptions(top_k=5).changes({"temperature": 0.7}) == {"temperature": 0.7, "top_k": 5}
    assert SamplingOptions(temperature=0).changes({"do_sample": True, "top_k": 9}) == {"temperature": 0}
    assert SamplingOptions(greedy=True).changes({"do_sample": True}) == {"temperature": 0}
    assert SamplingOptions(repetition_penalty=1.2).changes({}) == {"repetition_penalty": 1.2}


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40))
def test_streamed_pieces_are_whole_characters_that_add_up_to_the_text(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    characters = Characters(TOKENIZER)
    pieces = [characters.push(token) for token in ids]
    assert "".join(pieces) + characters.finish() == TOKENIZER.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}")
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_character_that_is_cut_by_the_end_is_left_out() -> None:
    *most, last = TOKENIZER.encode("ok 🙂").ids
    assert TOKENIZER.decode([last]) == "\N{REPLACEMENT CHARACTER}"
    characters = Characters(TOKENIZER)
    assert "".join(map(characters.push, most)) + characters.finish() == "ok "


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_pieces_end_at_the_first_stop_string_wherever_they_are_cut(pieces: list[str], stops: list[str]) -> None:
    held, shown = StopStrings(stops), ""
    for piece in pieces:
        shown += held.push(piece)
        if held.found:
            break
    shown += held.finish()
    text = "".join(pieces)
    assert held.found == any(stop in text for stop in stops)
    if not held.found:
        assert shown == text
    else:
        # A stop string ends the text as soon as it is complete, so the one that is complete first decides.
        first = next(n for n in range(len(text) + 1) if any(text[:n].endswith(stop) for stop in stops))
        assert text.startswith(shown)
        assert len(shown) < first
        assert not any(stop in shown for stop in stops)


# chat


def test_a_conversation_is_what_the_template_renders_and_is_read_once(
    checkpoint: Path, run: Any, type_in: Any, asked: list[Asked], tokens_read: list[int]
) -> None:
    type_in("Hello\n\nAnd you?\nWhy?\n/exit\nnever read\n")
    code, out, err = run("chat", "--model", checkpoint, "--system", "Be brief.", "--greedy", "--max-tokens", 6)
    assert code == 0
    assert err.count("tokens/s") == 3
    assert out.count("\n") >= 3
    assert len(asked) == 3
    text = TOKENIZER.decode(asked[-1].token_ids, skip_special_tokens=False)
    blocks = text.split("<|im_start|>assistant\n")
    answers = [block.partition("<|im_end|>\n<|im_start|>user")[0] for block in blocks[1:-1]]
    turns = [("system", "Be brief."), ("user", "Hello"), ("assistant", answers[0]), ("user", "And you?")]
    turns += [("assistant", answers[1]), ("user", "Why?")]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    messages = [{"role": role, "content": content} for role, content in turns]
    assert text.startswith(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    assert sum(tokens_read) == len(asked[-1].token_ids) - 1  # all but the last one, and none of them twice


def test_an_answer_that_ended_by_itself_is_closed_once(
    changed: Any, run: Any, type_in: Any, asked: list[Asked]
) -> None:
    directory = changed("generation_config.json", eos_token_id=list(range(KNOWN)))  # whatever comes ends the answer
    type_in("Hello\nAnd you?\n")
    assert run("chat", "--model", directory, "--max-tokens", 6)[0] == 0
    text = TOKENIZER.decode(asked[1].token_ids[:-1], skip_special_tokens=False)
    assert text == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
        "<|im_start|>user\nAnd you?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_reset_forgets_every_turn_but_not_the_system_prompt(
    checkpoint: Path, run: Any, type_in: Any, asked: list[Asked]
) -> None:
    type_in("Hello\n/reset\nHello\n")
    assert run("chat", "--model", checkpoint, "--system", "S", "--greedy", "--max-tokens", 4)[0] == 0
    assert len(asked) == 2
    assert asked[0].token_ids == asked[1].token_ids


def test_a_turn_over_the_context_is_one_line(checkpoint: Path, run: Any, type_in: Any) -> None:
    type_in(f"Hello\n{'a ' * 300}\n")
    code, _, err = run("chat", "--model", checkpoint, "--max-tokens", 4)
    *_, complaint = err.splitlines()
    assert code == 2
    assert "/reset" in complaint
    assert str(CONTEXT - 1) in complaint


def test_a_model_without_a_chat_template_cannot_chat(changed: Any, run: Any, type_in: Any) -> None:
    type_in("Hello\n")
    code, _, err = run("chat", "--model", changed("tokenizer_config.json", chat_template=None))
    assert (code, err.count("\n")) == (2, 1)
    assert "chat template" in err


# train


def training(directory: Path, **run: object) -> Path:
    documents = directory / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": f"line {n} of a text"}) + "\n" for n in range(40)))
    fields = {"num_hidden_layers": 2, "vocab_size": KNOWN, "rope_parameters": None, "layer_types": None}
    small = {name: value for name, value in tiny_config().to_dict().items() if isinstance(value, int)} | fields
    names = set(Qwen3NextConfig.__annotations__)
    sections: dict[str, dict[str, object]] = {
        "model.config": {name: value for name, value in small.items() if name in names and value is not None},
        "data": {"train": [str(documents)], "tokenizer": str(ASSETS), "tokens_per_batch": 64, "sequence_length": 32},
        "schedule": {"steps": 2},
        "run": {"output": str(directory / "out"), "device": "cpu", "dtype": "float32", "log_every": 1} | run,
    }
    text = "\n".join(
        f"[{name}]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in section.items())
        for name, section in sections.items()
    )
    file = directory / "train.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_train_says_where_model_log_and_plot_are_and_the_model_writes(tmp_path: Path, run: Any) -> None:
    code, out, _ = run("train", training(tmp_path))
    assert code == 0
    assert "finished at step 2" in out
    shown = dict(line.split(maxsplit=1) for line in out.splitlines() if line.startswith(("model", "log", "plot")))
    assert {name: Path(path).exists() for name, path in shown.items()} == {"model": True, "log": True, "plot": True}
    assert run("generate", "line", "--model", shown["model"], "--max-tokens", 1)[0] == 0


def test_an_interrupted_training_says_how_to_go_on(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result = TrainResult(reason="signal", step=7, tokens=700, seconds=1.0, model=tmp_path)
    monkeypatch.setattr("qwen3_next.train.train", lambda _: result)
    code, out, _ = run("train", training(tmp_path, max_seconds=1e-9))
    assert code == 130
    assert "stopped at step 7" in out
    assert "same command" in out


def test_a_training_that_used_up_its_time_is_no_failure(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = TrainResult(reason="time limit", step=7, tokens=700, seconds=1.0, model=tmp_path)
    monkeypatch.setattr("qwen3_next.train.train", lambda _: result)
    assert run("train", training(tmp_path, max_seconds=1e-9))[0] == 0


# info


def test_info_needs_the_configuration_alone(checkpoint: Path, tmp_path: Path, run: Any) -> None:
    shutil.copy(checkpoint / "config.json", tmp_path)
    code, out, _ = run("info", "--model", tmp_path)
    config = Qwen3NextConfig.from_pretrained(tmp_path)
    assert code == 0
    for figure in (config.parameter_count(), config.active_parameter_count(), config.mtp_parameter_count()):
        assert f"{figure:,}" in out
    assert "RAM" in out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "fp8"])
def test_info_takes_every_dtype(checkpoint: Path, run: Any, dtype: str) -> None:
    code, out, _ = run("info", "--model", checkpoint, "--dtype", dtype)
    assert code == 0
    assert f"weights in {dtype}, 90%" in out.replace("\n", " ")


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**36), st.sampled_from([torch.bfloat16, torch.float32, "fp8"]))
def test_what_is_said_to_fit_fits_and_no_more_would(memory: int, weights: Any) -> None:
    config = tiny_config(max_position_embeddings=32768, vocab_size=50_000)
    dtype = torch.bfloat16 if weights == "fp8" else weights
    state, per_token = config.state_bytes_per_sequence(dtype), config.kv_bytes_per_token(dtype)
    room = int(memory * USABLE) - config.weight_bytes(weights)
    found = capacity(config, memory, weights)
    assert found.fits == (room >= state + per_token)
    if found.fits:
        assert state + found.tokens * per_token <= room
        assert found.tokens == 32768 or state + (found.tokens + 1) * per_token > room
        for tokens, sequences in ((SHORT_CONTEXT, found.short_sequences), (32768, found.long_sequences)):
            each = state + tokens * per_token
            assert sequences * each <= room < (sequences + 1) * each


# doctor


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("is_available", False), ("device_count", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)


@pytest.mark.usefixtures("no_gpu")
def test_doctor_says_what_this_machine_is_and_what_runs_on_it(run: Any) -> None:
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    assert torch.__version__ in out
    assert "No GPU: the plain definitions run." in out
    assert f"All {len(OPERATIONS)} operations compute what they should." in out
    for name in OPERATIONS:
        assert re.search(rf"^{name} +definition .* ok *$", out, re.MULTILINE)


@pytest.mark.usefixtures("no_gpu")
def test_doctor_tells_programs_the_same(run: Any) -> None:
    code, out, _ = run("doctor", "--json")
    record = json.loads(out)
    assert code == 0
    assert record["device"] == "cpu"
    assert record["machine"]["torch"] == torch.__version__
    assert {operation["operation"] for operation in record["operations"]} == OPERATIONS.keys()
    assert all(operation["passed"] and operation["backend"] == "definition" for operation in record["operations"])


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_doctor_names_the_operation_that_is_wrong(
    run: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    right = Check(dtype="float32", kind="outputs", error=1e-7, tolerance=1e-5)
    wrong = Check(dtype="float32", kind="outputs", error=float("nan"), tolerance=1e-5)
    found = [
        Finding(operation="rms_norm", backend="definition", reason="no GPU", checks=(right,), fault=""),
        Finding(operation="attention", backend="definition", reason="no GPU", checks=(wrong,), fault=""),
        Finding(operation="route", backend="definition", reason="no GPU", checks=(), fault="TypeError: [odd] one"),
    ]
    monkeypatch.setattr("qwen3_next.cli_doctor.self_check", lambda device: iter(found))
    code, out, err = run("doctor", *arguments)
    assert code == 1
    assert err == "qwen3-next: these operations are wrong on this machine: attention, route.\n"
    assert "TypeError: [odd] one" in out
    if not arguments:
        assert "RED: attention, route" in out


@pytest.mark.usefixtures("no_gpu")
def test_doctor_says_that_the_kernels_language_is_missing(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen3_next.ops.selfcheck.version", _not_installed)
    code, out, _ = run("doctor")
    assert code == 0
    assert "triton not installed" in out


def _not_installed(package: str) -> str:
    raise PackageNotFoundError(package)


# faults


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("generate", "x", "--model", "./nowhere"), "nowhere"),
        (("generate", "x", "--model", ""), "model is empty"),
        (("generate", "x", "--seed", "-1"), "--seed"),
        (("generate", "x", "--seed", str(2**64)), "--seed"),
        (("generate", "x", "--dtype", "int3"), "int3"),
        (("generate", "x", "--device", "abacus"), "abacus"),
        (("generate", "x", "--device", "cuda:99"), "cuda:99"),
        (("generate", "x", "--top-p", "1.5"), "top_p"),
        (("generate", "x", "--temperature", "-1"), "temperature"),
        (("generate", "x", "--greedy", "--top-k", "5"), "--top-k"),
        (("generate", "x", "--temperature", "0", "--min-p", "0.1"), "--min-p"),
        (("generate", "x", "--stop", ""), "stop"),
        (("generate", "x", "--max-tokens", "0"), "--max-tokens"),
        (("generate", "x", "--max-tokens", "many"), "--max-tokens"),
        (("generate", "x", "--colour"), "--colour"),
        (("generate",), "prompt"),
        (("generate", ""), "at least one token"),
        (("generate", "a " * 300), "255"),
        (("generate", "\ud800"), "UTF-8"),
        (("dance",), "dance"),
        (("train", "nowhere.toml"), "nowhere.toml"),
        (("info", "--dtype", "int3"), "int3"),
        (("info", "--model", "./nowhere"), "nowhere"),
    ],
    ids=lambda value: " ".join(value)[:40].encode("ascii", "replace").decode() if isinstance(value, tuple) else value,
)
def test_a_fault_is_one_line_on_stderr_and_exit_code_2(
    checkpoint: Path, run: Any, arguments: tuple[str, ...], named: str
) -> None:
    takes_model = arguments[0] in ("generate", "info") and "--model" not in arguments and arguments != ("generate",)
    code, out, err = run(*arguments, *(["--model", checkpoint] if takes_model else []))
    assert (code, out.strip(), err.count("\n")) == (2, "", 1)
    assert err.startswith("qwen3-next: ")
    assert named in err


@pytest.mark.parametrize(
    ("file", "change"), [("config.json", {"model_type": "llama"}), ("config.json", {"num_attention_heads": 3})]
)
def test_a_checkpoint_that_cannot_be_served_is_one_line(changed: Any, run: Any, file: str, change: Any) -> None:
    code, _, err = run("generate", "x", "--model", changed(file, **change))
    assert (code, err.count("\n")) == (2, 1)
    assert str(next(iter(change.values()))) in err


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": "hot"}, {"top_k": 2.5}, {"top_p": [0.9]}, {"do_sample": "no"}, {"eos_token_id": {"a": 1}}],
    ids=str,
)
def test_generation_settings_of_a_wrong_type_are_one_line(changed: Any, run: Any, wrong: dict[str, object]) -> None:
    code, _, err = run("generate", "x", "--model", changed("generation_config.json", **({"do_sample": True} | wrong)))
    assert (code, err.count("\n")) == (2, 1)
    ((name, value),) = wrong.items()
    assert f"generation_config.json: {name}={value!r}" in err


@pytest.mark.parametrize("content", ["{}", "nonsense"])
def test_a_damaged_tokenizer_is_one_line(changed: Any, run: Any, content: str) -> None:
    directory = changed("config.json")
    (directory / "tokenizer.json").write_text(content)
    code, _, err = run("generate", "x", "--model", directory)
    assert (code, err.count("\n")) == (2, 1)
    assert "tokenizer.json" in err


@pytest.mark.parametrize("template", ["{% for %}", "{{ raise_exception('no system prompt') }}", "{{ 1 + 'a' }}"])
def test_a_chat_template_that_fails_is_one_line(changed: Any, run: Any, type_in: Any, template: str) -> None:
    type_in("Hello\n")
    code, _, err = run("chat", "--model", changed("tokenizer_config.json", chat_template=template))
    assert (code, err.count("\n")) == (2, 1)
    assert "chat template" in err


def test_token_ids_beyond_the_model_are_one_line(tmp_path: Path, run: Any) -> None:
    Qwen3NextForCausalLM(tiny_config(vocab_size=200)).save_pretrained(tmp_path)
    shutil.copy(ASSETS / "tokenizer.json", tmp_path)
    code, _, err = run("generate", PROMPT, "--model", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "0 to 199" in err


def test_a_full_device_is_one_line(checkpoint: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(Runner, "run", full)
    code, _, err = run("generate", PROMPT, "--model", checkpoint)
    assert (code, err.count("\n")) == (2, 1)
    assert "does not fit the memory of" in err


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_one_line_that_names_it(changed: Any, run: Any, file: str) -> None:
    directory = changed("config.json")
    (directory / file).unlink()
    code, _, err = run("generate", "x", "--model", directory)
    assert (code, err.count("\n")) == (2, 1)
    assert file in err


def test_broken_json_is_one_line_that_names_it(changed: Any, run: Any) -> None:
    directory = changed("config.json")
    (directory / "generation_config.json").write_text("{")
    code, _, err = run("generate", "x", "--model", directory)
    assert (code, err.count("\n")) == (2, 1)
    assert "generation_config.json" in err


def test_a_hub_id_is_downloaded(checkpoint: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.extend([name, *allow_patterns])
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert run("generate", "x", "--model", "someone/model", "--max-tokens", 1)[0] == 0
    assert asked[0] == "someone/model"
    assert "*.safetensors" in asked
    asked.clear()
    assert run("info", "--model", "someone/model")[0] == 0
    assert asked[0] == "someone/model"
    assert "*.safetensors" not in asked


def test_a_hub_that_does_not_answer_is_one_line(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, *, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("no network\nand a second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    code, _, err = run("generate", "x", "--model", "someone/model")
    assert (code, err.count("\n")) == (2, 1)
    assert "someone/model" in err
    assert "no network" in err


# the process


def test_help_does_not_import_torch() -> None:
    result = python(
        "import sys; from qwen3_next.cli import main; code = main(['generate', '--help']);"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; sys.exit(code)"
    )
    assert result.returncode == 0, result.stderr
    assert "--top-p" in result.stdout


def test_a_first_token_waits_for_no_compiler_and_no_model_classes_of_transformers(checkpoint: Path) -> None:
    result = python(
        "import sys; from qwen3_next.cli import main;"
        f"code = main(['generate', 'x', '--model', {str(checkpoint)!r}, '--max-tokens', '2']);"
        "slow = {'torch._dynamo', 'transformers.modeling_utils', 'transformers.generation.utils', 'accelerate'};"
        "assert not slow & set(sys.modules), slow & set(sys.modules); sys.exit(code)"
    )
    assert result.returncode == 0, result.stderr


def test_ctrl_c_keeps_what_was_written_and_leaves_no_traceback(checkpoint: Path) -> None:
    command = [sys.executable, "-c", "import sys; from qwen3_next.cli import main; sys.exit(main())"]
    arguments = ["generate", PROMPT, "--model", str(checkpoint), "--temperature", "1", "--max-tokens", "100000"]
    # A context without end, as far as this test is concerned: the run must not finish by itself.
    directory = checkpoint.parent / "endless"
    shutil.copytree(checkpoint, directory)
    content = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(json.dumps(content | {"max_position_embeddings": 10**6}), encoding="utf-8")
    arguments[3] = str(directory)
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    first = os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (first + out).decode().strip()
    assert b"Traceback" not in err
    assert b"tokens/s" in err
    assert err.count(b"\n") == 1


def test_a_reader_that_leaves_ends_the_program_quietly(checkpoint: Path) -> None:
    code = "import sys; from qwen3_next.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "generate", PROMPT, "--model", str(checkpoint), "--max-tokens", "200"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)
    assert b"Traceback" not in err
    assert b"Exception" not in err


# the model in the box


def test_the_shipped_model_writes_english(run: Any) -> None:
    code, out, _ = run("generate", PROMPT, "--max-tokens", 48, "--seed", 1)
    assert code == 0
    words = out.lower().split()
    assert len(words) > 15
    assert {"the", "a", "and", "to", "of", "was", "he", "she", "it", "in"} & set(words)


def test_the_shipped_model_answers_a_conversation(run: Any, type_in: Any) -> None:
    type_in("Hello!\nTell me more.\n")
    code, out, err = run("chat", "--max-tokens", 12, "--seed", 1)
    assert code == 0
    assert out.strip()
    assert err.count("tokens/s") == 2


def test_batch_answers_a_file_and_goes_on_with_it(checkpoint: Path, tmp_path: Path, run: Any) -> None:
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{PROMPT} {n}"}) + "\n" for n in range(5)), encoding="utf-8")
    command = ("batch", prompts, answers, "--model", checkpoint, "--greedy", "--max-tokens", 4, "--sequences", 2)
    code, out, _ = run(*command)
    assert (code, out.startswith("5 prompts answered")) == (0, True)
    written = answers.read_text(encoding="utf-8").splitlines()
    found = {json.loads(line)["id"]: json.loads(line)["text"] for line in written}
    assert sorted(found) == ["1", "2", "3", "4", "5"]
    single = run("generate", f"{PROMPT} 2", "--model", checkpoint, "--greedy", "--max-tokens", 4)[1]
    assert found["3"] == single.removesuffix("\n")
    answers.write_text("\n".join(written[:3]) + "\n", encoding="utf-8")
    assert run(*command)[1].startswith("2 prompts answered")
    prompts.write_text("no JSON\n", encoding="utf-8")
    assert run(*command)[0] == 2


def test_info_shows_the_shipped_model(run: Any) -> None:
    code, out, _ = run("info")
    assert code == 0
    assert "the model in the box" in out


def test_bench_measures_each_number_of_streams(checkpoint: Path, run: Any, tokens_read: list[int]) -> None:
    sizes = ("--prompt-tokens", 9, "--output-tokens", 4, "--rounds", 3)
    code, out, _ = run("bench", "--model", checkpoint, "--streams", 1, "--streams", 2, *sizes)
    assert code == 0
    rows = [line.split("│") for line in out.splitlines() if "│" in line]
    assert [row[0].strip() for row in rows] == ["1", "2"]
    for row in rows:
        assert all(float(cell.replace(",", "")) >= 0 for cell in row[1:])
    # A round to warm up and three to measure, each request reading its prompt and all but the last token of its answer.
    assert sum(tokens_read) == (1 + 2) * 4 * (9 + 3)


def test_bench_refuses_what_does_not_fit_the_context(checkpoint: Path, run: Any) -> None:
    code, _, err = run("bench", "--model", checkpoint, "--prompt-tokens", CONTEXT, "--output-tokens", 2)
    assert (code, err.count("\n")) == (2, 1)
    assert f"Allowed: {CONTEXT}" in err
