"""The dense rival: transformers' Qwen3 at the shapes of Qwen3-32B, with random weights, and what it must move."""

import math
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.operations.measure import Rates
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

LAYERS = 64
QWEN3_32B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": False,
}


class FilledKeys:
    """Keys and values of whole contexts, of which a step writes the last; nothing grows, and nothing is masked.

    transformers' own caches would either copy all of it in every step, or hand SDPA a mask, with which it repeats keys
    for every query head. So the peer's step is as fast as its attention allows, and a CUDA graph can hold it.
    """

    def __init__(self, config: Qwen3Config, streams: int, context: int, like: Tensor) -> None:
        heads = config.num_key_value_heads or config.num_attention_heads
        shape = config.num_hidden_layers, streams, heads, context, config.head_dim
        self.keys, self.values = (torch.empty(shape, dtype=like.dtype, device=like.device).normal_() for _ in range(2))

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """What attention reads in this step."""
        self.keys[layer, :, :, -1:], self.values[layer, :, :, -1:] = keys, values
        return self.keys[layer], self.values[layer]


def dense_model(settings: dict[str, Any], layers: int, device: str, dtype: torch.dtype) -> Qwen3ForCausalLM:
    """Values of the initialisation."""
    fields: dict[str, Any] = settings | {"num_hidden_layers": layers, "attn_implementation": "sdpa"}
    config = Qwen3Config(**fields)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            return Qwen3ForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def prompt(model: Qwen3ForCausalLM, length: int) -> Callable[[], Tensor]:
    """Reading a prompt of random tokens, and the token after it."""
    tokens = torch.randint(0, model.config.vocab_size, (1, length), device=model.device)
    return lambda: model(tokens, use_cache=True, logits_to_keep=1).logits.argmax(-1)


def step(model: Qwen3ForCausalLM, streams: int, context: int, keys: FilledKeys | None = None) -> Callable[[], Tensor]:
    """One new token of each sequence after a context of random keys, unless others are given; gives the next ones."""
    kept = keys or FilledKeys(model.config, streams, context, model.lm_head.weight)
    tokens = torch.randint(0, model.config.vocab_size, (streams, 1), device=model.device)
    places = torch.full((streams, 1), context - 1, device=model.device)
    given: dict[str, Any] = {"attention_mask": {"full_attention": None}, "position_ids": places}
    return lambda: model(tokens, past_key_values=kept, use_cache=True, **given).logits.argmax(-1)


def head_weights(settings: dict[str, Any]) -> int:
    return settings["vocab_size"] * settings["hidden_size"]


def layer_weights(settings: dict[str, Any]) -> int:
    """Of the matrices of one layer."""
    hidden, width = settings["hidden_size"], settings["head_dim"]
    heads = 2 * settings["num_attention_heads"] + 2 * settings["num_key_value_heads"]
    return hidden * (heads * width + 3 * settings["intermediate_size"])


def weight_bytes(settings: dict[str, Any], layers: int) -> int:
    """In fp8, embedding and head in bf16."""
    return layers * layer_weights(settings) + 4 * head_weights(settings)


def key_bytes(settings: dict[str, Any], layers: int) -> int:
    """Of keys and values of a token in bf16."""
    return 2 * layers * settings["num_key_value_heads"] * settings["head_dim"] * 2


def step_floor(streams: int, context: int, rates: Rates) -> float:
    """Seconds in which the card reads the fp8 weights, the head, and keys and values."""
    read = LAYERS * layer_weights(QWEN3_32B) + 2 * head_weights(QWEN3_32B)
    return (read + streams * context * key_bytes(QWEN3_32B, LAYERS)) / rates.read


def prompt_floor(length: int, rates: Rates) -> float:
    """Seconds of the products with weights in fp8 and of attention in bf16."""
    products = 2.0 * length * LAYERS * layer_weights(QWEN3_32B)
    width = QWEN3_32B["num_attention_heads"] * QWEN3_32B["head_dim"]
    return products / rates.fp8 + 4.0 * math.comb(length + 1, 2) * width * LAYERS / rates.bf16
