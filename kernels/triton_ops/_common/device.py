"""What the device at hand is and offers, for launchers that choose tiles by it; the interpreter stands for sm_90.

`subquad gpu-report` puts an architecture in the device's place, so that what it compiles is what a launch there would be.
"""

from __future__ import annotations

import functools
from typing import Any

import triton
from triton.runtime.jit import constexpr_function

from .numerics import INTERPRET

# What stands for a precision of tl.dot where AMD has no matrix instructions of that name.
_HIP_PRECISIONS = {"tf32": "bf16x3", "tf32x3": "bf16x6"}


def _target() -> Any:
    return None if INTERPRET.value else triton.runtime.driver.active.get_current_target()


def generation() -> int:
    """8, 9, 10 or 12 for sm_8x to sm_12x; 0 for AMD."""
    target = _target()
    return 9 if target is None else target.arch // 10 if target.backend == "cuda" else 0


def shared_memory() -> int:
    """Bytes of shared memory that one block may have."""
    return 227 * 1024 if INTERPRET.value else _shared_memory(triton.runtime.driver.active.get_current_device())


@functools.cache
def _shared_memory(device: Any) -> int:
    return triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]


def precision(name: str) -> str:
    """The input precision for tl.dot that stands for `name`."""
    target = _target()
    if target is None or target.backend == "cuda" or (name == "tf32" and target.arch == "gfx942"):
        return name
    return _HIP_PRECISIONS.get(name, name)


precision.__triton_builtin__ = True  # type: ignore[attr-defined]  # else constexpr functions may not call it


@constexpr_function
def tf32x3():
    """`precision("tf32x3")`, within kernels."""
    return precision("tf32x3")


def register_limit(registers: int | None) -> dict[str, int]:
    """The option that keeps a kernel below so many registers per thread, where the compiler has one."""
    return {} if registers is None or generation() == 0 else {"maxnreg": registers}


__all__ = ["generation", "precision", "register_limit", "shared_memory", "tf32x3"]
