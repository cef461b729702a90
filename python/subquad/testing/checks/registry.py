"""The table of generic checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
        slow: takes more than ten seconds.
        applies: which ops the law is about.
    """

    name: str
    run: Callable[[Case], None]
    backends: tuple[str, ...] = BACKENDS
    per_dtype: bool = False
    slow: bool = False
    applies: Callable[[OpSpec], bool] = lambda spec: True


KERNELS = tuple(b for b in BACKENDS if b != "reference")
CHECKS: dict[str, Check] = {}


def check(
    backends: tuple[str, ...] = BACKENDS,
    *,
    per_dtype: bool = False,
    slow: bool = False,
    applies: Callable[[OpSpec], bool] = lambda spec: True,
) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Register a function as a generic check under its own name."""

    def register(function: Callable[[Case], None]) -> Callable[[Case], None]:
        CHECKS[function.__name__] = Check(function.__name__, function, backends, per_dtype, slow, applies)
        return function

    return register
