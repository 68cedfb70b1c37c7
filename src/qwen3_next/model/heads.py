"""The network with a head: causal language model with its MTP layer, and three classifiers."""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.errors import InputError
from qwen3_next.model.cache import TransformersCache, cached_length
from qwen3_next.model.inputs import PackedInputs, pack_rows
from qwen3_next.model.mtp import MultiTokenPredictor, Prediction, shift, targets_of_step
from qwen3_next.model.network import PackedRun, Qwen3NextModel
from qwen3_next.model.pretrained import Qwen3NextPreTrainedModel
from qwen3_next.ops.cross_entropy import IGNORED, linear_cross_entropy
from qwen3_next.ops.load_balance import load_balancing_loss_of
from qwen3_next.ops.routing import Routing


@dataclass(frozen=True, eq=False)
class PackedLosses:
    """Losses of packed tokens, one value each, 0 where a token has no target.

    Attributes:
        lm: `[T]` of the next token.
        mtp: `[T]` of each chained MTP step: of the token 2, 3, ... further on.
        targets: what `lm` and each of `mtp` had to predict, `IGNORED` where nothing; count these for a mean.
        routings: of every sparse layer, the MTP layer's steps last.
    """

    lm: Float[Tensor, "T"]
    mtp: tuple[Float[Tensor, "T"], ...]
    targets: tuple[Int[Tensor, "T"], ...]
    routings: tuple[Routing, ...]


@dataclass(frozen=True, eq=False)
class Drafts:
    """Drafted tokens, and the MTP layer's cache that holds the committed tokens but not the drafts.

    Attributes:
        token_ids: `[B, k]`.
        past_key_values: hand it to the next call.
    """

    token_ids: Int[Tensor, "B k"]
    past_key_values: Cache


@dataclass
class Qwen3NextCausalLMOutput(MoeCausalLMOutputWithPast):
    """transformers' output of a mixture-of-experts language model, with the parts of the loss.

    `loss` is `lm_loss`, plus `mtp_loss` times its weight in training mode, plus `aux_loss` times its coefficient where
    router logits were asked for.
    """

    lm_loss: Tensor | None = None
    mtp_loss: Tensor | None = None


