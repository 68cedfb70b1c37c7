"""What a run tells: JSON lines, TensorBoard scalars, a plot of the loss."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

Row = Mapping[str, float | int]

_LOG, _PLOT = "log.jsonl", "loss.png"


class RunLog:
    """Writes every row to `log.jsonl` and TensorBoard; rows after the step that a run continues from are dropped."""

    def __init__(self, directory: Path, from_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # here, because importing it takes seconds

        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / _LOG
        _drop_after(self.path, from_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=from_step + 1)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._board.close()

    def note(self, event: str, details: Mapping[str, Any]) -> None:
        """Something that is said once: the settings, the parameter groups."""
        self._write({"event": event, **details})

    def row(self, step: int, values: Row) -> None:
        """The figures of a step."""
        self._write({"step": step, **values})
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """All rows that carry a step."""
    path = directory / _LOG
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if "step" in record]


def plot_losses(directory: Path) -> Path:
    """Draw training and validation losses over the tokens seen into `loss.png`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, because importing it takes a second
    from matplotlib.figure import Figure

    rows = read_rows(directory)
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="tokens seen (millions)", ylabel="loss (nats per token)", title="Training")
    for name in sorted({key for row in rows for key in row if key.startswith(("loss/", "validation/"))}):
        if name.endswith("per_byte") or name in ("loss/total", "loss/balance"):
            continue
        points = [(row["tokens"] / 1e6, row[name]) for row in rows if name in row]
        style = {"marker": "o", "linestyle": "--"} if name.startswith("validation/") else {"linewidth": 0.8}
        axes.plot(*zip(*points, strict=True), label=name, **style)
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(directory / _PLOT, dpi=120)
    return directory / _PLOT


def _drop_after(path: Path, step: int) -> None:
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _is_whole(line) and json.loads(line).get("step", 0) <= step]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _is_whole(line: str) -> bool:
    """A kill can leave half a line behind."""
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False
