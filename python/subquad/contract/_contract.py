"""What an op states about itself: `Operator` and `Contract`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Operator:
    """One operator, the same in every namespace.

    Attributes:
        args: its schema after the name. Argument order is the contract of every backend.
        fake: shapes and dtypes of its results; results are contiguous unless it says otherwise.
        outputs: names of its results, in order.
        backward: the operator of its gradients. That one's arguments are matched by name: `grad_<output>`, an output, an
            argument of the forward, or what only the backward needs, which `ops._call.run` is given apart.
        differentiable: arguments that have gradients, in the order of the backward's first results.
        switches: results that exist only where an argument, a bool, is true. Their gradients are left out elsewhere.
        strided: arguments whose last dimension has to be dense while the other strides are free. All others are made contiguous
            before the call, but those `as_given`.
        as_given: arguments that the kernels read, or write, with any strides.
        cuda, triton: whether CUDA C++ and Triton have it.
    """

    args: str
    fake: Callable[..., Any]
    outputs: tuple[str, ...] = ("out",)
    backward: str | None = None
    differentiable: tuple[str, ...] = ()
    switches: Mapping[str, str] = field(default_factory=dict)
    strided: tuple[str, ...] = ()
    as_given: tuple[str, ...] = ()
    cuda: bool = True
    triton: bool = True


@dataclass(frozen=True)
class Contract:
    """One op: everything about it that is no mathematics. `contract/<stem>.py` holds it as `CONTRACT`.

    Attributes:
        operators: by name, each `<stem>_fwd`, `<stem>_bwd` or, in place, `<stem>_`, or so beginning with the family's name.
        cpu, cuda: backends in the order of preference when nobody asks for one; the first that can run is taken.
        few, cuda_few: calls of at most `few` tokens that need no gradients prefer `cuda_few` on a GPU instead.
        dtypes: what the kernels take.
        missing: backends that do not exist at all, with the reason.
        trained_by: the op that gradients are made of, beside dense products, where there is no backward operator.
        family: the paper, where it has several ops and their names do not say so.
    """

    operators: Mapping[str, Operator]
    cpu: tuple[str, ...] = ("native", "reference")
    cuda: tuple[str, ...] = ("triton", "native", "reference")
    few: int = 0
    cuda_few: tuple[str, ...] = ("native", "triton", "reference")
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    missing: Mapping[str, str] = field(default_factory=dict)
    trained_by: str | None = None
    family: str | None = None

    def preference(self, device: str, few: bool = False) -> tuple[str, ...]:
        """The order on a device, "cpu" or "cuda"; `few`: of a call within `self.few`."""
        return self.cpu if device == "cpu" else self.cuda_few if few else self.cuda


def new_like(tensor: torch.Tensor) -> torch.Tensor:
    """What kernels return for a tensor of the same kind: contiguous whatever the strides of the argument."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def new_like_or_empty(tensor: torch.Tensor | None, of: torch.Tensor) -> torch.Tensor:
    """The gradient of an argument that may be left out: then it has no elements."""
    return of.new_empty((0,)) if tensor is None else new_like(tensor)
