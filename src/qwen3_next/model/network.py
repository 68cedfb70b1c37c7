"""The one network: embedding, decoder layers, final norm, over packed tokens; and its Hugging Face face."""

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.errors import InputError
from qwen3_next.model.cache import ModelCache, TransformersCache, cached_length, complete_layers
from qwen3_next.model.decoder import DecoderLayer, LayerOutput
from qwen3_next.model.inputs import PackedInputs, PaddedRows, pack_rows, refuse_other_documents
from qwen3_next.model.layers import RMSNorm, RotaryEmbedding, RotaryTables
from qwen3_next.model.pretrained import Qwen3NextPreTrainedModel
from qwen3_next.ops.routing import Routing


@dataclass(frozen=True, eq=False)
class PackedOutput:
    """What the network makes of packed tokens.

    Attributes:
        hidden: `[T, D]` after the final norm: what the output head and the MTP layer read.
        embeddings: `[T, D]` what entered the first layer.
        routings: one per sparse layer, in order, where they were wanted.
        stream: the residual stream before each layer in padded rows, where it was wanted.
        attention_weights: the probabilities of each attention layer in padded rows, where they were wanted.
    """

    hidden: Float[Tensor, "T D"]
    embeddings: Float[Tensor, "T D"]
    routings: tuple[Routing, ...]
    stream: tuple[Float[Tensor, "B S D"], ...] = ()
    attention_weights: tuple[Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which intermediate results a forward pass shall keep.

    Those of the router are two numbers per token, expert and layer: gigabytes of a long prompt, which only losses read.
    """

    stream: bool = False
    attention_weights: bool = False
    routings: bool = True


class PackedRun(NamedTuple):
    """A forward pass as the network sees it."""

    inputs: PackedInputs
    output: PackedOutput


@dataclass
class Qwen3NextModelOutput(MoeModelOutputWithPast):
    """transformers' output of a mixture-of-experts decoder, and the packed pass behind it where it was asked for."""

    packed: PackedRun | None = None


class Qwen3NextModel(Qwen3NextPreTrainedModel):
    """The decoder without a head. `forward_packed` is the network; `forward` packs, calls it and unpacks."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            RecomputableLayer(config, layer_type, index, config.is_sparse_layer(index))
            for index, layer_type in enumerate(config.layer_types)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward_packed(
        self,
        inputs: PackedInputs,
        cache: ModelCache | None = None,
        *,
        embeddings: Float[Tensor, "T D"] | None = None,
        wanted: Wanted = Wanted(),
    ) -> PackedOutput:
        """Run the network over packed sequences.

        Args:
            inputs: the tokens, their positions and the borders of their sequences.
            cache: what earlier calls left behind and later calls need; None for whole sequences.
            embeddings: instead of `inputs.token_ids`.
        """
        x: Tensor = self.embed_tokens(inputs.token_ids) if embeddings is None else embeddings
        first = x
        rotary = self.rotary_emb(x, inputs.positions)
        routings: list[Routing] = []
        stream: list[Tensor] = []
        weights: list[Tensor] = []
        for layer in self.layers:
            if wanted.stream:
                # What is handed out lies on the way to the result, so that a caller can ask for its gradient.
                stream.append(inputs.row_view.unpack(x))
                x = inputs.row_view.pack(stream[-1])
            output = self._run(cast("RecomputableLayer", layer), x, inputs, rotary, cache, wanted.attention_weights)
            x = output.hidden
            if output.routing is not None and wanted.routings:
                routings.append(output.routing)
            if output.attention_weights is not None:
                weights.append(output.attention_weights)
        return PackedOutput(self.norm(x), first, tuple(routings), tuple(stream), tuple(weights))

    def _run(
        self,
        layer: "RecomputableLayer",
        x: Tensor,
        inputs: PackedInputs,
        rotary: RotaryTables,
        cache: ModelCache | None,
        want_weights: bool,
    ) -> LayerOutput:
        recomputes = layer.gradient_checkpointing and self.training
        if cache is not None and recomputes:  # a second pass would write the cache a second time
            return DecoderLayer.forward(layer, x, inputs, rotary, cache, want_weights=want_weights)
        memory = RoutingMemory() if recomputes else None
        return LayerOutput(*layer(x, inputs, rotary, cache, want_weights=want_weights, memory=memory))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        seq_idx: Tensor | None = None,
        return_packed: bool = False,
        **kwargs: object,
    ) -> Qwen3NextModelOutput:
        """Hugging Face's call over padded rows `[B, S]`.

        Args:
            input_ids: `[B, S]` token ids, or give `inputs_embeds` `[B, S, D]`.
            attention_mask: `[B, cached + S]`, 0 at padding, on either side.
            position_ids: `[B, S]`; where they fall back inside a row a new document begins, that sees nothing of the
                one before.
            past_key_values: a transformers `Cache` to continue; dynamic or static.
            use_cache: create a cache where none is given, and return it (packed documents never get one).
            output_hidden_states: return the embeddings, the residual stream between the layers and the final state.
            output_attentions: return the probabilities of each attention layer, `[B, H, S, cached + S]`.
            output_router_logits: return the router's scores of each sparse layer, `[B * S, E]`, zeros at padding.
            cu_seq_lens_q: `[documents + 1]` cumulative lengths of the documents packed into one row.
            cu_seq_lens_k: the same again, where given.
            seq_idx: `[B, S]` number of each token's document; must agree with `cu_seq_lens_q` or `position_ids`.
            return_packed: return the packed results as well, for a head that works on them.

        Raises:
            InputError: inputs whose shapes contradict each other; an unknown argument.
        """
        refuse_unknown(kwargs)
        rows = _rows_of(input_ids, inputs_embeds, self.config.hidden_size)
        inputs = pack_rows(
            (rows.shape[0], rows.shape[1]),
            rows.device,
            past=cached_length(past_key_values),
            token_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            document_borders=cu_seq_lens_q,
        )
        refuse_other_documents(inputs, cu_seq_lens_k, seq_idx)
        assert inputs.rows is not None
        if past_key_values is None and self._creates_cache(use_cache, inputs.rows):
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            complete_layers(past_key_values, self.config)
        output = self.forward_packed(
            inputs,
            TransformersCache.of(past_key_values, inputs),
            embeddings=None if inputs_embeds is None else inputs.rows.pack(inputs_embeds),
            wanted=Wanted(
                stream=_or_config(output_hidden_states, self.config.output_hidden_states),
                attention_weights=_or_config(output_attentions, self.config.output_attentions),
            ),
        )
        want_router_logits = _or_config(output_router_logits, self.config.output_router_logits)
        return _in_rows(output, inputs, past_key_values, want_router_logits, return_packed)

    def _creates_cache(self, use_cache: bool | None, rows: PaddedRows) -> bool:
        recomputes = self.gradient_checkpointing and self.training
        return _or_config(use_cache, self.config.use_cache) and rows.documents is None and not recomputes


@dataclass(eq=False)
class RoutingMemory:
    """Which experts the tokens of one layer and one forward pass went to; None until that is known."""

    experts: Int[Tensor, "T K"] | None = None


class RecomputableLayer(DecoderLayer, GradientCheckpointingLayer):
    """A decoder layer whose activations transformers may drop and have computed again in the backward pass.

    The first pass notes in `memory` which experts each token went to and the second repeats that choice: rounding that
    differs between the passes would otherwise send a token elsewhere and make its gradient wrong.
    """

    def forward(
        self,
        x: Float[Tensor, "T D"],
        inputs: PackedInputs,
        rotary: RotaryTables,
        cache: ModelCache | None = None,
        *,
        want_weights: bool = False,
        experts: Int[Tensor, "T K"] | None = None,
        memory: RoutingMemory | None = None,
    ) -> LayerOutput:
        """`memory` is the same object in both passes."""
        if memory is not None and memory.experts is not None:
            experts = memory.experts
        output = DecoderLayer.forward(self, x, inputs, rotary, cache, want_weights=want_weights, experts=experts)
        if memory is not None:
            memory.experts = output.experts
        return output


def refuse_unknown(arguments: dict[str, object]) -> None:
    """A misspelt argument must not pass unnoticed; those that transformers hands to every model may."""
    unknown = sorted(set(arguments) - _HANDED_TO_EVERY_MODEL)
    if unknown:
        raise InputError(
            f"unknown argument(s) {', '.join(unknown)}; see the docstring of `forward` for those it takes."
        )


_HANDED_TO_EVERY_MODEL = {
    # What a kernel wants to know of packed documents besides their borders.
    *("max_length_q", "max_length_k"),
    # What `generate` and `Trainer` add whatever the model; the losses read the second.
    *("cache_position", "num_items_in_batch", "is_first_iteration", "logits_to_keep"),
}


def _rows_of(input_ids: Tensor | None, inputs_embeds: Tensor | None, width: int) -> Tensor:
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError("give exactly one of input_ids [B, S] and inputs_embeds [B, S, D].")
    rows = input_ids if input_ids is not None else inputs_embeds
    assert rows is not None
    if rows.dim() != (2 if input_ids is not None else 3) or rows.shape[2:] not in ((), (width,)):
        raise InputError(f"input_ids must be [B, S] and inputs_embeds [B, S, {width}]; got shape {tuple(rows.shape)}.")
    return rows


def _or_config(given: bool | None, configured: bool | None) -> bool:
    return bool(configured if given is None else given)


def _in_rows(
    output: PackedOutput, inputs: PackedInputs, cache: Cache | None, want_router_logits: bool, return_packed: bool
) -> Qwen3NextModelOutput:
    rows = inputs.row_view
    hidden = rows.unpack(output.hidden)
    router_logits = None
    if want_router_logits:
        router_logits = tuple(rows.unpack(routing.logits).flatten(0, 1) for routing in output.routings)
    return Qwen3NextModelOutput(
        last_hidden_state=hidden,
        past_key_values=cache,
        hidden_states=(*output.stream, hidden) if output.stream else None,
        attentions=output.attention_weights or None,
        router_logits=cast("Any", router_logits),  # transformers' annotation says a tuple of exactly one
        packed=PackedRun(inputs, output) if return_packed else None,
    )
