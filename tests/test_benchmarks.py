"""The benchmarks measure every row that they promise, and keep silent where the results differ."""

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import benchmarks.ops
import pytest
import torch
from benchmarks.operations import measure
from benchmarks.operations.case import Case, Inputs
from benchmarks.operations.measure import Rates, Time

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "model.py"
ROWS = [
    "prefill 5 tokens",
    "prefill 70 tokens",
    "decode 1 stream, context 6",
    "decode 3 streams, context 6",
    "load a checkpoint",
]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    specification = importlib.util.spec_from_file_location("benchmark_of_the_model", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def test_every_row_is_measured_beside_transformers(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.json"
    assert benchmark.main(["--preset", "tiny", "--json", str(file), "--scratch", str(tmp_path)]) == 0
    record = json.loads(file.read_text())
    assert [row["work"].split(", 0.")[0] for row in record["rows"]] == ROWS
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in record["rows"])
    assert all(row["implementation"] in benchmark.IMPLEMENTATIONS for row in record["rows"][:-1])
    assert record["skipped"] == []
    shown = capsys.readouterr().out
    assert all(work in shown for work in ROWS)
    assert list(tmp_path.iterdir()) == [file], "the checkpoint of the load row must not stay behind"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_models_agree_before_anything_is_timed(benchmark: ModuleType, dtype: str) -> None:
    precision = getattr(torch, dtype)
    pair = benchmark.make_pair(benchmark.PRESETS["tiny"].config, torch.device("cpu"), precision)
    assert 0 <= benchmark.check(pair) <= benchmark.BOUNDS[precision]
    weights = dict(pair.theirs.named_parameters())
    assert all(weights[name].data_ptr() == p.data_ptr() for name, p in pair.ours.named_parameters())


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_wrong_logits_print_no_speed(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: float
) -> None:
    honest = benchmark.logits_of

    def wrong(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return honest(model, tokens) * (1 + error if isinstance(model, benchmark.Qwen3NextForCausalLM) else 1)

    monkeypatch.setattr(benchmark, "logits_of", wrong)
    monkeypatch.setattr(benchmark, "measurements", lambda *_: pytest.fail("something was measured"))
    assert benchmark.main(["--preset", "tiny"]) == 1
    shown = capsys.readouterr().out
    assert "No speed is printed" in shown
    assert "tokens/s" not in shown


def test_rows_that_do_not_fit_the_time_are_named(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--preset", "tiny", "--seconds", "0"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Not measured" in shown
    assert all(work in shown for work in ROWS)


def test_copies_of_experts_that_would_not_fit_are_not_tried(benchmark: ModuleType) -> None:
    pair = benchmark.make_pair(benchmark.SHAPES_TINY, torch.device("cpu"), torch.float32)
    assert "batched_mm" in pair.implementations(1)
    assert "batched_mm" not in pair.implementations(10**6)


# benchmarks/ops.py: the same logic with a clock that tells what the test says, on a CPU.

SLOW_CARD = Rates(copy=measure.H200.copy / 2, read=measure.H200.read / 2, bf16=measure.H200.bf16, fp8=1e15)


@dataclass
class ToldClock:
    """Knows the time of each function by its name; what it does not know fails."""

    times: dict[str, float]

    def time(self, run: Callable[..., Any], sets: list[Inputs], graph: bool) -> Time:
        assert sets
        run(*sets[0])
        return Time(self.times[run.__name__], launched=not graph)


def twice(x: torch.Tensor) -> torch.Tensor:
    return x + x


def twice_by_product(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def toy(**changes: Any) -> Case:
    """1,000 numbers of 2 bytes, doubled; 4.26e6 bytes each way are two microseconds of an H200's copy rate."""
    fields: dict[str, Any] = {
        "operation": "doubling",
        "shape": "T=1,000",
        "make": lambda: (torch.randn(1000, dtype=torch.bfloat16),),
        "ours": twice,
        "definition": twice_by_product,
        "read_bytes": 4.26e6,
        "written_bytes": 4.26e6,
        "tolerance": 1e-2,
    }
    return Case(**(fields | changes))


def shown(cases: Sequence[Case], times: dict[str, float], capsys: pytest.CaptureFixture[str], **options: Any) -> str:
    report = benchmarks.ops.run(list(cases), ToldClock(times), SLOW_CARD, options.get("seconds", 60.0))
    benchmarks.ops.show(report)
    return " ".join(capsys.readouterr().out.replace("│", " ").split()) + f" exit {report.status}"


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_a_red_check_is_refused_and_not_timed(capsys: pytest.CaptureFixture[str], error: float) -> None:
    def wrong(x: torch.Tensor) -> torch.Tensor:
        return twice(x) * (1 + error)

    out = shown([toy(ours=wrong)], {}, capsys)
    assert f"refused: error {error} > 0.01" in out
    assert "1 of 1 rows were refused" in out
    assert out.endswith("exit 1")


def test_one_wrong_output_of_several_is_enough() -> None:
    def ours(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return twice(x), x * float("nan")

    assert measure.measure(toy(ours=ours, definition=lambda x: (twice(x), x)), ToldClock({}), SLOW_CARD).refused
    with pytest.raises(ValueError, match="longer"):
        measure.error_of((torch.ones(1),), (torch.ones(1), torch.ones(1)))
    with pytest.raises(ValueError, match="shape"):
        measure.error_of(torch.ones(2), torch.ones(1))


def test_whole_numbers_are_compared_one_by_one() -> None:
    assert measure.error_of(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.25


def test_the_definition_gets_wide_copies_that_nothing_writes_to() -> None:
    seen: list[torch.Tensor] = []

    def definition(x: torch.Tensor, rest: tuple[torch.Tensor, int]) -> torch.Tensor:
        seen.extend((x, rest[0]))
        return 2 * x

    def ours(x: torch.Tensor, rest: tuple[torch.Tensor, int]) -> torch.Tensor:
        output = 2 * x
        x.fill_(float("nan"))
        rest[0].fill_(-1)
        return output

    inputs = torch.randn(5, dtype=torch.bfloat16), (torch.arange(3), 7)
    assert measure.check(toy(make=lambda: inputs, ours=ours, definition=definition)) == 0
    assert [x.dtype for x in seen] == [torch.float32, torch.int64]
    assert torch.equal(seen[1], torch.arange(3))


def test_ratios_compare_with_ours_and_quoted_times_are_scaled_to_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    def peer(x: torch.Tensor) -> torch.Tensor:
        return x

    case = toy(timed_definition=twice_by_product, peers={"peer": peer, "absent": None}, quoted=("elsewhere", 10.0))
    out = shown([case], {"twice": 8e-6, "twice_by_product": 80e-6, "peer": 16e-6}, capsys)
    # Half an H200's copy rate: the floor is 4 us, the quoted 10 us are 20.
    assert "T=1,000 8 80 (10.00 x) peer 16 (2.00 x); elsewhere 20* (2.50 x) 4 2.00 met: peer (0.50 x)" in out
    assert "absent" not in out
    assert out.endswith("exit 0")


@pytest.mark.parametrize(
    ("goal", "verdict"), [(2.5, "met: 2.5 x floor (2.00 x)"), (1.5, "missed: 1.5 x floor (2.00 x)")]
)
def test_the_goal_is_a_multiple_of_the_floor(capsys: pytest.CaptureFixture[str], goal: float, verdict: str) -> None:
    assert verdict in shown([toy(goal=goal, quoted=("elsewhere", 1.0))], {"twice": 8e-6}, capsys)


def test_a_row_that_products_bound_is_scaled_by_their_rate() -> None:
    case = toy(flops=SLOW_CARD.bf16 * 1e-3, quoted=("elsewhere", 2000.0))
    row = measure.measure(case, ToldClock({"twice": 3e-3}), SLOW_CARD)
    assert row.floor == (pytest.approx(1e-3), "bf16")
    assert row.quoted == ("elsewhere", pytest.approx(2e-3))
    assert row.goal == ("elsewhere* (1.50 x)", False)


def test_bytes_that_are_only_read_go_at_the_read_rate() -> None:
    floor = measure.floor_of(toy(read_bytes=3e6, written_bytes=1e6), SLOW_CARD)
    assert floor.seconds == pytest.approx(2e6 / SLOW_CARD.copy + 2e6 / SLOW_CARD.read)
    floor = measure.floor_of(toy(read_bytes=0, written_bytes=1e6), SLOW_CARD)
    assert floor.seconds == pytest.approx(1e6 / SLOW_CARD.copy)


def test_a_peer_that_fails_spoils_no_row_and_ours_does(capsys: pytest.CaptureFixture[str]) -> None:
    def peer(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("[not] built")

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    out = shown([toy(peers={"peer": peer})], {"twice": 8e-6}, capsys)
    assert "peer did not run: RuntimeError: [not] built exit 0" in out
    out = shown([toy(timed_definition=peer)], {"twice": 8e-6}, capsys)
    assert "the definition did not run: RuntimeError" in out
    out = shown([toy(ours=broken)], {}, capsys)
    assert "refused: the check failed: RuntimeError: no such kernel" in out.replace(
        " the check failed", " the check failed"
    )
    assert out.endswith("exit 1")


@pytest.mark.parametrize(
    ("numbers", "memory", "sets"), [(10, 1e9, 64), (10**7, 1e9, 10), (10**7, 1e8, 5), (10**7, 1, 1)]
)
def test_the_timed_calls_take_turns_with_inputs_that_no_cache_holds(numbers: int, memory: float, sets: int) -> None:
    made = torch.empty(numbers, dtype=torch.bfloat16)
    case = toy(make=lambda: (made,), read_bytes=2 * numbers, written_bytes=0)
    assert len(measure.input_sets(case, memory)) == sets


def test_rows_that_the_time_does_not_reach_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown([toy(), toy(shape="T=7")], {}, capsys, seconds=0.0)
    assert "Not measured, the time was over: doubling, T=1,000; doubling, T=7" in out


def test_every_figure_is_written(tmp_path: Path) -> None:
    file = tmp_path / "ops.json"
    benchmarks.ops.run([toy(goal=3.0)], ToldClock({"twice": 8e-6}), SLOW_CARD, 60.0, file, {"card": "none"})
    record = json.loads(file.read_text())
    assert record["machine"] == {"card": "none"}
    assert record["rates"]["copy"] == SLOW_CARD.copy
    (row,) = record["rows"]
    assert (row["operation"], row["ours"], row["goal"]) == ("doubling", [8e-6, True], ["3 x floor (2.00 x)", True])


def test_without_a_gpu_the_benchmark_says_so_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmarks.ops.main([]) == 2
    assert benchmarks.ops.main(["--only", "no such operation"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert ["needs a CUDA device" in lines[0], "no operation is called" in lines[1], len(lines)] == [True, True, 2]


def test_all_cases_can_be_listed_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks.ops.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert benchmarks.ops.found_cases()[1] == []
    for module in ("causal_conv", "gated_delta", "gated_delta_step"):
        assert f"{module}: " in listed