class Qwen3NextForCausalLM(Qwen3NextPreTrainedModel, GenerationMixin):
    """The language model: network, output head and multi-token prediction layer."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  by transformers' protocol

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__(config)
        self.model = Qwen3NextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = MultiTokenPredictor(config) if config.num_nextn_predict_layers else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: object,
    ) -> Qwen3NextCausalLMOutput:
        """Hugging Face's call; the arguments of `Qwen3NextModel.forward`, and:

        Args:
            labels: `[B, S]`; position t is trained to predict `labels[t + 1]` inside its document, -100 is ignored.
                Padding neither predicts nor is predicted, whatever its label.
            num_items_in_batch: next-token targets of the whole accumulation window (what a trainer passes), which the
                sums of this batch, those of the MTP steps too, are divided by instead of by their own counts: however
                the window is cut into batches, its losses sum to the same. An MTP step has fewer targets than that
                (it looks past the end of each document earlier), so it counts that much less than in a plain mean.
            kwargs: `shift_labels` `[B, S]`, labels already shifted: position t is trained to predict
                `shift_labels[t]`; and `cu_seq_lens_q` as `Qwen3NextModel.forward` takes it.
            logits_to_keep: compute logits for the last so many positions only (0: for all), or for these indices.

        Raises:
            InputError: labels of another shape than the rows, or without logits at all positions; a negative
                `logits_to_keep`; and what `Qwen3NextModel.forward` refuses.

        Returns:
            The output with `logits` `[B, kept, V]`, `loss` and its parts where labels were given.
        """
        # Not in the signature: `Trainer` takes every parameter with "label" in its name for a column of the data.
        shift_labels = cast("Tensor | None", kwargs.pop("shift_labels", None))
        want_router_logits = self.config.output_router_logits if output_router_logits is None else output_router_logits
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_router_logits=want_router_logits,
            return_packed=True,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state[:, _columns_of(logits_to_keep)])
        run: PackedRun = outputs.packed
        aux_loss = load_balancing_loss_of(run.output.routings) if want_router_logits else None
        targets = self._targets(run.inputs, labels, shift_labels)
        lm_loss = mtp_loss = loss = None
        if targets is not None:
            lm_loss = self._lm_loss(run, logits, targets, num_items_in_batch)
            mtp_loss = self._mtp_loss(run, targets, num_items_in_batch) if self.training else None
            share = 1 if num_items_in_batch is None else _items(targets, None) / _items(targets, num_items_in_batch)
            loss = self._total(lm_loss, mtp_loss, aux_loss, share)
        return Qwen3NextCausalLMOutput(
            loss=loss,
            lm_loss=lm_loss,
            mtp_loss=mtp_loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def _targets(self, inputs: PackedInputs, labels: Tensor | None, shift_labels: Tensor | None) -> Tensor | None:
        given = labels if shift_labels is None else shift_labels
        if given is None:
            return None
        rows = inputs.row_view
        if given.shape != (rows.batch, rows.length):
            raise InputError(
                f"labels have shape {tuple(given.shape)}; one per token, ({rows.batch}, {rows.length}), is needed."
            )
        packed = rows.pack(given)
        return shift(packed, inputs.segments, 1, IGNORED) if shift_labels is None else packed

    def _lm_loss(self, run: PackedRun, logits: Tensor, targets: Tensor, items: int | Tensor | None) -> Tensor:
        rows = run.inputs.row_view
        if logits.shape[1] != rows.length:
            raise InputError(f"labels need logits at all {rows.length} positions; leave logits_to_keep at 0.")
        targets = targets.to(logits.device)
        summed = F.cross_entropy(rows.pack(logits).float(), targets, ignore_index=IGNORED, reduction="sum")
        return summed / _items(targets, items)

    def _mtp_loss(self, run: PackedRun, targets: Tensor, items: int | Tensor | None) -> Tensor | None:
        if self.mtp is None:
            return None
        losses, step_targets, _ = self._mtp_losses(run, targets)
        means = [loss.sum() / _items(t, items) for loss, t in zip(losses, step_targets, strict=True)]
        return torch.stack(means).mean()

    def _total(
        self, lm_loss: Tensor, mtp_loss: Tensor | None, aux_loss: Tensor | None, share: float | Tensor
    ) -> Tensor:
        """`share` is this batch's part of its accumulation window; the other losses were divided by all of it."""
        total = lm_loss
        if mtp_loss is not None:
            total = total + self.config.mtp_loss_weight * mtp_loss.to(total.device)
        if aux_loss is not None:
            total = total + self.config.router_aux_loss_coef * share * aux_loss.to(total.device)
        return total

    def packed_losses(self, inputs: PackedInputs, targets: Int[Tensor, "T"]) -> PackedLosses:
        """The losses of packed documents, without ever holding all logits: what training runs on.

        Args:
            targets: the token that each position must predict next, `IGNORED` where there is none.
        """
        output = self.model.forward_packed(inputs)
        lm = self._token_losses(output.hidden, targets)
        if self.mtp is None:
            return PackedLosses(lm, (), (targets,), output.routings)
        losses, step_targets, predictions = self._mtp_losses(PackedRun(inputs, output), targets)
        routings = tuple(p.routing for p in predictions if p.routing is not None)
        return PackedLosses(lm, losses, (targets, *step_targets), (*output.routings, *routings))

    def _mtp_losses(
        self, run: PackedRun, targets: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], list[Prediction]]:
        predictions = self._predict_chain(run, self.config.num_mtp_steps)
        steps = range(len(predictions))
        step_targets = tuple(targets_of_step(targets, run.inputs.segments, step) for step in steps)
        losses = tuple(
            self._token_losses(prediction.hidden, wanted)
            for prediction, wanted in zip(predictions, step_targets, strict=True)
        )
        return losses, step_targets, predictions

    def _token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        head = cast("nn.Module", self.lm_head)
        if isinstance(head, nn.Linear) and not head.weight.is_meta:
            return linear_cross_entropy(hidden, head.weight, targets)
        # An adapter took its place, whose `weight` is not all that it does, or its weight lies offloaded.
        return F.cross_entropy(head(hidden).float(), targets, ignore_index=IGNORED, reduction="none")

    def _predict_chain(self, run: PackedRun, steps: int) -> list[Prediction]:
        assert self.mtp is not None
        inputs, output = run
        rotary = [self.model.rotary_emb(output.hidden, inputs.positions + step) for step in range(steps)]
        return self.mtp.chain(output.embeddings, output.hidden, inputs, rotary)

    def predict_ahead(self, inputs: PackedInputs, steps: int = 1) -> tuple[Float[Tensor, "T V"], ...]:
        """Logits of the next token at every packed position, then those of each chained MTP step.

        Step s at position t predicts token t+2+s from the true tokens up to t+1+s: teacher-forced drafting.
        """
        output = self.model.forward_packed(inputs)
        predictions = self._predict_chain(PackedRun(inputs, output), steps) if self.mtp is not None else []
        return tuple(self.lm_head(hidden) for hidden in (output.hidden, *(p.hidden for p in predictions)))

    @torch.no_grad()
    def draft(
        self,
        hidden_states: Float[Tensor, "B S D"],
        next_token_ids: Int[Tensor, "B S"],
        num_drafts: int = 1,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
    ) -> Drafts:
        """Draft the tokens that follow, greedily, with the chained MTP layer and its own cache.

        Args:
            hidden_states: the main model's final states (`last_hidden_state`) of S committed tokens that the MTP
                layer has not seen yet.
            next_token_ids: the token after each of them; the last one is the newest token, which the main model has
                not read yet. The first draft is the guess for what follows it.
            num_drafts: k >= 1.
            past_key_values: what the previous call returned; None at the start of a sequence.
            attention_mask: `[B, cached + S]`, 0 at padding.

        Returns:
            k tokens per row, and the cache of the committed tokens.

        Raises:
            InputError: the model has no MTP layer, or k < 1; shapes that contradict each other; a row is padded on the
                right.
        """
        self._refuse_to_draft(hidden_states, next_token_ids, num_drafts, attention_mask)
        cache = DynamicCache() if past_key_values is None else past_key_values
        drafts: list[Tensor] = []
        for step in range(num_drafts):
            hidden_states = self._draft_step(hidden_states, next_token_ids, cache, attention_mask)[:, -1:]
            next_token_ids = self.lm_head(hidden_states).argmax(-1)
            drafts.append(next_token_ids)
            if attention_mask is not None and step + 1 < num_drafts:
                attention_mask = F.pad(attention_mask, (0, 1), value=1)
        if num_drafts > 1:
            cache.crop(1 - num_drafts)
        return Drafts(torch.cat(drafts, dim=1), cache)

    def _refuse_to_draft(self, hidden: Tensor, token_ids: Tensor, num_drafts: int, mask: Tensor | None) -> None:
        if self.mtp is None or num_drafts < 1:
            raise InputError(
                f"cannot draft {num_drafts} tokens with {self.config.num_nextn_predict_layers} MTP layers; "
                "use a checkpoint with mtp.* weights and num_drafts >= 1."
            )
        width = self.config.hidden_size
        if token_ids.dim() != 2 or not token_ids.shape[1] or hidden.shape != (*token_ids.shape, width):
            raise InputError(
                f"hidden_states of shape {tuple(hidden.shape)} and next_token_ids of {tuple(token_ids.shape)} do not "
                f"belong together; (B, S, {width}) and (B, S) with S >= 1 are needed: the token after each state."
            )
        if mask is not None and mask.dim() == 2 and mask.shape[1] and not bool(mask[:, -1].all()):
            raise InputError("a row ends in padding, where nothing follows; pad the rows to draft for on the left.")

    def _draft_step(self, hidden: Tensor, token_ids: Tensor, cache: Cache, attention_mask: Tensor | None) -> Tensor:
        """One call of the MTP layer: padded rows in, padded rows out."""
        assert self.mtp is not None
        shape = (token_ids.shape[0], token_ids.shape[1])
        past = cached_length(cache)
        inputs = pack_rows(shape, token_ids.device, past=past, token_ids=token_ids, attention_mask=attention_mask)
        assert inputs.rows is not None
        rotary = self.model.rotary_emb(hidden, inputs.positions)
        embeddings = self.model.embed_tokens(inputs.token_ids)
        prediction = self.mtp(embeddings, inputs.rows.pack(hidden), inputs, rotary, TransformersCache.of(cache, inputs))
        return inputs.rows.unpack(prediction.hidden)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **_: object) -> Tensor | None:
        """`generate` asks for masks over pairs of tokens when a cache is static; this model wants the rows' own."""
        return attention_mask


