"""Every test of this folder runs once per device that the machine has."""

from collections.abc import Iterator

import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module", params=DEVICES, autouse=True)
def on_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Tensors are made on the device; on a CPU, memory that nothing has written yet holds NaN."""
    device: str = request.param
    torch.use_deterministic_algorithms(device == "cpu")
    with torch.device(device):
        yield device
    torch.use_deterministic_algorithms(False)
