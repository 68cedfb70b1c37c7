"""A model for inference gets its values where they stay: read or drawn, ordinary or block-fp8."""

import json
import re
from pathlib import Path

import pytest
import torch
from tests.conftest import tiny_config, tiny_model
from tests.model.stored import quantized, same_bits, unfused, write
from tests.model.test_bare import last_logits
from tests.model.test_quantize import KEPT
from torch import Tensor, nn

from qwen3_next import LLM, EngineConfig, Qwen3NextConfig, SamplingParams
from qwen3_next.engine import loading
from qwen3_next.engine.loading import SHIPPED, load_model
from qwen3_next.errors import BackendError, CheckpointError, InputError
from qwen3_next.model import PackedMemory, lazy_tensor, places, quantize
from qwen3_next.model.bare import BareCausalLM
from qwen3_next.model.quantize import quantize_

WIDE = {"hidden_size": 160, "moe_intermediate_size": 136, "shared_expert_intermediate_size": 144}
"""More than one block in each direction, borders inside some, and between gate and up projection."""

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CPU = torch.device("cpu")

Stored = dict[str, Tensor]


class WithDrafts(BareCausalLM):
    """A model that holds the MTP layer as well, whoever loads it."""

    def __init__(self, config: Qwen3NextConfig, has_mtp: bool = True) -> None:
        super().__init__(config, True)


