"""The bare language model computes what the Hugging Face class computes, from the same files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import tiny_model

from qwen3_next.errors import CheckpointError
from qwen3_next.model import PackedCache, PackedInputs, PackedMemory, Qwen3NextForCausalLM
from qwen3_next.model.bare import BareCausalLM
from qwen3_next.ops import Segments

CPU = torch.device("cpu")


def saved(model: Qwen3NextForCausalLM, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


def last_logits(bare: BareCausalLM, tokens: torch.Tensor, memory: PackedMemory, before: int) -> torch.Tensor:
    """The logits after some more tokens of the one sequence in a memory of one page."""
    end = before + len(tokens)
    table, lengths, slots = (torch.tensor(x, dtype=torch.int32) for x in ([[0]], [end], [0]))
    inputs = PackedInputs(tokens, torch.arange(before, end), Segments.uniform(1, len(tokens)))
    with torch.no_grad():
        hidden = bare.model(inputs, PackedCache(memory, table, lengths, slots, known_lengths=(end,)))
        return bare.lm_head(hidden[-1])


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"num_nextn_predict_layers": 0}], ids=str)
@pytest.mark.parametrize("split", [(13,), (1, 12), (5, 1, 1, 6)], ids=str)
def test_logits_are_those_of_the_causal_lm_however_the_text_is_split(
    tmp_path: Path, changes: dict[str, object], split: tuple[int, ...]
) -> None:
    model = tiny_model(int(torch.randint(2**31, ())), **changes)
    bare = BareCausalLM.from_directory(saved(model, tmp_path), model.config, torch.float32, CPU)
    tokens = torch.randint(model.config.vocab_size, (13,))
    with torch.no_grad():
        expected = model(tokens[None], use_cache=False).logits[0]
    memory, end = PackedMemory.allocate(model.config, pages=1, slots=1, dtype=torch.float32), 0
    for part in tokens.split(list(split)):
        logits, end = last_logits(bare, part, memory, end), end + len(part)
        torch.testing.assert_close(logits, expected[end - 1], rtol=1e-4, atol=1e-5)
    assert end == 13


def test_weights_come_in_the_dtype_wanted_and_the_decay_rates_in_fp32(tmp_path: Path) -> None:
    model = tiny_model()
    bare = BareCausalLM.from_directory(saved(model, tmp_path), model.config, torch.bfloat16, CPU)
    for name, parameter in bare.named_parameters():
        wanted = torch.float32 if name.endswith(("A_log", "dt_bias")) else torch.bfloat16
        assert parameter.dtype == wanted, name
        assert parameter.device == CPU, name


def head_stored(directory: Path, change: float) -> Qwen3NextForCausalLM:
    """Save a tied model whose file holds the head too, away from the embedding by `change` in one place."""
    model = tiny_model(int(torch.randint(2**31, ())), tie_word_embeddings=True)
    file = saved(model, directory) / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][-1, -1] += change
    save_file(tensors, file, {"format": "pt"})
    return model


def test_a_stored_head_that_differs_from_the_tied_embedding_is_refused_by_both_loaders(tmp_path: Path) -> None:
    model = head_stored(tmp_path, change=0.5)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        BareCausalLM.from_directory(tmp_path, model.config, torch.float32, CPU)
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings"):
        Qwen3NextForCausalLM.from_pretrained(tmp_path)


def test_a_stored_head_equal_to_the_tied_embedding_is_that_embedding_in_both_loaders(tmp_path: Path) -> None:
    model = head_stored(tmp_path, change=0.0)
    bare = BareCausalLM.from_directory(tmp_path, model.config, torch.float32, CPU)
    full = Qwen3NextForCausalLM.from_pretrained(tmp_path)
    for loaded in (bare, full):
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_missing_tensor_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_model()
    file = saved(model, tmp_path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        BareCausalLM.from_directory(tmp_path, model.config, torch.float32, CPU)


def test_an_incomplete_prediction_block_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_model()
    file = saved(model, tmp_path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["mtp.fc.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"mtp\.fc\.weight"):
        BareCausalLM.from_directory(tmp_path, model.config, torch.float32, CPU)
