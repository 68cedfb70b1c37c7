"""Published names <-> names in memory: every layout reads to the same bits, and what does not fit is refused."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from tests.conftest import tiny_model
from tests.model.stored import Tensors, quantized, same_bits, unfused, write
from torch import Tensor

from qwen3_next import Qwen3NextConfig, Qwen3NextForCausalLM
from qwen3_next.errors import CheckpointError
from qwen3_next.model import places
from qwen3_next.model.weights import (
    compare,
    mtp_layers_present,
    open_checkpoint,
    published_shapes,
    published_tensors,
)

DATA = Path(__file__).parent.parent / "data"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXPERTS = "model.layers.0.mlp.experts."


def random_state(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The state dict of a tiny model, `mtp.*` included."""
    return {name: tensor.to(dtype) for name, tensor in tiny_model().state_dict().items()}


def read_all(file: Path, dtypes: dict[str, torch.dtype] | None = None) -> dict[str, Tensor]:
    return {name: lazy[...] for name, lazy in open_checkpoint([file]).lazy_state_dict(dtypes).items()}


def assert_same(read: Tensors, expected: Tensors) -> None:
    assert read.keys() == expected.keys()
    assert [name for name in expected if not same_bits(read[name], expected[name])] == []


def test_the_published_table_is_what_the_meta_model_writes() -> None:
    with gzip.open(DATA / "published_tensor_shapes.json.gz") as file:
        published = {name: tuple(shape) for name, shape in json.load(file).items()}
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(Qwen3NextConfig())
    assert len(published) == 75_944
    assert published_shapes(model.state_dict()) == published


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["per expert", "fused"])
def test_either_expert_layout_reads_to_the_same_bits(tmp_path: Path, dtype: torch.dtype, layout: str) -> None:
    state = random_state(dtype)
    file = write(tmp_path, unfused(state) if layout == "per expert" else state)
    assert_same(read_all(file), state)


def test_published_tensors_are_views_under_published_names() -> None:
    state = random_state()
    published = dict(published_tensors(state))
    assert_same(published, unfused(state))
    storage = state[EXPERTS + "gate_up_proj"].untyped_storage().data_ptr()
    assert published[EXPERTS + "3.up_proj.weight"].untyped_storage().data_ptr() == storage


@pytest.mark.parametrize("part", [64, 2**24])
def test_reading_in_another_dtype_casts_each_value_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setattr(places, "_CPU_PART", part)
    state = random_state()
    file = write(tmp_path, unfused(state))
    wanted = {name: torch.bfloat16 for name in state if not name.endswith(("A_log", "dt_bias"))}
    assert_same(read_all(file, wanted), {name: each.to(wanted.get(name, each.dtype)) for name, each in state.items()})


def test_experts_of_mixed_dtypes_are_read_in_the_widest(tmp_path: Path) -> None:
    state = random_state(torch.bfloat16)
    stored = unfused(state)
    stored[EXPERTS + "2.up_proj.weight"] = stored[EXPERTS + "2.up_proj.weight"].float()
    read = read_all(write(tmp_path, stored))
    assert same_bits(read[EXPERTS + "gate_up_proj"], state[EXPERTS + "gate_up_proj"].float())
    assert same_bits(read[EXPERTS + "down_proj"], state[EXPERTS + "down_proj"])


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", [1, 2**24])
def test_block_fp8_reads_as_its_plain_dequantisation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale_dtype: torch.dtype, part: int
) -> None:
    monkeypatch.setattr(places, "_CPU_PART", part)
    state = {
        "model.norm.weight": torch.randn(200).bfloat16(),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(300, 200),
        EXPERTS + "gate_up_proj": torch.randn(3, 2 * 150, 200),
        EXPERTS + "down_proj": torch.randn(3, 200, 150),
    }
    stored, meaning = {}, {}
    for name, weight in unfused(state).items():
        stored[name] = meaning[name] = weight
        if weight.ndim == 2:
            stored[name], stored[name + "_scale_inv"], meaning[name] = quantized(weight, scale_dtype)
    file = write(tmp_path, stored)
    assert open_checkpoint([file]).is_quantized
    read = read_all(file, {name: torch.float32 for name in state if name != "model.norm.weight"})
    assert_same(unfused(read), meaning)
    assert read_all(file)[EXPERTS + "down_proj"].dtype == torch.bfloat16
    for name, weight in state.items():
        assert (read[name] - weight).abs().max() <= weight.abs().max() / 16, "beyond the rounding of e4m3"


