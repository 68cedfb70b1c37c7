"""Every example runs, on a random model and on the one in the box, and shows what it promises."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import scramble, tiny_config

import qwen3_next
from qwen3_next import Qwen3NextForCausalLM

EXAMPLES = Path(__file__).parent.parent / "examples"
ASSETS = Path(qwen3_next.__file__).parent / "assets"
NAMES = ["classify", "draft_with_mtp", "fine_tune_lora", "generate_text", "many_prompts", "train_tiny"]

# One process for all: importing torch and transformers takes longer than any of them.
RUNNER = """
import contextlib, io, json, runpy, sys, traceback

model, paths, outputs = sys.argv[1], sys.argv[2:], {}
for path in paths:
    sys.argv[1:] = [model] if model else []
    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        try:
            runpy.run_path(path, run_name="__main__")
        except BaseException:
            traceback.print_exc(file=written)
            written.write("FAILED")
    outputs[path] = written.getvalue()
print(json.dumps(outputs))
"""


@pytest.fixture(scope="module", params=["a random model", "the model in the box"])
def outputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each example writes."""
    model = str(random_model(tmp_path_factory.mktemp("model"))) if request.param == "a random model" else ""
    paths = {name: str(EXAMPLES / f"{name}.py") for name in NAMES}
    result = subprocess.run(
        [sys.executable, "-c", RUNNER, model, *paths.values()], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    written = json.loads(result.stdout)
    return {name: written[path] for name, path in paths.items()}


def random_model(directory: Path) -> Path:
    ends = {"eos_token_id": 4089, "pad_token_id": 4087}
    model = Qwen3NextForCausalLM(tiny_config(vocab_size=4096, tie_word_embeddings=True, **ends))
    scramble(model)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, directory)
    return directory


def losses(output: str) -> list[float]:
    return [float(value) for value in re.findall(r"loss (\d+\.\d+)", output)]


def test_every_example_is_run_here() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_an_example_fits_a_page_and_says_what_it_does(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    assert text.startswith('"""')
    assert f"python examples/{name}.py" in text.splitlines()[0]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs(outputs: dict[str, str], name: str) -> None:
    assert "FAILED" not in outputs[name], outputs[name]


def test_the_published_usage_generates_text(outputs: dict[str, str]) -> None:
    assert outputs["generate_text"].startswith("content: ")


def test_drafting_shows_its_acceptance(outputs: dict[str, str]) -> None:
    found = re.search(r"(\d+) of (\d+) drafts accepted: (\d\.\d\d) tokens per call", outputs["draft_with_mtp"])
    assert found is not None, outputs["draft_with_mtp"]
    accepted, tried = int(found[1]), int(found[2])
    assert accepted <= tried
    assert tried + accepted + 1 in (48, 49)


def test_fine_tuning_lowers_the_loss_and_merging_changes_nothing(outputs: dict[str, str]) -> None:
    first, *_, last = losses(outputs["fine_tune_lora"])
    assert last < first
    found = re.search(r"largest relative difference (\S+)", outputs["fine_tune_lora"])
    assert found is not None
    assert float(found[1]) < 1e-5


def test_training_counts_its_steps(outputs: dict[str, str]) -> None:
    assert "12 steps" in outputs["train_tiny"]


def test_the_classifier_learns(outputs: dict[str, str]) -> None:
    first, *_, last = losses(outputs["classify"])
    assert last < first
    assert len(re.findall(r"^(prose|code) ", outputs["classify"], re.MULTILINE)) == 2


def test_later_prompts_go_on_from_what_an_earlier_one_left(outputs: dict[str, str]) -> None:
    found = re.findall(r"(\d+) of (\d+) tokens cached", outputs["many_prompts"])
    assert [int(cached) for cached, _ in found] == [64, 64]
