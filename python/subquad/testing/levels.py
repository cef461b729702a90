"""CPU instruction sets under test: native kernels are compiled once per level, and every level is run."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from .. import _native


@functools.cache
def levels() -> tuple[str, ...]:
    """The levels to test, weakest first: what CPU and build have, up to the level in use when this is first called.

    The native library is built if need be; nothing where it cannot be.
    """
    if _native.load("_C", build=True) is not None:
        return ()
    every, in_use = _native.cpu_isas(), _native.cpu_isa()
    return tuple(every[: every.index(str(in_use)) + 1])


@contextmanager
def at_level(level: str | None, instead: str | None = None) -> Iterator[None]:
    """Native CPU kernels run at this level inside the block; None leaves the level alone.

    `instead`: another level whose kernels may run.

    Raises:
        ValueError: when CPU or build lack the level.
        AssertionError: at the end, when kernels of another level ran.
    """
    if level is None:
        yield
        return
    before = _native.cpu_isa()
    if not _native.set_cpu_isa(level):
        raise ValueError(f"level: expected one of {', '.join(_native.cpu_isas())}, got {level!r}")
    _native.cpu_isas_ran()  # what ran before is another's business
    try:
        yield
    finally:
        _native.set_cpu_isa(str(before))
    others = _native.cpu_isas_ran() - {level, instead}
    if others:
        raise AssertionError(f"kernels of {', '.join(sorted(others))} ran instead of {level}")
