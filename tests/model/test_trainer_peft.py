"""transformers' Trainer and PEFT's LoRA work on these classes as on transformers' own."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from tests.conftest import tiny_model
from tests.model.reference import relative_error
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.models import qwen3_next as theirs

from qwen3_next import Qwen3NextForCausalLM

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# For this model type peft takes the module names gate_proj, up_proj and down_proj for the routed experts of older
# transformers, whatever stands before them. By the name of the parameter it finds the shared expert's.
SHARED_EXPERT = [f"shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")]
MIXERS = ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"]


class Countings(Dataset[dict[str, Tensor]]):
    """Rows that count upwards from a random number: learnt within a few steps."""

    def __init__(self, rows: int = 32, length: int = 24) -> None:
        starts = torch.randint(0, 97, (rows, 1))
        self.rows = (starts + torch.arange(length)) % 97

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def trainer(model: Any, directory: Path, data: Dataset[Any], **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return Trainer(model, TrainingArguments(str(directory), **(settings | changes)), train_dataset=data)


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def assert_equal_parameters(model: Any, other: Any) -> None:
    for (name, ours), theirs_ in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs_), name


def test_the_loss_falls_and_the_mtp_layer_moves(tmp_path: Path) -> None:
    model = tiny_model(1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    run = trainer(model, tmp_path, Countings())
    run.train()
    assert np.mean(losses(run)[-3:]) < 0.7 * losses(run)[0]
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_checkpoints_are_in_the_published_layout_and_resuming_is_bitwise_going_on(tmp_path: Path) -> None:
    data, straight, resumed = Countings(), tiny_model(2), tiny_model(99)
    trainer(straight, tmp_path, data, max_steps=6, save_strategy="steps", save_steps=3).train()
    checkpoint = tmp_path / "checkpoint-3"
    with safe_open(checkpoint / "model.safetensors", "pt") as stored:
        names = set(stored.keys())
    assert {"model.layers.0.mlp.experts.7.up_proj.weight", "mtp.layers.0.mlp.experts.0.down_proj.weight"} <= names
    assert not any("gate_up_proj" in name for name in names)
    assert json.loads((checkpoint / "config.json").read_text())["architectures"] == ["Qwen3NextForCausalLM"]
    trainer(resumed, tmp_path, data, max_steps=6).train(resume_from_checkpoint=str(checkpoint))
    assert_equal_parameters(resumed, straight)
    assert_equal_parameters(Qwen3NextForCausalLM.from_pretrained(tmp_path / "checkpoint-6"), straight)


def test_published_names_are_a_state_dict_of_the_model_whole_or_in_shards(tmp_path: Path) -> None:
    source = tiny_model(3)
    source.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        published = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  no mapping
    whole, sharded = tiny_model(98), tiny_model(97)
    assert str(whole.load_state_dict(published)) == "<All keys matched successfully>"
    assert_equal_parameters(whole, source)
    for remainder in range(2):  # cuts every layer's experts in two
        sharded.load_state_dict(dict(list(published.items())[remainder::2]), strict=False)
    assert_equal_parameters(sharded, source)
    published["model.layers.0.mlp.experts.1.up_proj.weight"] = torch.zeros(3, 32)
    with pytest.raises(RuntimeError, match=r"size mismatch for model\.layers\.0\.mlp\.experts\.1\.up_proj\.weight"):
        whole.load_state_dict(published, strict=False)


def test_gradient_accumulation_changes_no_step(tmp_path: Path) -> None:
    """Batches of unequal target counts: only a loss that divides by the window's count comes out the same."""
    data = Countings(rows=16)
    labels = data.rows.clone()
    labels[::2, :17] = -100
    rows = [{"input_ids": row, "labels": label} for row, label in zip(data.rows, labels, strict=True)]
    whole, split = tiny_model(4), tiny_model(4)
    trainer(whole, tmp_path, rows, max_steps=3).train()
    trainer(split, tmp_path, rows, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=4).train()
    for (name, ours), expected in zip(split.named_parameters(), whole.parameters(), strict=True):
        assert relative_error(ours, expected) < 1e-4, name


def test_evaluation_reports_the_next_token_loss_and_predictions_are_the_logits_alone(tmp_path: Path) -> None:
    model, data = tiny_model(5), Countings(rows=4)
    run = trainer(model, tmp_path, data)
    expected = model(data.rows, labels=data.rows)
    assert run.evaluate(data)["eval_loss"] == pytest.approx(expected.lm_loss.item(), rel=1e-5)
    predicted = run.predict(data)
    assert isinstance(predicted.predictions, np.ndarray)
    np.testing.assert_allclose(predicted.predictions, expected.logits.detach().numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(predicted.label_ids, data.rows.numpy())


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_training_with_gradient_checkpointing_is_training_without(tmp_path: Path, reentrant: bool) -> None:
    data, plain, saving = Countings(), tiny_model(6), tiny_model(6)
    sgd: dict[str, Any] = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1}  # Adam divides rounding by rounding
    trainer(plain, tmp_path, data, **sgd).train()
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer(saving, tmp_path, data, **sgd, **options).train()
    for (name, ours), expected in zip(saving.named_parameters(), plain.parameters(), strict=True):
        assert relative_error(ours, expected) < 1e-5, name


