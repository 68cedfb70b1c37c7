"""What all model classes share: initialisation, and loading and saving in the published layout."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils.modeling import convert_file_size_to_int
from huggingface_hub import create_repo
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.utils import logging
from transformers.utils.hub import create_and_tag_model_card

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.errors import InputError
from qwen3_next.model import weights
from qwen3_next.model.delta_net import GatedDeltaNet
from qwen3_next.model.layers import CausalConvolution, GatedRMSNorm, RotaryEmbedding, ZeroCentredNorm, rotary_settings
from qwen3_next.model.lazy_tensor import LazyTensor
from qwen3_next.model.moe import Experts, Router
from qwen3_next.model.random_values import DECAY_RATES, rows_of_one_norm

logger = logging.get_logger(__name__)


class Qwen3NextPreTrainedModel(PreTrainedModel):
    """Base of the Qwen3-Next classes. Weights are read and written in the published layout, `mtp.*` included."""

    config: Qwen3NextConfig
    config_class = Qwen3NextConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer", "RecomputableLayer"]  # noqa: RUF012  these four by transformers' protocol
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = False
    _is_stateful = True
    _can_compile_fullgraph = False
    # Left over in the classes without the layer; the causal LM refuses a checkpoint that does not fit it.
    _keys_to_ignore_on_load_unexpected = [r"^mtp\."]  # noqa: RUF012
    _keep_in_fp32_modules_strict = {"A_log", "dt_bias"}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, ZeroCentredNorm):
            init.zeros_(module.weight)
        elif isinstance(module, GatedRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, CausalConvolution):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, Router):
            rows = torch.randn_like(module.weight, dtype=torch.float32)
            init.copy_(module.weight, rows_of_one_norm(rows, std))
        elif isinstance(module, GatedDeltaNet):
            init.ones_(module.dt_bias)
            init.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(*DECAY_RATES).log_())
        elif isinstance(module, RotaryEmbedding):
            init.copy_(module.inv_freq, rotary_settings(self.config)[0])
        else:
            super()._init_weights(module)

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel,
        state_dict: dict[str, Any] | None,
        checkpoint_files: list[str] | None,
        load_config: Any,
        expected_keys: list[str] | None = None,
    ) -> Any:
        """transformers' hook between reading the configuration and filling the parameters.

        Safetensors files are checked against the model before anything is allocated and handed on as lazily read,
        fused tensors, so that device maps, offloading and dtypes stay transformers' business.
        """
        assert isinstance(model, Qwen3NextPreTrainedModel)
        if state_dict is None and checkpoint_files and not expected_keys:  # with expected keys it is an adapter
            checkpoint = weights.open_checkpoint(
                [Path(file) for file in checkpoint_files], (load_config.sharded_metadata or {}).get("weight_map")
            )
            state_dict = _checked_state_dict(model, checkpoint, load_config)
            # Weights offloaded to disk are read where they lie under the name they have there. fp8 bytes cannot be, and
            # a body of another name is not found: those are written anew.
            as_stored = not checkpoint.is_quantized and checkpoint.parameters.keys() >= state_dict.keys()
            checkpoint_files = checkpoint_files if as_stored else None
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]  transformers' other layouts are refused
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "4GB",
        dtype: torch.dtype | None = None,
        fetch: Callable[[str], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write configuration, generation settings and weights in the published layout.

        Args:
            state_dict: parameters by their names in memory; None takes the model's own, fetched back where offloaded.
            push_to_hub: upload what was written as well; like the writing, in the main process only.
            max_shard_size: size of a file at most, as bytes or like "4GB".
            dtype: of every tensor written: `torch.bfloat16` exports what was published. None keeps each tensor's own,
                so that fp32 decay rates survive a round trip.
            fetch: gives the values of a parameter that is on the meta device; None looks for offloaded ones.
            kwargs: for the hub with `push_to_hub`: `repo_id` (by default the directory's name), `token`, `private`,
                `tags`, `commit_message`, `commit_description`, `revision`, `create_pr`. A model that carries PEFT
                adapters is saved by transformers' own method, which writes the adapters alone.

        Raises:
            CheckpointError: the weights cannot be written; an earlier checkpoint in the directory stays whole.
            InputError: an argument that asks for another layout, or an unknown one; a size below one byte.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            weights_given = None if state_dict is None else dict(state_dict)
            super().save_pretrained(
                save_directory, is_main_process, weights_given, push_to_hub, max_shard_size, **kwargs
            )
            return
        _refuse_unknown_when_saving(kwargs, push_to_hub)
        max_shard_bytes = _bytes_of(max_shard_size)
        if is_main_process:
            self.config.dtype = dtype or self.dtype
            self.config.architectures = [type(self).__name__]
            directory = Path(save_directory)
            present = self._get_files_timestamps(directory) if directory.is_dir() else {}
            weights.save_weights(
                self.state_dict() if state_dict is None else state_dict,
                directory,
                dtype=dtype,
                max_shard_bytes=max_shard_bytes,
                fetch=fetch or (lambda name: load_offloaded_parameter(self, name)),
            )
            self.config.save_pretrained(directory)
            if self.can_generate():
                self.generation_config.save_pretrained(directory)
            if push_to_hub:
                self._upload(directory, present, **kwargs)

    def _upload(
        self,
        directory: Path,
        present: dict[str, float],
        repo_id: str | None = None,
        token: bool | str | None = None,
        private: bool | None = None,
        tags: list[str] | None = None,
        **commit: Any,
    ) -> None:
        """Upload the files of a directory that were not `present` before, or were older.

        Not by `push_to_hub`, which saves once more, without the arguments that this was saved with.
        """
        repo_id = create_repo(repo_id or directory.resolve().name, token=token, private=private, exist_ok=True).repo_id
        card = create_and_tag_model_card(repo_id, tags, token=cast("str | None", token))
        card.save(directory / "README.md")
        self._upload_modified_files(directory, repo_id, present, token=token, **commit)


def _refuse_unknown_when_saving(arguments: dict[str, Any], push_to_hub: bool) -> None:
    layouts = {name: arguments.pop(name) for name in _ONLY_LAYOUT if name in arguments}
    refused = [f"{name}={value!r}" for name, value in layouts.items() if value != _ONLY_LAYOUT[name]]
    allowed = _FOR_THE_HUB if push_to_hub else {"repo_id", "token"}
    refused += [name for name in arguments if name not in allowed]
    if refused:
        raise InputError(
            f"save_pretrained cannot serve {', '.join(refused)}: it writes safetensors in the published layout, and to "
            f"the hub with push_to_hub=True, where it takes {', '.join(sorted(_FOR_THE_HUB))}; leave them out."
        )


_FOR_THE_HUB = {
    *("repo_id", "token", "private", "tags"),
    *("commit_message", "commit_description", "revision", "create_pr"),
}

_ONLY_LAYOUT = {
    "variant": None,
    "safe_serialization": True,
    "save_original_format": True,
    "save_peft_format": True,
    "distributed_checkpoint": False,
}
"""Arguments of transformers' method that choose a layout, with the value that asks for the one written here."""


