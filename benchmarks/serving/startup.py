"""From a fresh process to the first token, with an empty and with a full cache of compiled kernels.

The weights are random and drawn on the device, which stands for reading them.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.serving.rows import Row


def startup(settings: Mapping[str, object], layers: int, device: str, quantization: str, dtype: str) -> Iterator[Row]:
    """Two processes, one after the other, with one cache of kernels that is empty for the first."""
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            asked = json.dumps([settings, layers, device, quantization, dtype])
            environment = os.environ | {"TRITON_CACHE_DIR": cache}
            begin = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.serving.startup", asked],
                env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            whole = time.perf_counter() - begin
            if done.returncode:
                raise RuntimeError(f"the process that was to start an engine failed:\n{done.stderr[-2000:]}")
            parts = json.loads(done.stdout.splitlines()[-1])
            shown = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in parts.items())
            yield Row(
                work=f"start-up, {name}",
                note=f"{sum(parts.values()):.1f} s to the first token ({shown}), in all {whole:.1f} s, {layers} layers",
                figures=parts,
            )


def main(arguments: Sequence[str]) -> None:
    """Start an engine in this process and print the seconds of each part."""
    parts, last = dict[str, float](), time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        parts[name], last = time.perf_counter() - last, time.perf_counter()

    from benchmarks.serving.setting import Setting, first_token, random_model

    lap("imports")
    settings, layers, device, quantization, dtype = json.loads(arguments[0])
    setting = Setting(random_model(settings, layers, device, quantization, dtype))
    lap("weights")
    engine = setting.engine()
    lap("engine and graphs")
    first_token(engine, setting.prompt(100))
    lap("first token")
    print(json.dumps(parts))


if __name__ == "__main__":
    main(sys.argv[1:])
