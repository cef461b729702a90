"""What tests and programs of several ranks have in common: errors, and of programs a line for each claim."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

LIMIT = 2e-6  # of the largest value, in float32
failed = 0


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def error(found: torch.Tensor, expected: torch.Tensor, largest: torch.Tensor | None = None) -> float:
    """The largest difference, relative to the largest value expected, or of another tensor."""
    found, expected = whole(found).double(), whole(expected).double()
    assert found.shape == expected.shape
    if not found.numel():
        return 0.0
    scale = (expected if largest is None else whole(largest)).abs().max().double()
    return float((found - expected).abs().max() / scale.clamp_min(1e-30))


def same(found: torch.Tensor, expected: torch.Tensor, exact: Callable[[], torch.Tensor], limit: float = LIMIT) -> bool:
    """Whether `found` is what one process has, to a limit. Where terms cancel, or many layers hand roundings on, one process is
    farther than that from the numbers in float64, `exact`; then `found` may be twice as far from these as it is."""
    found, expected = whole(found).double(), whole(expected).double()
    assert found.shape == expected.shape
    if not found.numel() or (found - expected).abs().max() <= limit * expected.abs().max().clamp_min(1e-6):
        return True
    truth = whole(exact()).double()
    return bool((found - truth).abs().max() <= 2 * (expected - truth).abs().max())


def begin() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))


def claim(name: str, value: float, limit: float) -> None:
    """The largest of all ranks is below a limit."""
    global failed
    worst = torch.tensor([value], dtype=torch.float64).nan_to_num(torch.inf)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    failed += not float(worst) <= limit
    if dist.get_rank() == 0:
        print("ok" if float(worst) <= limit else "FAIL", f"{name}: {float(worst):.1e}", flush=True)


def holds(name: str, fact: bool) -> None:
    """On all ranks."""
    claim(name, float(not fact), 0.5)


def end() -> None:
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(failed > 0)  # gloo's threads end some processes with an abort while Python unwinds
