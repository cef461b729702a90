"""Ahead-of-time cases: the launches that `subquad gpu-report` and the tests compile without a GPU.

A module of kernels lists its cases in `AOT`. A case is a launcher and example arguments on the meta device, so what
is compiled is what a real call would compile: same specialisation, constants and options, and no second list to keep
in step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class AotCase:
    """One call of one launcher.

    Attributes:
        name: short and unique within the module, such as "bf16 row-major".
        launcher: the function to call.
        args: builds its arguments; tensors are on the meta device and have realistic shapes and strides.
        allow_spill: kernel name -> why register spills are acceptable there. A spill without a reason fails the report.
    """

    name: str
    launcher: Callable[..., Any]
    args: Callable[[], tuple[Any, ...]]
    allow_spill: Mapping[str, str] = field(default_factory=dict)


__all__ = ["AotCase"]
