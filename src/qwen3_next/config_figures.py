"""How many parameters a config describes, and how many bytes they take: the shapes of CHECKPOINT names, added up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen3_next.config import Qwen3NextConfig

__all__ = ["Figures", "Part"]

FP8_BLOCK = 128
BF16_BYTES = 2


@dataclass(frozen=True)
class Matrix:
    """`copies` weight matrices of one shape that the block-fp8 format stores in one byte per weight."""

    rows: int
    columns: int
    copies: int = 1

    @property
    def parameters(self) -> int:
        """Weights of all copies."""
        return self.copies * self.rows * self.columns

    @property
    def fp8_blocks(self) -> int:
        """Blocks of 128 x 128 of all copies, those cut off at the edge included."""
        return self.copies * -(-self.rows // FP8_BLOCK) * -(-self.columns // FP8_BLOCK)


@dataclass(frozen=True)
class Part:
    """Some tensors of a model: those that block-fp8 quantises, and the number of all other parameters."""

    matrices: tuple[Matrix, ...] = ()
    others: int = 0

    def __add__(self, more: Part) -> Part:
        return Part(self.matrices + more.matrices, self.others + more.others)

    @property
    def parameters(self) -> int:
        """Parameters of this part."""
        return sum(matrix.parameters for matrix in self.matrices) + self.others

    @property
    def block_fp8_bytes(self) -> int:
        """Bytes in the published block-fp8 format: fp8 weights, bf16 scales, everything else in bf16."""
        quantised = sum(matrix.parameters + BF16_BYTES * matrix.fp8_blocks for matrix in self.matrices)
        return quantised + BF16_BYTES * self.others


class Figures:
    """The parts of the model that `config` describes."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        self.config = config

    @property
    def main(self) -> Part:
        """Everything but the MTP module."""
        layers = range(self.config.num_hidden_layers)
        return sum((self._layer(layer) for layer in layers), self._around_the_layers())

    @property
    def mtp(self) -> Part:
        """The MTP module: the projection that joins embedding and hidden state, three norms, its own layers."""
        c = self.config
        if c.num_nextn_predict_layers == 0:
            return Part()
        layer = self._attention() + self._layer_norms() + self._mlp(sparse=c.num_experts > 0)
        join = Part(others=2 * c.hidden_size**2 + 3 * c.hidden_size)
        return sum((layer for _ in range(c.num_nextn_predict_layers)), join)

    def active_parameters(self, include_embeddings: bool) -> int:
        """Parameters of the main model that one token meets."""
        c = self.config
        sparse_layers = sum(c.is_sparse_layer(layer) for layer in range(c.num_hidden_layers))
        idle = sparse_layers * self._experts(c.num_experts - c.num_experts_per_tok).parameters
        embeddings = 0 if include_embeddings else self._embeddings()
        return self.main.parameters - idle - embeddings

    def _embeddings(self) -> int:
        return self.config.vocab_size * self.config.hidden_size * (1 if self.config.tie_word_embeddings else 2)

    def _around_the_layers(self) -> Part:
        return Part(others=self._embeddings() + self.config.hidden_size)

    def _layer(self, layer: int) -> Part:
        mixer = self._attention() if self.config.is_full_attention_layer(layer) else self._delta_net()
        return mixer + self._layer_norms() + self._mlp(sparse=self.config.is_sparse_layer(layer))

    def _layer_norms(self) -> Part:
        return Part(others=2 * self.config.hidden_size)

    def _attention(self) -> Part:
        c = self.config
        query, key_value = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        biases = 2 * query + 2 * key_value + c.hidden_size if c.attention_bias else 0
        matrices = (
            Matrix(2 * query, c.hidden_size),  # the query and its output gate
            Matrix(key_value, c.hidden_size, copies=2),
            Matrix(c.hidden_size, query),
        )
        return Part(matrices, 2 * c.head_dim + biases)

    def _delta_net(self) -> Part:
        c = self.config
        per_head = (
            2 * c.linear_num_value_heads * c.hidden_size + 2 * c.linear_num_value_heads
        )  # in_proj_ba; A_log, dt_bias
        convolution = c.linear_conv_dim * c.linear_conv_kernel_dim
        matrices = (
            Matrix(2 * c.linear_key_dim + 2 * c.linear_value_dim, c.hidden_size),
            Matrix(c.hidden_size, c.linear_value_dim),
        )
        return Part(matrices, per_head + convolution + c.linear_value_head_dim)

    def _mlp(self, *, sparse: bool) -> Part:
        c = self.config
        if not sparse:
            return self._swiglu(c.intermediate_size)
        router_and_gate = Part(others=(c.num_experts + 1) * c.hidden_size)
        return self._experts(c.num_experts) + self._swiglu(c.shared_expert_intermediate_size) + router_and_gate

    def _experts(self, count: int) -> Part:
        return self._swiglu(self.config.moe_intermediate_size, count)

    def _swiglu(self, width: int, copies: int = 1) -> Part:
        hidden = self.config.hidden_size
        return Part((Matrix(width, hidden, 2 * copies), Matrix(hidden, width, copies)))
