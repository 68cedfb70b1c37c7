"""What a run tells: JSON lines, TensorBoard scalars, a plot of the loss."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from qwen3_next.train.checkpoint import storage_errors

Row = Mapping[str, float | int]

_LOG, _PLOT, _BOARD = "log.jsonl", "loss.png", "tensorboard"


class RunLog:
    """Writes every row to `log.jsonl` and TensorBoard; rows after the step that a run continues from are dropped.

    Raises:
        StorageError: the disk refuses a row, here or in any method.
    """

    def __init__(self, directory: Path, from_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # here, because importing it takes seconds

        self.path = directory / _LOG
        with storage_errors(self.path):
            directory.mkdir(parents=True, exist_ok=True)
            _drop_after(self.path, from_step)
            self._file = self.path.open("a", encoding="utf-8")
        with storage_errors(directory / _BOARD):
            self._board = SummaryWriter(str(directory / _BOARD), purge_step=from_step + 1)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in (self._file, self._board):
            if error is None:
                with storage_errors(self.path.parent):
                    stream.close()
            else:
                with suppress(OSError):  # a full disk refuses this as well; the first error is the one to report
                    stream.close()

    def note(self, event: str, details: Mapping[str, Any]) -> None:
        """Something that is said once: the settings, the parameter groups."""
        self._write({"event": event, **details})

    def row(self, step: int, values: Row) -> None:
        """The figures of a step."""
        self._write({"step": step, **values})
        with storage_errors(self.path.parent / _BOARD):
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def _write(self, record: Mapping[str, Any]) -> None:
        with storage_errors(self.path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()


class SilentLog(AbstractContextManager["SilentLog"]):
    """The log of a rank that writes none."""

    def __exit__(self, *error: object) -> None:
        pass

    def note(self, event: str, details: Mapping[str, Any]) -> None:
        """Nothing."""

    def row(self, step: int, values: Row) -> None:
        """Nothing."""


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """All rows that carry a step."""
    path = directory / _LOG
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if _is_whole(line)]
    return [record for record in records if "step" in record]


def plot_losses(directory: Path) -> Path:
    """Draw training and validation losses over the tokens seen into `loss.png`.

    Raises:
        StorageError: the disk refuses it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, because importing it takes a second
    from matplotlib.figure import Figure

    rows = read_rows(directory)
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="tokens seen (millions)", ylabel="loss (nats per token)", title="Training")
    for name in sorted({key for row in rows for key in row if _is_plotted(key)}):
        points = [(row["tokens"] / 1e6, row[name]) for row in rows if name in row]
        (line,) = axes.plot(*zip(*points, strict=True), label=name, linewidth=0.8)
        if name.startswith("validation/"):
            line.set(marker="o", linestyle="--")
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    with storage_errors(directory / _PLOT):
        figure.savefig(directory / _PLOT, dpi=120)
    return directory / _PLOT


def _is_plotted(name: str) -> bool:
    per_token = not name.endswith("per_byte") and name not in ("loss/total", "loss/balance")
    return per_token and name.startswith(("loss/", "validation/"))


def _drop_after(path: Path, step: int) -> None:
    """Keep what was said up to a step, nothing where a run begins anew; a kill leaves the old file or the new one."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines() if step else []
    kept = [line for line in lines if _is_whole(line) and json.loads(line).get("step", 0) <= step]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    partial.replace(path)


def _is_whole(line: str) -> bool:
    """A kill can leave half a line behind."""
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False
