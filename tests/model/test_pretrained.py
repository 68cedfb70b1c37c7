"""`from_pretrained` and `save_pretrained`: dtypes, devices, what is missing or left over, and the Auto classes."""

import logging
from collections.abc import Callable
from pathlib import Path
from shutil import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from safetensors import safe_open
from tests.conftest import tiny_model
from tests.model.reference import relative_error
from tests.model.stored import same_bits, unfused, write
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.qwen3_next import Qwen3NextForCausalLM as PeerModel

import qwen3_next
from qwen3_next import CheckpointError, ConfigError, InputError, Qwen3NextForCausalLM, Qwen3NextModel

TOKENS = torch.arange(2 * 9).view(2, 9)
ASSETS = Path(qwen3_next.__file__).parent / "assets"

DISK: dict[str, Any] = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.norm": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.layers.3": "cpu",
    "lm_head": "disk",
    "mtp": "disk",
}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Qwen3NextForCausalLM, Path]:
    model = tiny_model(3)
    model.save_pretrained(tmp_path)
    return model, tmp_path


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """`register()`, taken back after the test."""
    mappings: list[Any] = [CONFIG_MAPPING, *(getattr(transformers, name)._model_mapping for name in AUTO_CLASSES)]
    for mapping in mappings:
        monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))
    qwen3_next.register()


