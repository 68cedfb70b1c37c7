"""The model in the package: small, whole, in the published layout, and trained."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests.model.reference import relative_error
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen3_next import Qwen3NextForCausalLM as PeerModel

import qwen3_next
from qwen3_next import Qwen3NextForCausalLM
from qwen3_next.model.inputs import PackedInputs
from qwen3_next.ops.segments import Segments

ASSETS = Path(qwen3_next.__file__).parent / "assets"
PROMPTS = Path(__file__).parent.parent / "recipes" / "shipped_model" / "prompts.json"
SHARDS = sorted(ASSETS.glob("*.safetensors"))
FIVE_GRAM = {"prose": 1.1731, "code": 0.9414}
"""Nats per byte of the 5-gram model of the same training text (recipes/shipped_model/README.md)."""


@pytest.fixture(scope="module")
def shipped() -> Qwen3NextForCausalLM:
    return Qwen3NextForCausalLM.from_pretrained(ASSETS, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ASSETS)


def held_out(kind: str, count: int = 25) -> list[str]:
    """The beginnings of documents that the model was not trained on."""
    return [entry["text"] for entry in json.loads(PROMPTS.read_text(encoding="utf-8"))[kind][:count]]


def packed(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> PackedInputs:
    rows = [tokenizer(text).input_ids for text in texts]
    segments = Segments.from_lengths([len(row) for row in rows])
    return PackedInputs(torch.tensor([token for row in rows for token in row]), segments.offsets, segments)


def following(inputs: PackedInputs, by: int) -> tuple[Tensor, Tensor]:
    """The places that have a token `by` further on in their document, and those tokens."""
    assert inputs.token_ids is not None
    ids = inputs.segments.sequence_ids
    places = torch.arange(inputs.segments.total - by)
    places = places[ids[places] == ids[places + by]]
    return places, inputs.token_ids[places + by]


def test_it_is_small_and_in_shards_under_15_mb() -> None:
    sizes = [shard.stat().st_size for shard in SHARDS]
    assert sizes
    assert sum(sizes) < 20_000_000
    assert max(sizes) < 15_000_000


def test_it_has_every_part_of_the_family(shipped: Qwen3NextForCausalLM) -> None:
    config = shipped.config
    assert config.full_attention_interval == 4
    assert config.num_experts >= 32
    assert config.shared_expert_intermediate_size > 0
    assert config.num_nextn_predict_layers == 1
    assert config.linear_num_value_heads > config.linear_num_key_heads


def test_it_is_stored_in_bf16_under_the_published_names() -> None:
    names: set[str] = set()
    for shard in SHARDS:
        with safe_open(shard, framework="pt") as file:
            names.update(file.keys())
            assert all(file.get_slice(name).get_dtype() == "BF16" for name in file.keys())  # noqa: SIM118
    assert "model.layers.0.mlp.experts.31.down_proj.weight" in names
    assert "mtp.layers.0.mlp.experts.0.gate_proj.weight" in names
    assert "mtp.fc.weight" in names


def test_transformers_computes_the_same_logits(
    shipped: Qwen3NextForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    peer = PeerModel.from_pretrained(ASSETS, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = tokenizer(held_out("code", 1)[0], return_tensors="pt").input_ids
    with torch.no_grad():
        assert relative_error(shipped(tokens).logits, peer(tokens).logits) < 1e-4


def test_it_ends_at_the_end_of_a_document_and_of_a_turn(
    shipped: Qwen3NextForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert shipped.generation_config.eos_token_id == ends
    assert shipped.generation_config.do_sample


@pytest.mark.parametrize("kind", ["prose", "code"])
def test_it_predicts_held_out_text_better_than_a_5_gram(
    shipped: Qwen3NextForCausalLM, tokenizer: PreTrainedTokenizerBase, kind: str
) -> None:
    texts = held_out(kind)
    inputs = packed(texts, tokenizer)
    with torch.no_grad():
        logits = shipped.predict_ahead(inputs, steps=0)[0]
    places, targets = following(inputs, 1)
    nats = torch.nn.functional.cross_entropy(logits[places], targets, reduction="sum").item()
    assert nats / sum(len(text.encode()) for text in texts) < FIVE_GRAM[kind]


@pytest.mark.parametrize("kind", ["prose", "code"])
def test_its_first_draft_is_accepted_more_often_than_not(
    shipped: Qwen3NextForCausalLM, tokenizer: PreTrainedTokenizerBase, kind: str
) -> None:
    inputs = packed(held_out(kind), tokenizer)
    with torch.no_grad():
        main, draft = (logits.argmax(-1) for logits in shipped.predict_ahead(inputs, steps=1))
    places, _ = following(inputs, 2)
    assert (draft[places] == main[places + 1]).float().mean() > 0.5