def _columns_of(logits_to_keep: int | Tensor) -> slice | Tensor:
    if isinstance(logits_to_keep, Tensor):
        return logits_to_keep
    if logits_to_keep < 0:
        raise InputError(f"logits_to_keep={logits_to_keep} must be 0 (all positions), a positive count or indices.")
    return slice(-logits_to_keep, None)


def _items(targets: Tensor, items: int | Tensor | None) -> int | Tensor:
    if items is None:
        return (targets != IGNORED).sum().clamp_min(1)
    return items.to(targets.device) if isinstance(items, Tensor) else items


def _label_count(config: Qwen3NextConfig) -> int:
    assert config.num_labels is not None
    return config.num_labels


class Qwen3NextForSequenceClassification(GenericForSequenceClassification, Qwen3NextPreTrainedModel):
    """One label per row, read at its last token that is not padding."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        Qwen3NextPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = Qwen3NextModel(config)
        self.score = nn.Linear(config.hidden_size, _label_count(config), bias=False)
        self.post_init()


class Qwen3NextForTokenClassification(GenericForTokenClassification, Qwen3NextPreTrainedModel):
    """One label per token."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        Qwen3NextPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = Qwen3NextModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, _label_count(config))
        self.post_init()


class Qwen3NextForQuestionAnswering(GenericForQuestionAnswering, Qwen3NextPreTrainedModel):
    """Start and end of the answer's span."""

    base_model_prefix = "transformer"

    def __init__(self, config: Qwen3NextConfig) -> None:
        Qwen3NextPreTrainedModel.__init__(self, config)
        self.transformer = Qwen3NextModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()
