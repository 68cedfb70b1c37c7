"""Whether a checkpoint holds exactly what a model needs: by names and shapes alone, before anything is allocated."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from qwen3_next.errors import CheckpointError

Shape = Sequence[int]

_SHOWN = 8


def compare(
    expected: Mapping[str, Shape],
    found: Mapping[str, Shape],
    *,
    base_prefix: str = "",
    may_miss: Sequence[str] = (),
    may_exceed: Sequence[str] = (),
) -> None:
    """Insist that a checkpoint holds exactly a model's parameters.

    Args:
        expected: shape of every parameter of the model, by name in memory.
        found: what the checkpoint holds, likewise.
        base_prefix: "model." lets a bare network and a model with a head read each other's checkpoints: a name that
            fits only with the prefix added or removed counts as that one.
        may_miss, may_exceed: beginnings of names (of the model, of the checkpoint) that may be absent or left over.

    Raises:
        CheckpointError: lists what is missing, unexpected, of another shape, or there under both names.
    """
    aligned: dict[str, str] = {}
    twice: list[str] = []
    for name in found:
        other = aligned.setdefault(_align(name, expected, base_prefix), name)
        if other != name:
            twice.append(f"{other} and {name}")
    missing = [name for name in expected if name not in aligned and not name.startswith(tuple(may_miss))]
    unexpected = [
        name for key, name in aligned.items() if key not in expected and not name.startswith(tuple(may_exceed))
    ]
    reshaped = [
        f"{name} (expected {list(expected[key])}, found {list(found[name])})"
        for key, name in aligned.items()
        if key in expected and tuple(expected[key]) != tuple(found[name])
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped, "standing twice": twice}
    listed = [f"{len(names)} {kind}: {listing(names)}" for kind, names in faults.items() if names]
    if listed:
        raise CheckpointError(
            f"the checkpoint does not fit the model; {'; '.join(listed)}. "
            "Check that config.json belongs to these weights and that every shard is listed."
        )


def mtp_layers_present(names: Collection[str]) -> int:
    """Count the multi-token prediction layers among parameter names in memory: 0 without any `mtp.` name.

    Raises:
        CheckpointError: the block is there but not complete; lists the missing names.
    """
    present = {name for name in names if name.startswith("mtp.")}
    if not present:
        return 0
    indices = [int(name.split(".")[2]) for name in present if re.match(r"mtp\.layers\.\d{1,4}\.", name)]
    count = max(indices, default=0) + 1
    missing = [name for name in _mtp_names(count, present) if name not in present]
    if missing:
        raise CheckpointError(
            f"the multi-token prediction block is not complete; {len(missing)} missing: {listing(missing)}. Download "
            "the whole checkpoint, or one without any mtp.* tensor."
        )
    return count


def _align(name: str, expected: Mapping[str, Shape], prefix: str) -> str:
    if name in expected or not prefix:
        return name
    candidates = (name.removeprefix(prefix), prefix + name)
    return next((candidate for candidate in candidates if candidate in expected), name)


def _mtp_names(layers: int, present: Collection[str]) -> Iterator[str]:
    """Every name of an MTP block with this many layers, attention biases aside."""
    yield from (f"mtp.{name}.weight" for name in ("fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"))
    attention = [f"self_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    swiglu = ("gate_proj", "up_proj", "down_proj")
    sparse = ["mlp.gate.weight", "mlp.shared_expert_gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    sparse += [f"mlp.shared_expert.{part}.weight" for part in swiglu]
    dense = [f"mlp.{part}.weight" for part in swiglu]
    for layer in range(layers):
        prefix = f"mtp.layers.{layer}."
        mlp = dense if prefix + dense[0] in present else sparse
        norms = ["input_layernorm.weight", "post_attention_layernorm.weight"]
        yield from (prefix + name for name in (*norms, *attention, *mlp))


def listing(names: Sequence[str], count: int | None = None) -> str:
    """The first names, and how many more there are of `count` (of all of them, where that is None)."""
    shown = names[:_SHOWN]
    rest = (count or len(names)) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")