def _checked_state_dict(
    model: Qwen3NextPreTrainedModel, checkpoint: weights.Checkpoint, load_config: Any
) -> dict[str, Any]:
    _settle_mtp(model, checkpoint)
    checkpoint = replace(checkpoint, parameters=_with_body_named(model.base_model_prefix, checkpoint.parameters))
    expected = model.state_dict()
    found = checkpoint.in_memory_shapes()
    if not load_config.ignore_mismatched_sizes:
        may_miss, may_exceed = _allowances(model)
        weights.compare(
            {name: tuple(tensor.shape) for name, tensor in expected.items()},
            found,
            base_prefix=f"{model.base_model_prefix}.",
            may_miss=may_miss,
            may_exceed=may_exceed,
        )
    if model.config.tie_word_embeddings and "lm_head.weight" in expected:
        weights.refuse_untied_head(checkpoint.parameters)
    return checkpoint.lazy_state_dict({name: tensor.dtype for name, tensor in expected.items()})


def _with_body_named(prefix: str, parameters: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The network is `transformer.` in question answering and `model.` in every other class, as transformers has it."""
    other = {"model": "transformer.", "transformer": "model."}[prefix]
    named: dict[str, LazyTensor] = {}
    for name, lazy in parameters.items():
        new = f"{prefix}.{name.removeprefix(other)}" if name.startswith(other) else name
        # One that stands under both names keeps them, and is refused as left over.
        named[name if new in parameters else new] = lazy
    return named


def _settle_mtp(model: Qwen3NextPreTrainedModel, checkpoint: weights.Checkpoint) -> None:
    """A checkpoint without any `mtp.*` tensor makes a model without the MTP layer; a partial one is refused."""
    if checkpoint.mtp_layers() == 0 and getattr(model, "mtp", None) is not None:
        logger.warning("The checkpoint holds no multi-token prediction layer: the model is loaded without one.")
        model.register_module("mtp", None)
        model.config.num_nextn_predict_layers = 0


def _allowances(model: Qwen3NextPreTrainedModel) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What may be missing and left over where a checkpoint of another class of the family is loaded."""
    claimed = (model.config.architectures or [type(model).__name__])[0]
    if claimed == type(model).__name__:
        tied = ("lm_head.weight",) if model.config.tie_word_embeddings else ()
        return tied, ()
    return _HEADS, _HEADS


_HEADS = ("lm_head.", "mtp.", "score.", "qa_outputs.")


def _bytes_of(size: int | str) -> int:
    try:
        count = size if isinstance(size, int) else int(convert_file_size_to_int(size))
    except ValueError:
        count = 0
    if count < 1:
        raise InputError(f'max_shard_size={size!r} is no size; give at least 1 byte, as a number or like "4GB".')
    return count