@pytest.fixture(autouse=True)
def many_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even these small models are read by several threads, and their matrices in parts."""
    monkeypatch.setattr(lazy_tensor, "_RUN_BYTES", 2**16)
    monkeypatch.setattr(places, "_CPU_PART", 2**14)
    monkeypatch.setattr(places, "_GPU_PART", 2**14)


def checkpoint(
    folder: Path, scale_dtype: torch.dtype | None = None, dtype: torch.dtype = torch.bfloat16, **changes: object
) -> Stored:
    """What a file in the published layout holds, in `dtype` and, with scales, in block-fp8; config.json beside it."""
    model = tiny_model(int(torch.randint(2**31, ())), dtype=torch.bfloat16, **(WIDE | changes))
    stored: Stored = {}
    for name, each in unfused(model.state_dict()).items():
        weight = each.to(dtype)
        stored[name] = weight
        if scale_dtype is not None and not KEPT.fullmatch(name):
            stored[name], stored[f"{name}_scale_inv"], _ = quantized(weight, scale_dtype)
    if changes.get("tie_word_embeddings"):
        del stored["lm_head.weight"]
    model.config.save_pretrained(folder)
    write(folder, stored)
    return stored


def config_of(folder: Path) -> Qwen3NextConfig:
    return loading.read_config(folder)


def loaded(folder: Path, kind: type[BareCausalLM] = BareCausalLM, device: str = "cpu", **options: object) -> Stored:
    dtype = options.pop("dtype", torch.bfloat16)
    model = kind.from_directory(folder, config_of(folder), dtype, torch.device(device), **options)  # type: ignore[arg-type]
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {device}
    return state_of(model)


def state_of(model: nn.Module) -> Stored:
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def in_files(state: Stored) -> Stored:
    """By the published names, scales of experts included."""
    scales = {name.removesuffix("_scale_inv"): each for name, each in state.items() if name.endswith("_scale_inv")}
    named = {f"{name}_scale_inv": each for name, each in unfused(scales).items()}
    return named | unfused({name: each for name, each in state.items() if not name.endswith("_scale_inv")})


def assert_same(found: Stored, expected: Stored) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bits(found[name], tensor), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stored_in", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", [BareCausalLM, WithDrafts])
def test_quantised_while_loading_is_quantised_after_loading(
    tmp_path: Path, kind: type[BareCausalLM], dtype: torch.dtype, stored_in: torch.dtype, device: str
) -> None:
    checkpoint(tmp_path, dtype=stored_in)
    after = kind.from_directory(tmp_path, config_of(tmp_path), dtype, torch.device(device), quantization="none")
    assert all(weight.dtype in (dtype, torch.float32) for weight in after.parameters())
    quantize_(after)
    assert_same(loaded(tmp_path, kind, device, dtype=dtype, quantization="fp8"), state_of(after))
    assert any(name.startswith("mtp.") for name in after.state_dict()) == (kind is WithDrafts)


def test_a_fused_file_gives_the_same_as_the_published_one(tmp_path: Path) -> None:
    stored = checkpoint(tmp_path)
    expected = loaded(tmp_path, quantization="fp8")
    mtp = {name: each for name, each in stored.items() if name.startswith("mtp.")}
    write(tmp_path, mtp | loaded(tmp_path, quantization="none"))
    assert_same(loaded(tmp_path, quantization="fp8"), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("quantization", ["auto", "fp8"])
def test_block_fp8_stays_as_it_is_stored(
    tmp_path: Path, quantization: str, scale_dtype: torch.dtype, device: str
) -> None:
    stored = checkpoint(tmp_path, scale_dtype)
    found = in_files(loaded(tmp_path, WithDrafts, device, quantization=quantization))
    wide = ("_scale_inv", "A_log", "dt_bias")
    assert_same(found, {name: each.float() if name.endswith(wide) else each for name, each in stored.items()})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_block_fp8_is_dequantised_on_request(tmp_path: Path, scale_dtype: torch.dtype, device: str) -> None:
    stored = checkpoint(tmp_path, scale_dtype)
    found = in_files(loaded(tmp_path, WithDrafts, device, dtype=torch.float32, quantization="none"))
    assert found.keys() == {name for name in stored if not name.endswith("_scale_inv")}
    for name, weight in found.items():
        scales = stored.get(f"{name}_scale_inv")
        meaning = stored[name].float()
        if scales is not None:
            grid = scales.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
            meaning = meaning * grid[: meaning.shape[0], : meaning.shape[1]]
        assert same_bits(weight, meaning), name


def test_a_bf16_weight_in_an_fp8_checkpoint_is_quantised_with_the_others(tmp_path: Path) -> None:
    stored = checkpoint(tmp_path, torch.float32)
    name, lm_head = "model.layers.0.mlp.experts.2.up_proj.weight", torch.randn(97, 160)
    weight = torch.randn(136, 160).bfloat16()
    del stored[f"{name}_scale_inv"]
    codes, scales, meaning = quantized(lm_head, torch.float32)
    write(tmp_path, stored | {name: weight, "lm_head.weight": codes, "lm_head.weight_scale_inv": scales})
    found = in_files(loaded(tmp_path))
    expected = quantized(weight, torch.float32)
    assert same_bits(found[name], expected[0])
    assert same_bits(found[f"{name}_scale_inv"], expected[1])
    assert same_bits(found["lm_head.weight"], meaning.bfloat16())  # never fp8 in memory


@pytest.mark.parametrize("quantization", ["auto", "fp8"])
def test_a_tied_head_is_the_embedding(tmp_path: Path, quantization: str) -> None:
    stored = checkpoint(tmp_path, tie_word_embeddings=True)
    read = BareCausalLM.from_directory(tmp_path, config_of(tmp_path), torch.bfloat16, CPU, quantization=quantization)  # type: ignore[arg-type]
    drawn = BareCausalLM.with_random_values(config_of(tmp_path), torch.bfloat16, CPU, quantization=quantization)  # type: ignore[arg-type]
    for model in (read, drawn):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(read.lm_head.weight, stored["model.embed_tokens.weight"])


def test_keys_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    stored = checkpoint(tmp_path, torch.bfloat16)
    projection = "model.layers.3.self_attn.k_proj.weight"
    faults: list[tuple[Stored, str]] = [
        ({name: each for name, each in stored.items() if not name.startswith(projection)}, "1 missing: .*k_proj"),
        ({name: each for name, each in stored.items() if name != f"{projection}_scale_inv"}, "has no .*_scale_inv"),
        (stored | {"model.layers.3.extra.weight": torch.ones(2)}, "1 unexpected: .*extra"),
        (stored | {"model.norm.weight": torch.ones(161)}, r"model\.norm\.weight \(expected \[160\], found \[161\]\)"),
        (stored | {f"{projection}_scale_inv": torch.ones(1, 1)}, r"k_proj.*needs \[1, 2\]"),
        (stored | {f"{projection}_scale_inv": torch.ones(1, 2).half()}, "in bf16 or fp32"),
        (stored | {"model.norm.weight": torch.ones(160, dtype=torch.int32)}, "has the dtype 'I32'"),
    ]
    for tensors, message in faults:
        write(tmp_path, tensors)
        for quantization in ("auto", "fp8", "none"):
            with pytest.raises(CheckpointError, match=message):
                loaded(tmp_path, quantization=quantization)


def test_a_file_cut_while_threads_read_it_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"

    def cut(done: int, total: int) -> None:
        if done < total / 2:
            file.write_bytes(b"")

    with pytest.raises(CheckpointError, match=r"ends .* bytes early"):
        loaded(tmp_path, on_progress=cut)


def test_progress_counts_the_bytes_that_are_read(tmp_path: Path) -> None:
    stored = checkpoint(tmp_path, torch.float32)
    total = sum(each.nbytes for name, each in stored.items() if not name.startswith("mtp."))
    seen: list[tuple[int, int]] = []
    loaded(tmp_path, on_progress=lambda *counts: seen.append(counts))
    assert len(seen) > 3
    assert seen == sorted(seen)
    assert {each for _, each in seen} == {total}
    assert seen[-1] == (total, total)


def test_a_long_load_shows_a_bar_if_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    load_model(SHIPPED, "auto", "cpu")
    monkeypatch.setattr(loading, "_LONG_LOAD_BYTES", 1)
    load_model(SHIPPED, "auto", "cpu", progress=False)
    shown = capsys.readouterr()
    assert shown.out + shown.err == ""
    load_model(SHIPPED, "auto", "cpu")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(r"loading.*MB", shown.err)


@pytest.mark.parametrize("random_weights", [False, True])
def test_too_little_memory_is_an_error_of_the_machine(monkeypatch: pytest.MonkeyPatch, random_weights: bool) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(quantize, "empty", refuse)
    with pytest.raises(BackendError, match="GiB of weights do not fit cpu"):
        load_model(SHIPPED, "auto", "cpu", random_weights=random_weights)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [BareCausalLM, WithDrafts])
def test_random_values_are_a_function_of_the_seed_and_fp8_is_what_quantising_makes_of_them(
    kind: type[BareCausalLM], device: str
) -> None:
    config = tiny_config(**WIDE)

    def drawn(**options: object) -> BareCausalLM:
        return kind.with_random_values(config, torch.bfloat16, torch.device(device), **options)  # type: ignore[arg-type]

    plain = drawn()
    assert_same(state_of(drawn()), state_of(plain))
    other = state_of(drawn(seed=1))
    assert not any(torch.equal(each, other[name]) for name, each in state_of(plain).items() if "proj" in name)
    fp8 = drawn(quantization="fp8")
    quantize_(plain)
    assert_same(state_of(fp8), state_of(plain))
    assert all(torch.isfinite(each.float()).all() for each in fp8.state_dict().values())


def test_random_values_are_those_of_the_initialisation() -> None:
    config = tiny_config(**WIDE, attention_bias=True, initializer_range=0.03)
    model = WithDrafts.with_random_values(config, torch.float32, CPU)
    for name, values in model.named_parameters():
        if name.endswith("A_log"):
            rates = values.exp()
            assert ((rates >= 0.01) & (rates <= 16)).all()
            assert rates.std() > 0.5
        elif "linear_attn.norm" in name or name.endswith("dt_bias"):
            assert (values == 1).all(), name
        elif "norm" in name or name.endswith("bias"):
            assert (values == 0).all(), name
        elif name.endswith("mlp.gate.weight"):
            torch.testing.assert_close(values.norm(dim=-1), torch.full((8,), 0.03 * 160**0.5))
        else:
            assert values.std().item() == pytest.approx(0.03, rel=6 / values.numel() ** 0.5), name
    memory = PackedMemory.allocate(config, pages=1, slots=1, dtype=torch.float32)
    logits = last_logits(model, torch.randint(97, (9,)), memory, 0)
    assert 0 < logits.std() < 10


@pytest.mark.parametrize("says_fp8", [False, True])
def test_a_config_alone_makes_a_model_with_the_shipped_tokenizer(tmp_path: Path, says_fp8: bool) -> None:
    config = tiny_config(vocab_size=8192, dtype=torch.float32)
    config.save_pretrained(tmp_path)
    if says_fp8:
        fields = json.loads((tmp_path / "config.json").read_text())
        fields["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load_model(tmp_path, "auto", "cpu")
    llm = LLM(str(tmp_path), random_weights=True, config=EngineConfig(max_sequences=2, memory_bytes=2**24))
    types = {weight.dtype for weight in llm.engine.loaded.model.parameters()}
    assert types == {torch.float32, torch.float8_e4m3fn} if says_fp8 else {torch.float32}
    assert llm.engine.loaded.tokenizer.to_str() == load_model(SHIPPED, "auto", "cpu").tokenizer.to_str()
    assert llm.generate("Once", SamplingParams(temperature=0, max_tokens=3))[0][0].token_ids
    for quantization, dtype in (("fp8", torch.float8_e4m3fn), ("none", torch.float32)):
        loaded = load_model(tmp_path, "auto", "cpu", random_weights=True, quantization=quantization)  # type: ignore[arg-type]
        assert loaded.model.get_parameter("model.layers.0.linear_attn.out_proj.weight").dtype == dtype


def test_an_unknown_quantisation_is_refused() -> None:
    with pytest.raises(InputError, match=r"quantization = 'int4' is unknown\. Allowed: auto, fp8, none"):
        load_model(SHIPPED, "auto", "cpu", quantization="int4")  # type: ignore[arg-type]
