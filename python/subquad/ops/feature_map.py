"""Feature maps of linear attention: a projection per head and a positive map of it, in one pass."""

from __future__ import annotations

import math

import torch

from .. import _checks, reference
from ..contract.feature_map import MAX_DIM
from ..reference.feature_map import KINDS
from . import _call


def feature_map(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    kind: str = "softmax",
    fullspace: bool = True,
    eps: float = 1e-12,
    backend: str | None = None,
) -> torch.Tensor:
    r"""phi(x) = max([g(y), g(-y)], eps) with y = x weight per head (LoLCATs, 2410.10254; Hedgehog, 2402.04347).

    The product is accumulated in float32 and not rounded before g. An entry that was clamped receives no gradient. Results in
    float16 below 6e-8, among them the default `eps`, round to 0: use bfloat16 features, or `eps=1e-7`, where a sum of
    features is divided by. Under autocast x and weight are cast as for a matrix product; without weight x stays as it is.

    Args:
        x: queries or keys [B, T, H, d], float32, bfloat16, float16 (float64 on the reference backend), d in 1..256; any strides.
        weight: [H, d, f] in x's dtype, f in 1..256, or None for y = x and f = d.
        kind: g. "softmax" over f in each half; "exp"; "relu"; "elu1" is elu(y) + 1, which is not clamped; "hedgehog2" is one
            softmax over [y, -y], which needs `fullspace`.
        fullspace: both halves, [g(y), g(-y)]; otherwise g(y) alone.
        eps: least value of a feature, finite and not negative.
        backend: "native", "triton", "reference", or None to choose.

    Returns:
        phi [B, T, H, 2f], or [B, T, H, f] without `fullspace`, in x's dtype, contiguous.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: shapes or devices that do not fit, unknown kind, an eps that is negative or not finite, "hedgehog2" without
            `fullspace`, a backend that cannot run.

    Example:
        >>> import torch, subquad
        >>> phi = subquad.feature_map(torch.zeros(1, 3, 2, 8), torch.zeros(2, 8, 4))
        >>> phi.shape, float(phi[0, 0, 0, 0])
        (torch.Size([1, 3, 2, 8]), 0.25)
    """
    if weight is not None:
        x, weight = _call.autocast(x, weight)
    _check_tensors(x, weight)
    code, eps = map_options(kind, fullspace, eps)

    def define(x: torch.Tensor, weight: torch.Tensor | None, *_: object) -> torch.Tensor:
        return reference.feature_map.feature_map(x, weight, kind=kind, fullspace=fullspace, eps=eps)

    out: torch.Tensor = _call.run("feature_map_fwd", backend, (x, weight, code, fullspace, eps), define)
    return out


def _check_tensors(x: torch.Tensor, weight: torch.Tensor | None) -> None:
    _checks.tensor("x", x)
    if x.dim() != 4:
        raise ValueError(f"x: expected shape [B, T, H, d], got {list(x.shape)}")
    if not 1 <= x.shape[3] <= MAX_DIM:
        raise ValueError(f"x: expected shape [B, T, H, d] with d in 1..{MAX_DIM}, got {list(x.shape)}")
    if weight is None:
        return
    _checks.like("weight", weight, None, x, "x")
    heads, d = x.shape[2:]
    if weight.dim() != 3 or weight.shape[:2] != (heads, d) or not 1 <= weight.shape[2] <= MAX_DIM:
        raise ValueError(
            f"weight: expected shape [{heads}, {d}, f] with f in 1..{MAX_DIM} to fit x {list(x.shape)}, "
            f"got {list(weight.shape)}"
        )


def map_options(kind: str, fullspace: bool, eps: float) -> tuple[int, float]:
    """(code of the kind, eps) after checking all three."""
    code = _checks.choice("kind", kind, KINDS)
    _checks.flag("fullspace", fullspace)
    if kind == "hedgehog2" and not fullspace:
        raise ValueError("fullspace: expected True with kind 'hedgehog2', whose softmax spans both halves, got False")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: expected a float, got {type(eps).__name__}")
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps: expected a finite number that is not negative, got {eps}")
    return code, float(eps)
