r"""The CATS gated MLP (arXiv 2404.08763): dense gate, threshold, and only the active neurons of up and down.

$$ z = x W_g^\top + b_g, \quad s = f(z), \quad S_n = \{i : \lnot(|s_{ni}| \le t_i)\}, \quad
   u = x W_u^\top + b_u, \quad y_n = \sum_{i \in S_n} s_{ni} u_{ni} W_d[:, i] + b_d . $$

$z$, $s$, $u$ and $h = s u$ stay in float32 (float64 for float64 input); $y$ is rounded once. A dead neuron contributes nothing:
neither its row of $W_u$ nor its column of $W_d$ can leak an Inf or NaN into the result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._common import upcast
from .cats_activation import activate, active_mask, cats_glu


def cats_mlp(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    threshold: torch.Tensor,
    *,
    b_gate: torch.Tensor | None = None,
    b_up: torch.Tensor | None = None,
    b_down: torch.Tensor | None = None,
    activation: str = "silu",
    inclusive: bool = False,
    mask_mode: str = "token",
    grad: str = "masked",
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [N, H] of x [N, H], w_gate and w_up [I, H], w_down [H, I], threshold [] or [1] or [I].

    `mask` [N, I] replaces the threshold test, so that a kernel can be judged with the mask it took itself.
    """
    bias_gate, bias_up, bias_down = (None if b is None else upcast(b) for b in (b_gate, b_up, b_down))
    wide_x = upcast(x)  # once: two casts would round x's gradient twice
    z = F.linear(wide_x, upcast(w_gate), bias_gate)
    u = F.linear(wide_x, upcast(w_up), bias_up)
    if mask is None:
        mask = active_mask(activate(z.detach(), activation), threshold, inclusive)
        if mask_mode == "union":
            mask = mask.any(0, keepdim=True).expand_as(mask)
    h = cats_glu(z, u, threshold, activation=activation, inclusive=inclusive, grad=grad, mask=mask)
    return down_product(h, upcast(w_down), bias_down, mask).to(x.dtype)


def down_product(h: torch.Tensor, w_down: torch.Tensor, bias: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor:
    """h [N, I] w_down [H, I]^T + bias over active neurons only: columns with Inf or NaN by selection, for 0 * Inf is NaN."""
    wild = ~torch.isfinite(w_down).all(0)
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if traced or wild.is_meta or isinstance(wild, torch._subclasses.FakeTensor) or not bool(wild.any()):
        return F.linear(h, w_down, bias)
    y = F.linear(h, torch.where(wild, 0.0, w_down), bias)
    for i in wild.nonzero().flatten().tolist():
        product = h[:, i : i + 1] * w_down[:, i]
        y = y + torch.where(mask[:, i : i + 1], product, torch.zeros_like(product))
    return y
