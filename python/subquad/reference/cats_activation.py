r"""Thresholded activation and thresholded gated unit, as CATS defines them (arXiv 2404.08763, section 3).

With gate pre-activation $z$, activation $f$ and threshold $t$:

$$ s = f(z), \qquad m = \lnot(|s| \le t), \qquad a = m\,?\,s : 0, \qquad h = m\,?\,s u : 0 . $$

The test is the negation of "at most", so NaN counts as active and stays visible. `inclusive` keeps ties ($m = \lnot(|s| < t)$,
the paper's $\ge$). $s$ is compared in float32 (float64 for float64 input), never after rounding to a narrower type.
Gradients: `masked` passes nothing through a dead entry; `ste` passes $\partial s/\partial z$ everywhere (straight-through).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._common import upcast

ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")


def activate(z: torch.Tensor, activation: str) -> torch.Tensor:
    """The dense activation, elementwise."""
    if activation == "silu":
        return F.silu(z)
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if activation == "gelu":
        return F.gelu(z)
    return F.relu(z)


def active_mask(s: torch.Tensor, threshold: torch.Tensor, inclusive: bool) -> torch.Tensor:
    """True where |s| exceeds the threshold (or ties, when inclusive) or is NaN."""
    magnitude = s.abs()
    return ~(magnitude < threshold) if inclusive else ~(magnitude <= threshold)


def _live(mask: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value` with dead entries set to 0 before it is used: after, their gradient would be 0 * Inf = NaN."""
    return torch.where(mask, value, torch.zeros_like(value))


def _select(mask: torch.Tensor, value: torch.Tensor, passed: torch.Tensor | None) -> torch.Tensor:
    """`value` where active, exactly 0 elsewhere; `passed` is what the dead entries let the gradient see, if anything."""
    if passed is None:
        return torch.where(mask, value, torch.zeros_like(value))
    finite = torch.where(torch.isfinite(passed), passed, torch.zeros_like(passed))
    return torch.where(mask, value, finite - finite.detach())


def cats_activation(
    z: torch.Tensor, threshold: torch.Tensor, *, activation: str = "silu", inclusive: bool = False, grad: str = "masked"
) -> torch.Tensor:
    """a = select(active, f(z), 0); z [..., I], threshold [] or [1] or [I]; result in z's dtype."""
    wide_z = upcast(z)
    mask = active_mask(activate(wide_z.detach(), activation), threshold, inclusive)
    a = activate(_live(mask, wide_z), activation)
    return _select(mask, a, activate(wide_z, activation) if grad == "ste" else None).to(z.dtype)


def cats_glu(
    z: torch.Tensor,
    u: torch.Tensor,
    threshold: torch.Tensor,
    *,
    activation: str = "silu",
    inclusive: bool = False,
    grad: str = "masked",
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """h = select(active, f(z) * u, 0); z, u [..., I]; result in u's dtype. `mask` replaces the threshold test."""
    wide_z, wide_u = upcast(z), upcast(u)
    if mask is None:
        mask = active_mask(activate(wide_z.detach(), activation), threshold, inclusive)
    h = activate(_live(mask, wide_z), activation) * _live(mask, wide_u)
    return _select(mask, h, activate(wide_z, activation) * wide_u.detach() if grad == "ste" else None).to(u.dtype)