def test_a_lazy_tensor_describes_itself_without_reading(tmp_path: Path) -> None:
    file = write(tmp_path, unfused(random_state(torch.bfloat16)))
    lazy = open_checkpoint([file]).lazy_state_dict()[EXPERTS + "gate_up_proj"]
    whole = lazy[...]
    file.unlink()
    assert (lazy.get_shape(), lazy.get_dtype(), lazy.ndim) == ([8, 32, 32], "BF16", 3)
    assert lazy.is_floating_point()
    assert tuple(lazy.shape) == tuple(whole.shape)
    with pytest.raises(CheckpointError, match="cannot be read any more"):
        lazy[...]


def test_a_lazy_tensor_reads_a_part(tmp_path: Path) -> None:
    state = random_state()
    lazy = open_checkpoint([write(tmp_path, unfused(state))]).lazy_state_dict()[EXPERTS + "down_proj"]
    assert torch.equal(lazy[2:4, :, 1], state[EXPERTS + "down_proj"][2:4, :, 1])


def test_a_file_cut_after_opening_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path, {"a": torch.ones(100)})
    lazy = open_checkpoint([file]).lazy_state_dict()["a"]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="ends 10 bytes early"):
        lazy[...]


@pytest.mark.parametrize("gone", [["3.up_proj"], ["0.gate_proj"], ["5.gate_proj", "5.up_proj", "5.down_proj"]])
def test_a_gap_among_the_experts_is_refused(tmp_path: Path, gone: list[str]) -> None:
    stored = unfused(random_state())
    for name in gone:
        del stored[f"{EXPERTS}{name}.weight"]
    with pytest.raises(
        CheckpointError, match=f"{len(gone)} tensors of 8 experts are missing: {EXPERTS}{gone[0]}.weight"
    ):
        open_checkpoint([write(tmp_path, stored)])


def test_an_absurd_expert_number_is_refused_quickly(tmp_path: Path) -> None:
    stored = unfused(random_state()) | {EXPERTS + "999999999.up_proj.weight": torch.ones(16, 32)}
    with pytest.raises(CheckpointError, match="and 2999999967 more"):
        open_checkpoint([write(tmp_path, stored)])


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [("2.up_proj", (16, 31), [16, 32]), ("4.down_proj", (16, 32), [32, 16]), ("0.gate_proj", (32,), "F, D")],
)
def test_an_expert_of_another_shape_is_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...], wanted: list[int] | str
) -> None:
    stored = unfused(random_state()) | {f"{EXPERTS}{name}.weight": torch.ones(shape)}
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint([write(tmp_path, stored)])
    assert f"{EXPERTS}{name}.weight has the shape {list(shape)}" in str(caught.value)
    assert str(wanted) in str(caught.value)


@pytest.mark.parametrize(("width", "hidden"), [(16, 32), (32, 32), (64, 32), (24, 56)])
def test_fused_experts_stored_transposed_are_refused(tmp_path: Path, width: int, hidden: int) -> None:
    state = {
        EXPERTS + "gate_up_proj": torch.ones(4, 2 * width, hidden),
        EXPERTS + "down_proj": torch.ones(4, hidden, width),
    }
    assert_same(read_all(write(tmp_path, state)), state)
    with pytest.raises(CheckpointError, match="stored transposed"):
        open_checkpoint([write(tmp_path, {name: tensor.mT for name, tensor in state.items()})])


