"""Thresholded activation and thresholded gated unit: elementwise, fused forward and backward."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import reference
from .._backends import resolve
from .._schemas import HANDLES
from . import _checks
from ._autograd import once_differentiable

GRADS = ("masked", "ste")


def cats_activation(
    z: torch.Tensor,
    threshold: float | torch.Tensor,
    *,
    activation: str = "silu",
    inclusive: bool = False,
    grad: str = "masked",
    backend: str | None = None,
) -> torch.Tensor:
    r"""The activation with its small values set to zero (CATS, arXiv 2404.08763, section 3): a = f(z) where |f(z)| > t, else 0.

    The comparison is made in float32 on the unrounded activation; NaN counts as active and propagates.

    Args:
        z: pre-activation [..., I], float32, bfloat16, float16 (float64 on the reference backend).
        threshold: float, or float32 tensor of shape [], [1] or [I] (one per channel). Negative: everything is active.
        activation: "silu", "gelu_tanh", "gelu" (exact) or "relu".
        inclusive: keep values that equal the threshold (the paper's test); the default drops them (its code's test).
        grad: "masked" stops the gradient at dead entries, "ste" passes it straight through.
        backend: "native", "triton", "reference", or None to choose.

    Returns:
        a [..., I] in z's dtype. The threshold receives no gradient.

    Raises:
        TypeError: wrong type or dtype of `z` or `threshold`.
        ValueError: wrong threshold shape or device, NaN threshold, unknown option, backend that cannot run.

    Example:
        >>> import torch, subquad
        >>> subquad.cats_activation(torch.tensor([-2.0, 0.1, 3.0]), 0.25)
        tensor([0.0000, 0.0000, 2.8577])
    """
    _checks.tensor("z", z)
    code = _checks.activation_code(activation)
    _checks.flag("inclusive", inclusive)
    straight_through = bool(_checks.choice("grad", grad, GRADS))
    if z.dim() == 0:
        raise ValueError("z: expected at least one dimension, got a scalar")
    t = _checks.threshold(threshold, z.shape[-1], z.device)
    name = resolve("cats_activation", z.device.type, backend)
    if name == "reference" or torch._C._are_functorch_transforms_active():
        return reference.cats_activation.cats_activation(
            z.contiguous(), t, activation=activation, inclusive=inclusive, grad=grad
        )
    _checks.not_double("z", z, name)
    flat = z.reshape(math.prod(z.shape[:-1]), z.shape[-1]).contiguous()
    if z.requires_grad and torch.is_grad_enabled():
        a = _Activation.apply(flat, t, code, inclusive, straight_through, name)
    else:
        a = HANDLES[name]["cats_activation_fwd"](flat, t, code, inclusive)
    return a.view(z.shape)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: torch.Tensor, t: torch.Tensor, code: int, inclusive: bool, ste: bool, backend: str
    ) -> torch.Tensor:
        ctx.save_for_backward(z, t)
        ctx.options = (code, inclusive, ste)
        ctx.backend = backend
        return HANDLES[backend]["cats_activation_fwd"](z, t, code, inclusive)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_a: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, t = ctx.saved_tensors
        grad_z = HANDLES[ctx.backend]["cats_activation_bwd"](grad_a.contiguous(), z, t, *ctx.options)
        return grad_z, None, None, None, None, None