def lora(**changes: Any) -> LoraConfig:
    settings: dict[str, Any] = {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": MIXERS,
        "target_parameters": EXPERTS + SHARED_EXPERT,
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**(settings | changes))


def adapters(model: Any) -> Iterator[tuple[str, Tensor]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if "lora_" in name)


def adapted(seed: int, **changes: Any) -> Any:
    """A model with adapters that all do something: peft starts them at zero."""
    model = get_peft_model(tiny_model(seed), lora(**changes))
    with torch.no_grad():
        for _, parameter in adapters(model):
            parameter.normal_(0, 0.15)
    return model.eval()


def adapter_targets(layer: str, mixer: str, names: list[str]) -> set[str]:
    shared = [f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")]
    routed = ["mlp.experts", "mlp.experts.base_layer"]  # peft wraps once for each of the two parameters
    return {f"{layer}.{name}" for name in (*(f"{mixer}.{name}" for name in names), *routed, *shared)}


def test_adapters_reach_every_projection_of_every_layer() -> None:
    found = {name.split(".lora_")[0].removeprefix("base_model.model.") for name, _ in adapters(adapted(7))}
    expected = [adapter_targets(f"model.layers.{i}", "linear_attn", MIXERS[:3]) for i in range(3)]
    expected += [adapter_targets(layer, "self_attn", MIXERS[3:]) for layer in ("model.layers.3", "mtp.layers.0")]
    assert found == set.union(*expected)


@pytest.mark.parametrize("length", [1, 3, 70])
def test_merging_the_adapters_gives_the_adapters_logits_and_drafts(length: int) -> None:
    tokens = torch.randint(0, 97, (2, length))
    model = adapted(8)
    base, ours = tiny_model(8)(tokens).logits, model(tokens).logits
    ahead = model.base_model.model.predict_ahead
    inputs = model.base_model.model.model(tokens, return_packed=True).packed.inputs
    drafts = ahead(inputs)[1]
    assert relative_error(ours, base) > 0.05
    merged = model.merge_and_unload()
    assert type(merged) is Qwen3NextForCausalLM
    assert relative_error(merged(tokens).logits, ours) < 1e-5
    assert relative_error(merged.predict_ahead(inputs)[1], drafts) < 1e-5


def test_disabled_adapters_leave_the_model_as_it_was() -> None:
    tokens, model = torch.randint(0, 97, (2, 20)), adapted(9)
    with model.disable_adapter():
        torch.testing.assert_close(model(tokens).logits, tiny_model(9)(tokens).logits)
    assert relative_error(model.unload()(tokens).logits, tiny_model(9)(tokens).logits) < 1e-6


def test_a_merged_model_is_saved_in_the_published_layout_and_transformers_reads_it(tmp_path: Path) -> None:
    tokens, model = torch.randint(0, 97, (2, 20)), adapted(10)
    expected = model(tokens).logits
    model.merge_and_unload().save_pretrained(tmp_path)
    for cls in (Qwen3NextForCausalLM, theirs.Qwen3NextForCausalLM):
        assert relative_error(cls.from_pretrained(tmp_path)(tokens).logits, expected) < 1e-4


def test_saved_adapters_come_back_on_a_fresh_model(tmp_path: Path) -> None:
    tokens, model = torch.randint(0, 97, (2, 20)), adapted(11)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(11), tmp_path).eval()
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_transformers_own_adapter_methods_save_the_adapters_alone(tmp_path: Path) -> None:
    tokens, model = torch.randint(0, 97, (2, 20)), tiny_model(12)
    model.add_adapter(lora())
    with torch.no_grad():
        for _, parameter in adapters(model):
            parameter.normal_(0, 0.15)
    model.eval().save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    assert not (tmp_path / "model.safetensors").exists()
    again = tiny_model(12)
    again.load_adapter(tmp_path)
    assert torch.equal(again.eval()(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "recomputed", "recomputed reentrant"])
def test_training_moves_every_adapter_and_nothing_else(tmp_path: Path, checkpointing: bool | None) -> None:
    model = get_peft_model(tiny_model(13), lora())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    options: dict[str, Any] = {"max_steps": 4}
    if checkpointing is not None:
        options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
    trainer(model, tmp_path, Countings(), **options).train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora_" in name), name


def test_an_adapter_on_the_head_counts_in_the_mtp_loss_too() -> None:
    tokens = torch.randint(0, 97, (2, 20))
    model = adapted(14, target_modules=["lm_head"], target_parameters=None)
    ours = model.train()(tokens, labels=tokens)
    merged = model.merge_and_unload().train()(tokens, labels=tokens)
    torch.testing.assert_close(ours.lm_loss, merged.lm_loss)
    torch.testing.assert_close(ours.mtp_loss, merged.mtp_loss)
    assert relative_error(ours.mtp_loss, tiny_model(14).train()(tokens, labels=tokens).mtp_loss) > 1e-3
