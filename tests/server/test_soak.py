"""The checks of benchmarks/soak.py for half a minute, and every operation with random data; fresh each time."""

import asyncio
import random

from benchmarks.soak import fuzz, overload, serving, soak

SOAK_SECONDS, FUZZ_SECONDS = 8, 15
"""Together with the start and the overload about 30 seconds."""


def test_a_server_under_load_and_under_any_data_answers_everyone_and_keeps_nothing() -> None:
    number = random.SystemRandom().getrandbits(32)
    print(f"seed {number}")
    with serving("--dtype", "float32", "--sequences", "8", "--max-waiting", "24", "--max-model-len", "512") as server:
        checks = asyncio.run(soak(server, SOAK_SECONDS, 30, 10, random.Random(number)))
        checks |= asyncio.run(overload(server, 32, is_timed=False))
        checks |= fuzz(server, FUZZ_SECONDS, number)
    assert [name for name, is_green in checks.items() if not is_green] == []