@pytest.fixture
def notices(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the loader told the user so far."""
    logger = logging.getLogger("qwen3_next.model.pretrained")
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level("WARNING", logger=logger.name)
    return lambda: [record.getMessage() for record in caplog.records if record.name == logger.name]


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def test_a_round_trip_through_both_methods_is_bitwise_with_mtp(saved: tuple[Qwen3NextForCausalLM, Path]) -> None:
    model, folder = saved
    again = Qwen3NextForCausalLM.from_pretrained(folder)
    before, after = state(model), state(again)
    assert before.keys() == after.keys()
    assert any(name.startswith("mtp.") for name in after)
    assert [name for name in before if not same_bits(before[name], after[name])] == []
    assert not again.training
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id


def test_dtype_auto_keeps_what_the_checkpoint_holds_and_decay_rates_in_fp32(tmp_path: Path) -> None:
    model = tiny_model(4).to(torch.bfloat16)
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.layers.0.linear_attn.A_log").dtype is torch.bfloat16
    loaded = Qwen3NextForCausalLM.from_pretrained(tmp_path, dtype="auto")
    kept = {name for name, p in loaded.named_parameters() if p.dtype is torch.float32}
    assert kept == {name for name, _ in loaded.named_parameters() if name.endswith(("A_log", "dt_bias"))}
    assert {p.dtype for name, p in loaded.named_parameters() if name not in kept} == {torch.bfloat16}
    assert loaded.dtype is torch.bfloat16


def test_a_dtype_asked_for_is_given(saved: tuple[Qwen3NextForCausalLM, Path]) -> None:
    model, folder = saved
    loaded = Qwen3NextForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert loaded.lm_head.weight.dtype is torch.bfloat16
    assert same_bits(loaded.model.layers[0].linear_attn.A_log, model.model.layers[0].linear_attn.A_log)


@pytest.mark.parametrize("device_map", [pytest.param("auto", id="auto"), pytest.param(DISK, id="disk")])
@pytest.mark.parametrize("shard_size", ["4GB", "40KB"])
def test_device_maps_change_no_logit_and_no_saved_bit(tmp_path: Path, device_map: Any, shard_size: str) -> None:
    model = tiny_model(5)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    split = Qwen3NextForCausalLM.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload", max_memory={"cpu": "1GB"}
    )
    if device_map is DISK:
        assert {p.device.type for p in split.model.layers[1].parameters()} == {"meta"}
    # Not bitwise: memory mapped from a file is aligned differently, and sums run in another order.
    assert relative_error(split(TOKENS).logits, model(TOKENS).logits) < 1e-6
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(split.generate(TOKENS, **options), model.generate(TOKENS, **options))
    hidden = model.model(TOKENS).last_hidden_state
    drafted = [each.draft(hidden, TOKENS.roll(-1, 1), 3).token_ids for each in (split, model)]
    assert torch.equal(*drafted)
    loss, expected = (each.train()(TOKENS, labels=TOKENS).loss for each in (split, model))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6), "with the MTP loss, which reads the head's weight"
    split.save_pretrained(tmp_path / "again")
    again = state(Qwen3NextForCausalLM.from_pretrained(tmp_path / "again"))
    assert all(same_bits(tensor, again[name]) for name, tensor in state(model).items())


def test_auto_puts_on_the_disk_what_no_memory_holds(saved: tuple[Qwen3NextForCausalLM, Path], tmp_path: Path) -> None:
    model, folder = saved
    split = Qwen3NextForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": "150KB"}, offload_folder=tmp_path / "offload"
    )
    assert "disk" in split.hf_device_map.values()
    assert relative_error(split(TOKENS).logits, model(TOKENS).logits) < 1e-6


def test_a_model_on_the_meta_device_holds_no_memory_and_takes_weights(saved: tuple[Qwen3NextForCausalLM, Path]) -> None:
    model, _ = saved
    with torch.device("meta"):
        empty = Qwen3NextForCausalLM(model.config)
    assert {tensor.device.type for tensor in (*empty.parameters(), *empty.buffers())} == {"meta"}
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    empty.load_state_dict(state(model), assign=True)
    assert all(torch.equal(p, q) for p, q in zip(empty.parameters(), model.parameters(), strict=True))


def test_without_any_mtp_tensor_the_model_has_no_mtp_layer_and_says_so_once(
    saved: tuple[Qwen3NextForCausalLM, Path], notices: Callable[[], list[str]]
) -> None:
    model, folder = saved
    write(folder, {name: x for name, x in unfused(state(model)).items() if not name.startswith("mtp.")})
    loaded = Qwen3NextForCausalLM.from_pretrained(folder)
    assert loaded.mtp is None
    assert loaded.config.num_nextn_predict_layers == 0
    (notice,) = notices()
    assert "no multi-token prediction layer" in notice
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    loaded.save_pretrained(folder / "again")
    assert Qwen3NextForCausalLM.from_pretrained(folder / "again").mtp is None
    assert len(notices()) == 1


def test_a_partial_mtp_block_is_refused_with_the_keys_it_lacks(saved: tuple[Qwen3NextForCausalLM, Path]) -> None:
    model, folder = saved
    tensors = unfused(state(model))
    for name in ("mtp.fc.weight", "mtp.layers.0.self_attn.q_norm.weight"):
        del tensors[name]
    write(folder, tensors)
    with pytest.raises(CheckpointError, match=r"2 missing: mtp\.fc\.weight, mtp\.layers\.0\.self_attn\.q_norm\.weight"):
        Qwen3NextForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["missing", "unexpected", "of another shape"])
def test_what_does_not_fit_is_refused_by_name_before_anything_is_allocated(
    saved: tuple[Qwen3NextForCausalLM, Path], kind: str
) -> None:
    model, folder = saved
    tensors, name = unfused(state(model)), "model.layers.2.linear_attn.conv1d.weight"
    if kind == "missing":
        del tensors[name]
    elif kind == "unexpected":
        name = "model.layers.2.linear_attn.bias"
        tensors[name] = torch.zeros(3)
    else:
        tensors[name] = tensors[name][:-1]
    write(folder, tensors)
    for error in (CheckpointError, ValueError, RuntimeError):  # the last is what transformers raises
        with pytest.raises(error, match=f"1 {kind}: {name}"):
            Qwen3NextForCausalLM.from_pretrained(folder)


def test_a_head_of_another_size_is_made_anew_where_that_was_asked_for(tmp_path: Path) -> None:
    tiny = qwen3_next.Qwen3NextForSequenceClassification(tiny_model().config)
    tiny.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"score\.weight \(expected \[5, 32\], found \[2, 32\]\)"):
        type(tiny).from_pretrained(tmp_path, num_labels=5)
    wider = type(tiny).from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert wider.score.weight.shape == (5, 32)
    assert same_bits(wider.model.norm.weight, tiny.model.norm.weight)


@pytest.mark.parametrize("spelling", ["norm.weight", "transformer.norm.weight"])
def test_a_tensor_stored_under_two_spellings_is_refused(
    saved: tuple[Qwen3NextForCausalLM, Path], spelling: str
) -> None:
    model, folder = saved
    write(folder, {**unfused(state(model)), spelling: torch.randn(model.config.hidden_size)})
    with pytest.raises(CheckpointError, match=rf"1 (standing twice|unexpected): .*{spelling}"):
        Qwen3NextForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("cls", [qwen3_next.Qwen3NextForCausalLM, qwen3_next.Qwen3NextForQuestionAnswering])
def test_a_bare_networks_checkpoint_fills_the_network_of_a_head(cls: Any, tmp_path: Path) -> None:
    bare = tiny_model(6, num_nextn_predict_layers=0).model
    bare.save_pretrained(tmp_path)
    loaded, report = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.split(".")[0] for name in report["missing_keys"]} <= {"lm_head", "qa_outputs"}
    assert report["missing_keys"]
    assert all(same_bits(a, b) for a, b in zip(bare.parameters(), loaded.base_model.parameters(), strict=True))


def test_a_language_models_checkpoint_fills_the_bare_network(saved: tuple[Qwen3NextForCausalLM, Path]) -> None:
    model, folder = saved
    bare = Qwen3NextModel.from_pretrained(folder)
    assert all(same_bits(a, b) for a, b in zip(bare.parameters(), model.model.parameters(), strict=True))


def test_transformers_own_model_loads_what_we_save(saved: tuple[Qwen3NextForCausalLM, Path]) -> None:
    model, folder = saved
    peer, report = PeerModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert relative_error(peer(TOKENS).logits, model(TOKENS).logits) < 1e-5


def test_we_load_what_transformers_own_model_saves(tmp_path: Path, saved: tuple[Qwen3NextForCausalLM, Path]) -> None:
    model, folder = saved
    PeerModel.from_pretrained(folder).save_pretrained(tmp_path / "peer")
    loaded = Qwen3NextForCausalLM.from_pretrained(tmp_path / "peer")
    assert loaded.mtp is None
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_tied_embeddings_are_one_tensor_in_memory_and_on_disk(tmp_path: Path) -> None:
    model = tiny_model(7, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  not a mapping
    loaded = Qwen3NextForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [113, 60])
def test_resized_embeddings_keep_the_rows_they_had(tmp_path: Path, tied: bool, size: int) -> None:
    model = tiny_model(8, tie_word_embeddings=tied)
    embeddings, head = (m.weight.detach().clone() for m in (model.model.embed_tokens, model.lm_head))
    model.resize_token_embeddings(size)
    kept = min(size, 97)
    assert model.config.vocab_size == size
    assert model(TOKENS).logits.shape[-1] == size
    assert torch.equal(model.model.embed_tokens.weight[:kept], embeddings[:kept])
    assert torch.equal(model.lm_head.weight[:kept], head[:kept])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    model.save_pretrained(tmp_path)
    assert torch.equal(Qwen3NextForCausalLM.from_pretrained(tmp_path)(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    "arguments", [{"variant": "fp16"}, {"save_original_format": False}, {"max_shards": 3}], ids=str
)
def test_another_layout_or_a_misspelt_argument_is_refused_when_saving(tmp_path: Path, arguments: Any) -> None:
    with pytest.raises(InputError, match=next(iter(arguments))):
        tiny_model().save_pretrained(tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["abc", "4", "0GB", "-1GB", 0, -5])
def test_a_shard_size_below_one_byte_is_refused_before_anything_is_written(tmp_path: Path, size: int | str) -> None:
    with pytest.raises(InputError, match=rf"max_shard_size={size!r}.*at least 1 byte"):
        tiny_model().save_pretrained(tmp_path, max_shard_size=size)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would have been committed to the hub: each commit's repository, files and settings."""
    commits: list[dict[str, Any]] = []

    def create_commit(*_: HfApi, repo_id: str, operations: list[CommitOperationAdd], **settings: Any) -> None:
        files = {operation.path_in_repo: Path(operation.path_or_fileobj).read_bytes() for operation in operations}
        commits.append({"repo_id": repo_id, "files": files} | settings)

    def create_repo(repo_id: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=f"someone/{repo_id}")

    def card(*_: Any, **__: Any) -> ModelCard:
        return ModelCard("A model.")

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr("transformers.utils.hub.create_commit", create_commit, raising=False)  # before 5.23
    monkeypatch.setattr("qwen3_next.model.pretrained.create_repo", create_repo)
    monkeypatch.setattr("qwen3_next.model.pretrained.create_and_tag_model_card", card)
    return commits


def test_what_was_written_is_uploaded_once_and_nothing_that_lay_beside_it(
    tmp_path: Path, uploads: list[dict[str, Any]]
) -> None:
    (tmp_path / "notes.txt").write_text("private")
    model = tiny_model(9)
    changed = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    options: dict[str, Any] = {"dtype": torch.bfloat16, "max_shard_size": "50KB", "commit_message": "Second"}
    model.save_pretrained(tmp_path, state_dict=changed, push_to_hub=True, **options)
    [commit] = uploads
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "notes.txt"}
    assert commit["files"] == written
    assert sum(name.endswith(".safetensors") for name in written) > 1
    assert (commit["repo_id"], commit["commit_message"]) == (f"someone/{tmp_path.name}", "Second")
    again = state(Qwen3NextForCausalLM.from_pretrained(tmp_path))
    assert all(torch.equal(again[name].float(), tensor.bfloat16().float()) for name, tensor in changed.items())


