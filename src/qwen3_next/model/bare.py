"""The language model without transformers' model classes: the same layers, for one sequence, ready to run sooner.

Importing `PreTrainedModel` and `generate` takes longer than reading a small model and writing a page with it. The
command line needs neither: it runs the layers, whose parameters have the same names, from here.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.model.cache import ModelCache
from qwen3_next.model.cuts import Cut
from qwen3_next.model.decoder import DecoderLayer
from qwen3_next.model.inputs import PackedInputs
from qwen3_next.model.layers import RMSNorm, RotaryEmbedding
from qwen3_next.model.lazy_tensor import Filling, fill
from qwen3_next.model.mtp import MultiTokenPredictor
from qwen3_next.model.parallel_weights import cut_pieces
from qwen3_next.model.quantize import Quantization, allocate_
from qwen3_next.model.random_values import fill_randomly
from qwen3_next.model.weights import Progress, compare, open_directory, refuse_untied_head


class BareNetwork(nn.Module):
    """`Qwen3NextModel.forward_packed` for decoding: embedding, decoder layers, final norm."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        # Random numbers and ranges on the meta device would import torch's compiler: hence no initialisation here, and
        # the rotary frequencies, which no file holds, on the CPU.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size))
        with torch.device("cpu"):
            self.rotary_emb = RotaryEmbedding(config)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer_type, index, config.is_sparse_layer(index))
            for index, layer_type in enumerate(config.layer_types)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, inputs: PackedInputs, cache: ModelCache) -> Float[Tensor, "T D"]:
        """The states after the final norm, `[T, D]`."""
        x = self.embed_tokens(inputs.token_ids)
        rotary = self.rotary_emb(x, inputs.positions)
        for layer in self.layers:
            x = layer(x, inputs, rotary, cache).hidden
        return self.norm(x)


class BareCausalLM(nn.Module):
    """Network and output head of `Qwen3NextForCausalLM`, with the same parameters; the caller brings cache and rows.

    Attributes:
        mtp: the layer that drafts; None where it was not loaded.
    """

    def __init__(self, config: Qwen3NextConfig, has_mtp: bool = False) -> None:
        super().__init__()
        self.config = config
        self.model = BareNetwork(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.mtp = MultiTokenPredictor(config) if has_mtp else None

    @classmethod
    def from_directory(
        cls,
        directory: Path,
        config: Qwen3NextConfig,
        dtype: torch.dtype,
        device: torch.device,
        *,
        quantization: Quantization = "auto",
        mtp: bool = False,
        on_progress: Progress | None = None,
        shard: "Shard | None" = None,
    ) -> "BareCausalLM":
        """Load a local checkpoint of the published layout, straight into its place.

        Args:
            dtype: of all parameters that are neither block-fp8 nor decay rates.
            quantization: "auto" keeps block-fp8 weights, bit by bit; what such a checkpoint holds of `QUANTIZED` in
                bf16 is quantised with them. "fp8" quantises all others as well while they are read, "none" dequantises.
            mtp: load the MTP layer too, if the checkpoint has one; else `mtp.*` stays in the files.
            on_progress: called with the bytes read so far and in all, now and then.
            shard: takes its parts from the model while it has no values; nothing else is read then.

        Raises:
            CheckpointError: the files are missing, not whole, or do not hold exactly the model that `config` describes,
                or hold a head of its own where `config` ties it to the embedding.
            MemoryError, torch.OutOfMemoryError: the device has too little memory.
        """
        checkpoint = open_directory(directory)
        has_mtp = checkpoint.mtp_layers() > 0 and mtp  # refuses a block that is not complete, wanted or not
        model = cls._on_meta(config, has_mtp)
        tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        compare(shapes, checkpoint.in_memory_shapes(), may_miss=tied, may_exceed=() if has_mtp else ("mtp.",))
        if config.tie_word_embeddings:
            refuse_untied_head(checkpoint.parameters)
        fp8 = quantization == "fp8" or (quantization == "auto" and checkpoint.is_quantized)
        cuts = {} if shard is None else shard(model, fp8 or checkpoint.is_quantized)
        places = allocate_(model, dtype, device, fp8=fp8)
        pieces = {name: cut_pieces(checkpoint.parameters[name], cuts.get(name)) for name in places}
        fillings = [Filling(pieces[name], place) for name, place in places.items()]
        fill(fillings, None if on_progress is None else _counter(fillings, on_progress))
        return model.eval()

    @classmethod
    def with_random_values(
        cls,
        config: Qwen3NextConfig,
        dtype: torch.dtype,
        device: torch.device,
        *,
        quantization: Quantization = "auto",
        mtp: bool = False,
        seed: int = 0,
        shard: "Shard | None" = None,
    ) -> "BareCausalLM":
        """A model of the initialisation's values, drawn where they stay: the same for a seed, kind of device and dtype.

        Args:
            quantization: "fp8" quantises them while they are drawn; "auto" and "none" do not.
            mtp: make the MTP layer too, if `config` has one.
            shard: as in `from_directory`; the values are those of the whole model.

        Raises:
            MemoryError, torch.OutOfMemoryError: the device has too little memory.
        """
        model = cls._on_meta(config, mtp and config.num_nextn_predict_layers > 0)
        cuts = {} if shard is None else shard(model, quantization == "fp8")
        places = allocate_(model, dtype, device, fp8=quantization == "fp8")
        fill_randomly(model, places, config.initializer_range, seed, cuts)
        return model.eval()

    @classmethod
    def _on_meta(cls, config: Qwen3NextConfig, has_mtp: bool) -> "BareCausalLM":
        with torch.device("meta"):
            return cls(config, has_mtp)


Shard = Callable[[BareCausalLM, bool], Mapping[str, Cut]]
"""Leaves of a model only what one rank holds, given whether weights are block-fp8; says what that is."""


def _counter(fillings: Sequence[Filling], on_progress: Progress) -> Callable[[int], None]:
    total, done, lock = sum(filling.nbytes for filling in fillings), 0, Lock()

    def count(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            on_progress(done, total)

    return count
