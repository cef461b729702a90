"""Memory that is allocated once and read whole at every step."""

from __future__ import annotations

import ctypes
import mmap

import torch

from .. import _checks

_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # where the system has it
_WORTHWHILE = 1 << 23


def zeros(*shape: int, dtype: torch.dtype | None, device: torch.device | None) -> torch.Tensor:
    """`torch.zeros`; large ones on a CPU in huge pages, where Linux gives them to who asks: reading takes less time.

    Pages are made when they are first written to, so that the advice has to come before.
    """
    x = torch.empty(shape, dtype=dtype, device=device)
    if _ADVICE is not None and x.device.type == "cpu" and x.nbytes >= _WORTHWHILE and not _checks.traced(x):
        first = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = (x.data_ptr() + x.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(whole), _ADVICE)
    return x.zero_()
