"""Ranks as threads of one process: torch's threaded process group, which needs no launcher."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

T = TypeVar("T")


def on_ranks(size: int, body: Callable[[int], T]) -> list[T]:
    """body(rank) on every rank; their results, or the first error."""
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

    threads = [threading.Thread(target=main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _uninstall_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(False)
    if errors:
        raise errors[0]
    return results  # type: ignore[return-value]


def caught(body: Callable[[], Any]) -> str:
    """The message of what it raises."""
    try:
        body()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
