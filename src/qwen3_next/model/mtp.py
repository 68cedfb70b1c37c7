"""Multi-token prediction: one more layer that guesses the token after next, and drafts with it."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.model.attention import Projections
from qwen3_next.model.cache import ModelCache
from qwen3_next.model.decoder import DecoderLayer
from qwen3_next.model.inputs import PackedInputs
from qwen3_next.model.layers import RMSNorm, RotaryTables
from qwen3_next.ops.cross_entropy import IGNORED
from qwen3_next.ops.routing import Routing
from qwen3_next.ops.segments import Segments


class Prediction(NamedTuple):
    """What the head turns into logits for the token after next, `[T, D]`, and the routing behind it."""

    hidden: Float[Tensor, "T D"]
    routing: Routing | None


class MultiTokenPredictor(nn.Module):
    """From the state at token i and the embedding of token i+1, predict token i+2.

    `x = fc([norm(embedding), norm(hidden)])`, one full-attention decoder layer, a final norm; embedding and output head
    are the main model's. `hidden` is the main model's state after its final norm. Applied to its own output it predicts
    further tokens. (DeepSeek-AI 2024, arXiv:2412.19437, section 2.2, eq. 21-23; in Qwen3-Next the embedding comes first
    in the concatenation and one layer serves every depth.)
    """

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.pre_fc_norm_embedding = RMSNorm(size, eps)
        self.pre_fc_norm_hidden = RMSNorm(size, eps)
        self.layers = nn.ModuleList([DecoderLayer(config, "full_attention", 0, sparse=config.num_experts > 0)])
        self.norm = RMSNorm(size, eps)

    def forward(
        self,
        embeddings: Float[Tensor, "T D"],
        hidden: Float[Tensor, "T D"],
        inputs: PackedInputs,
        rotary: RotaryTables,
        cache: ModelCache | None = None,
    ) -> Prediction:
        """One step: `embeddings[t]` is the embedding of the token that follows position t."""
        output = self.layers[0](self._fuse(embeddings, hidden), inputs, rotary, cache)
        return Prediction(self.norm(output.hidden), output.routing)

    def chain(
        self,
        embeddings: Float[Tensor, "T D"],
        hidden: Float[Tensor, "T D"],
        inputs: PackedInputs,
        rotary: Sequence[RotaryTables],
    ) -> list[Prediction]:
        """As many chained steps as there are `rotary` tables, begun at every token at once, for training.

        Args:
            embeddings: of the tokens themselves; step s uses those of the tokens s+1 further on.
            rotary: step s uses the tables of the positions plus s.

        Step s sees what it finds when it drafts: the committed keys of step 0 up to its token, and the keys of its own
        chain's later steps.
        """
        layer = cast("DecoderLayer", self.layers[0])
        predictions: list[Prediction] = []
        projections: list[Projections] = []
        for step, tables in enumerate(rotary):
            x = self._fuse(shift(embeddings, inputs.segments, step + 1), hidden)
            projections.append(layer.self_attn.project(layer.input_layernorm(x), tables))
            x = x + layer.self_attn.attend_chain(projections, inputs)
            update, routing = layer.transform_channels(x)
            hidden = self.norm(x + update)
            predictions.append(Prediction(hidden, routing))
        return predictions

    def _fuse(self, embeddings: Tensor, hidden: Tensor) -> Tensor:
        return self.fc(torch.cat([self.pre_fc_norm_embedding(embeddings), self.pre_fc_norm_hidden(hidden)], dim=-1))


def shift(x: Tensor, segments: Segments, by: int, fill: float = 0) -> Tensor:
    """`x[t + by]` at every token t, inside its sequence; `fill` where the sequence ends before that."""
    if segments.total == 0:
        return x
    source = torch.arange(segments.total, device=x.device) + by
    lengths = (segments.cu_seqlens[1:] - segments.cu_seqlens[:-1]).to(x.device, torch.int64)
    inside = segments.offsets.to(x.device) + by < lengths[segments.sequence_ids.to(x.device)]
    shifted = x[source.clamp_max(segments.total - 1)]
    return torch.where(inside.view(-1, *(1,) * (x.dim() - 1)), shifted, fill)


def targets_of_step(targets: Int[Tensor, "T"], segments: Segments, step: int) -> Int[Tensor, "T"]:
    """What chained step `step` must predict, given the token that follows each position (the next-token targets)."""
    return shift(targets, segments, step + 1, IGNORED)
