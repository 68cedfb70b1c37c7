"""Every test of this folder runs once per device that the machine has."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from tests.ops.checks import poisoned

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module", params=DEVICES, autouse=True)
def on_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Tensors are made on the device, where memory that nothing has written yet holds NaN.

    On a CPU torch's deterministic mode sees to that; on a GPU that mode would refuse operations that are used.
    """
    device: str = request.param
    torch.use_deterministic_algorithms(device == "cpu")
    with torch.device(device), nullcontext() if device == "cpu" else poisoned():
        yield device
    torch.use_deterministic_algorithms(False)
