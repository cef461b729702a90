"""Backward functions: without a second derivative, and outside autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Nothing in the block is cast again: kernels and references accumulate in float32."""
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


def autocasts(device: str) -> bool:
    """Whether torch's products on this type of device are under autocast."""
    return device != "meta" and torch.is_autocast_enabled(device)


class _Raise(torch.autograd.Function):
    """Hands its first `count` tensors through; differentiating them with respect to any of the tensors raises."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        raise RuntimeError("the op is once_differentiable: its backward kernel has no derivative of its own")


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a second derivative raise.

    torch's decorator of the same name returns gradients without history when the upstream gradient is a constant, and connects
    its error to no input, so that a gradient penalty is left out silently. Here the error hangs on everything that was saved.
    A backward that is called under autocast computes what it computes outside.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: torch.Tensor) -> Any:
        device = next(grad.device.type for grad in grads if grad is not None)
        # A compiler may trace the backward apart from the autocast that it will run under.
        always = torch.compiler.is_compiling() and device != "meta"
        with torch.no_grad(), torch.autocast(device, enabled=False) if always else without_autocast(device):
            outputs = backward(ctx, *grads)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return outputs
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return _Raise.apply(len(outputs), *outputs, *grads, *ctx.saved_tensors)

    return wrapper