def test_experts_stored_twice_are_refused(tmp_path: Path) -> None:
    state = random_state()
    with pytest.raises(CheckpointError, match="stand twice, fused and one by one"):
        open_checkpoint([write(tmp_path, unfused(state) | state)])


FP8 = torch.zeros(130, 100).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"a.weight": FP8}, "a.weight has no a.weight_scale_inv"),
        ({"a.weight": FP8, "a.weight_scale_inv": torch.ones(1, 1)}, r"needs \[2, 1\]"),
        ({"a.weight": FP8, "a.weight_scale_inv": torch.ones(2, 1).half()}, "bf16 or fp32"),
        ({"a.weight": FP8[0], "a.weight_scale_inv": torch.ones(1, 1)}, "only matrices"),
        ({"a.weight": FP8.float(), "a.weight_scale_inv": torch.ones(2, 1)}, "scales no fp8 weight"),
        ({"a.weight_scale_inv": torch.ones(2, 1)}, "scales no fp8 weight"),
    ],
)
def test_fp8_weights_and_scales_that_do_not_fit_are_refused(tmp_path: Path, tensors: Tensors, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint([write(tmp_path, tensors)])


def test_compare_lists_what_is_missing_unexpected_and_of_another_shape() -> None:
    expected = {f"layer.{i}": (2, 3) for i in range(20)} | {"same": (1,), "other": (4, 5)}
    with pytest.raises(CheckpointError) as caught:
        compare(expected, {"same": (1,), "other": (5, 4), "left.over": (7,)})
    message = str(caught.value)
    assert "20 missing: layer.0, layer.1" in message
    assert "and 12 more" in message
    assert "1 unexpected: left.over" in message
    assert "1 of another shape: other (expected [4, 5], found [5, 4])" in message


def test_compare_accepts_what_fits() -> None:
    expected = {"layers.0.weight": (2, 3), "norm.weight": (3,)}
    compare(expected, {"norm.weight": [3], "layers.0.weight": [2, 3]})
    prefixed = {f"model.{name}": shape for name, shape in expected.items()}
    compare(expected, {**prefixed, "lm_head.weight": (9, 3)}, base_prefix="model.", may_exceed=["lm_head."])
    compare({**prefixed, "score.weight": (2, 3)}, expected, base_prefix="model.", may_miss=["score."])
    with pytest.raises(CheckpointError, match=r"2 missing.*2 unexpected"):
        compare(expected, prefixed)


@pytest.mark.parametrize("prefixed_first", [True, False])
def test_compare_refuses_a_tensor_that_stands_under_both_names(prefixed_first: bool) -> None:
    names = ["model.norm.weight", "norm.weight"] if prefixed_first else ["norm.weight", "model.norm.weight"]
    for expected in names:
        with pytest.raises(CheckpointError, match=f"1 standing twice: {names[0]} and {names[1]}"):
            compare({expected: (3,)}, dict.fromkeys(names, (3,)), base_prefix="model.")


def test_mtp_layers_are_counted_and_a_partial_block_is_refused() -> None:
    names = set(random_state())
    mtp = {name for name in names if name.startswith("mtp.")}
    assert mtp_layers_present(names) == 1
    assert mtp_layers_present(names - mtp) == 0
    assert mtp_layers_present(names | {name.replace("layers.0", "layers.1") for name in mtp}) == 2
    for name in mtp:
        with pytest.raises(CheckpointError, match=f"1 missing: {name}"):
            mtp_layers_present(names - {name})
    with pytest.raises(CheckpointError, match=r"mtp\.layers\.0\.input_layernorm\.weight"):
        mtp_layers_present({"mtp.fc.weight"})


def test_an_mtp_block_without_some_of_its_experts_is_refused(tmp_path: Path) -> None:
    stored = unfused(random_state())
    del stored["mtp.layers.0.mlp.experts.2.down_proj.weight"]
    with pytest.raises(CheckpointError, match=r"missing: mtp\.layers\.0\.mlp\.experts\.2\.down_proj\.weight"):
        open_checkpoint([write(tmp_path, stored)])
