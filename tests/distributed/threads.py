"""Ranks as threads of one process: torch's threaded process group, which needs no launcher."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

T = TypeVar("T")
LONGEST = 120.0  # seconds that ranks may take, for in this group they would wait for one that has returned for ever
MESSAGE = 10.0  # and for a message from another


def on_ranks(size: int, body: Callable[[int], T]) -> list[T]:
    """body(rank) on every rank; their results, or the first error, which all others are told of."""
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    ProcessLocalGroup.reset()
    _install_threaded_pg()
    store, results, errors = dist.HashStore(), [None] * size, []

    def main(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=size, store=store)
            results[rank] = body(rank)  # type: ignore[call-overload]
        except BaseException as problem:
            errors.append(problem)
            ProcessLocalGroup.exception_handle(problem)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    threads = [threading.Thread(target=main, args=(rank,), daemon=True) for rank in range(size)]
    until = time.monotonic() + LONGEST
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    if waiting := [rank for rank, thread in enumerate(threads) if thread.is_alive()]:
        errors.append(TimeoutError(f"ranks {waiting} still wait for others"))
        ProcessLocalGroup.exception_handle(errors[-1])
        for thread in threads:
            thread.join(MESSAGE)
    _uninstall_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(False)
    if errors:
        raise errors[0]
    return results  # type: ignore[return-value]


def taken(box: SimpleQueue[T]) -> T:
    """What another rank has put into a queue.

    Raises:
        Empty: nothing comes, or a rank has raised an error.
    """
    until = time.monotonic() + MESSAGE
    while True:
        try:
            return box.get(timeout=0.02)
        except Empty:
            if ProcessLocalGroup._terminate.is_set() or time.monotonic() > until:
                raise


def caught(body: Callable[[], Any]) -> str:
    """The message of what it raises."""
    try:
        body()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
