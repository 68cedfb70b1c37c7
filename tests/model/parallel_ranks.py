"""Groups of processes on the CPU for tests: what ranks do is a function of this folder's tests, run on all of them."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 120


def run_ranks(count: int, function: Callable[..., Any], *arguments: Any, may_die: bool = False) -> list[Any]:
    """What a function of a module returns on each of some ranks; every exception is a string, and fails the test.

    With `may_die` it is None of a rank that was killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context, ends, processes = multiprocessing.get_context("spawn"), [], []
    for rank in range(count):
        ours, theirs = context.Pipe()
        process = context.Process(target=_rank, args=(theirs, rank, count, port, function, arguments), daemon=True)
        process.start()
        theirs.close()
        ends.append(ours)
        processes.append(process)
    results = []
    for end in ends:
        assert end.poll(SECONDS), "a rank did not end"
        try:
            results.append(end.recv())
        except EOFError:
            assert may_die, "a rank ended without a word"
            results.append((True, None))
    for process in processes:
        process.join(SECONDS)
    failed = [result for is_fine, result in results if not is_fine]
    assert not failed, "\n".join(failed)
    return [result for _, result in results]


def _rank(
    end: Connection, rank: int, count: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(count)}
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
        end.send((True, function(*arguments)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        end.send((False, traceback.format_exc()))
