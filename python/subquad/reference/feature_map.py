r"""Feature maps of linear attention, with a learned projection per head (LoLCATs, arXiv 2410.10254; Hedgehog, 2402.04347).

With $x \in \mathbb{R}^d$ and a weight $W_h \in \mathbb{R}^{d \times f}$ for every head ($y = x$ without one):

$$ y = x W_h, \qquad \phi(x) = \max([\,g(y),\, g(-y)\,],\ \varepsilon) . $$

| kind | $g(y)$ |
| --- | --- |
| softmax | $e^{y_j} / \sum_i e^{y_i}$, each half by itself |
| exp | $e^{y}$ |
| relu | $\max(y, 0)$ |
| elu1 | $y + 1$ where $y > 0$, else $e^{y}$; not clamped, it is positive by itself |
| hedgehog2 | softmax over $[y, -y]$ together, so that all $2f$ features sum to 1 |

`fullspace=False` keeps the first half alone. y is not rounded between the product and the map. An entry that is clamped
has no gradient.
"""

from __future__ import annotations

import torch

from ._common import upcast

KINDS = ("softmax", "exp", "relu", "elu1", "hedgehog2")


def _half(y: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "softmax":
        return torch.softmax(y, -1)
    if kind == "exp":
        return torch.exp(y)
    if kind == "relu":
        return torch.relu(y)
    return torch.where(y > 0, y + 1, torch.exp(torch.where(y > 0, torch.zeros_like(y), y)))


def feature_map(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    kind: str = "softmax",
    fullspace: bool = True,
    eps: float = 1e-12,
) -> torch.Tensor:
    """phi(x) [B, T, H, 2f], or [B, T, H, f] without `fullspace`; x [B, T, H, d], weight [H, d, f]; in x's dtype."""
    y = upcast(x)
    if weight is not None:
        y = torch.einsum("bthd,hdf->bthf", y, upcast(weight))
    if kind == "hedgehog2":
        features = torch.softmax(torch.cat([y, -y], -1), -1)
    else:
        features = torch.cat([_half(y, kind), _half(-y, kind)], -1) if fullspace else _half(y, kind)
    if kind != "elu1":
        features = torch.where(features < eps, torch.full_like(features, eps), features)
    return features.to(x.dtype)
