"""Thresholded activation and thresholded gated unit: elementwise, fused forward and backward."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import _checks
from ..reference import cats_activation as reference
from ..reference.cats_activation import ACTIVATIONS
from . import _call

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
    at_once: torch.Tensor | None = _call.at_once(
        "cats_activation_fwd", backend, _arguments, z, threshold, activation, inclusive, grad
    )
    if at_once is not None:
        return at_once
    _checks.tensor("z", z)
    code = _checks.choice("activation", activation, ACTIVATIONS)
    _checks.flag("inclusive", inclusive)
    straight_through = bool(_checks.choice("grad", grad, GRADS))
    if z.dim() == 0:
        raise ValueError("z: expected at least one dimension, got a scalar")
    t = _checks.threshold(threshold, z.shape[-1], z.device)

    def define(z: torch.Tensor, t: torch.Tensor, *_: object) -> torch.Tensor:
        options = {"activation": activation, "inclusive": inclusive, "grad": grad}
        return reference.cats_activation(z.contiguous(), t, **options)  # type: ignore[arg-type]

    flat = z.reshape(math.prod(z.shape[:-1]), z.shape[-1])
    arguments = (flat, t, code, inclusive)
    a: torch.Tensor = _call.run("cats_activation_fwd", backend, arguments, define, backward_only=(straight_through,))
    return a.view(z.shape)


def _arguments(z: torch.Tensor, threshold: Any, activation: Any, inclusive: Any, grad: Any) -> tuple[Any, ...]:
    """Those of the operator, unchecked but for names."""
    _checks.choice("grad", grad, GRADS)
    code = _checks.choice("activation", activation, ACTIVATIONS)
    return z, _checks.unread_threshold(threshold, z.device), code, inclusive
