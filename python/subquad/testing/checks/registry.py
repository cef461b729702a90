"""The table of generic checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..._backends import BACKENDS
from ..case import Case
from ..spec import OpSpec


@dataclass(frozen=True)
class Check:
    """A law that every op must obey.

    Attributes:
        name: how it appears in test ids and in `OpSpec.missing` ("check:<name>").
        run: raises AssertionError (or whatever the op raises) when the law is broken.
        backends: where it says something.
        per_dtype: whether to run it for every dtype of the spec, or for float32 alone.
        memory: about addresses and orders, which a kernel's source has alike for all dtypes of one width: interpreter and
            emulator, which are slow, run it for the first dtype of each width.
        heavy: compiles or exports, which takes seconds: not in the quick lane.
        slow: takes more than ten seconds.
        applies: which ops the law is about.
    """

    name: str
    run: Callable[[Case], None]
    backends: tuple[str, ...] = BACKENDS
    per_dtype: bool = False
    memory: bool = False
    heavy: bool = False
    slow: bool = False
    applies: Callable[[OpSpec], bool] = lambda spec: True

    def dtypes(self, backend: str, dtypes: Sequence[torch.dtype]) -> tuple[torch.dtype, ...]:
        """Those of the dtypes for which to run it on a backend."""
        if not self.per_dtype:
            return tuple(dtypes[:1])
        if self.memory and backend in SIMULATED:
            return tuple({d.itemsize: d for d in reversed(dtypes)}.values())[::-1]
        return tuple(dtypes)


SIMULATED = ("triton", "simt")  # on a CPU: by an interpreter and an emulator
KERNELS = tuple(b for b in BACKENDS if b != "reference")
CHECKS: dict[str, Check] = {}


def check(
    backends: tuple[str, ...] = BACKENDS,
    *,
    per_dtype: bool = False,
    memory: bool = False,
    heavy: bool = False,
    slow: bool = False,
    applies: Callable[[OpSpec], bool] = lambda spec: True,
) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Register a function as a generic check under its own name."""

    def register(function: Callable[[Case], None]) -> Callable[[Case], None]:
        CHECKS[function.__name__] = Check(
            function.__name__, function, backends, per_dtype, memory, heavy, slow, applies
        )
        return function

    return register