def test_a_process_that_is_not_the_main_one_uploads_nothing(tmp_path: Path, uploads: list[dict[str, Any]]) -> None:
    tiny_model().save_pretrained(tmp_path / "model", is_main_process=False, push_to_hub=True, repo_id="model")
    assert uploads == []
    assert not (tmp_path / "model").exists()


def test_a_misspelt_argument_for_the_hub_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"comit_message.*commit_message"):
        tiny_model().save_pretrained(tmp_path, push_to_hub=True, comit_message="x")
    assert list(tmp_path.iterdir()) == []


def test_a_rope_type_written_into_a_finished_configuration_is_refused() -> None:
    config = tiny_model().config
    config.rope_parameters["rope_type"] = "longrope"
    with pytest.raises(ConfigError, match=r"rope_parameters.rope_type = 'longrope'"):
        Qwen3NextModel(config)


AUTO_CLASSES = {
    "AutoModel": Qwen3NextModel,
    "AutoModelForCausalLM": Qwen3NextForCausalLM,
    "AutoModelForSequenceClassification": qwen3_next.Qwen3NextForSequenceClassification,
    "AutoModelForTokenClassification": qwen3_next.Qwen3NextForTokenClassification,
    "AutoModelForQuestionAnswering": qwen3_next.Qwen3NextForQuestionAnswering,
}


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_after_register_every_auto_class_makes_and_loads_ours(
    name: str, saved: tuple[Qwen3NextForCausalLM, Path]
) -> None:
    auto, expected = getattr(transformers, name), AUTO_CLASSES[name]
    config = AutoConfig.from_pretrained(saved[1])
    assert type(config) is qwen3_next.Qwen3NextConfig
    assert type(auto.from_config(config)) is expected
    assert type(auto.from_pretrained(saved[1])) is expected


@pytest.mark.usefixtures("registered")
def test_the_published_usage_example_runs_with_register_added(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copy(ASSETS / name, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tiny_model(9, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(tmp_path)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", device_map="auto")
    messages = [{"role": "user", "content": "Give me a short introduction to large language model."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer([text], return_tensors="pt").to(model.device)
    generated = model.generate(**inputs, max_new_tokens=16)
    output = generated[0][len(inputs.input_ids[0]) :].tolist()
    assert type(model) is Qwen3NextForCausalLM
    assert 1 <= len(output) <= 16
    assert isinstance(tokenizer.decode(output, skip_special_tokens=True), str)
    assert "introduction to large language model" in tokenizer.decode(generated[0])
