r"""A causal convolution and the feature map of its result, as LAWCAT (arXiv 2509.18467) does with queries and keys.

$$ y = \mathrm{conv}(x), \qquad \phi = \max([\,g(y W_h),\, g(-y W_h)\,],\ \varepsilon) , $$

with the convolution of `causal_conv1d` over the channels of all heads and the map of `feature_map` on every head. y is rounded
nowhere. Of the H heads that the convolution makes, H / M in a row share one of the M matrices $W$.
"""

from __future__ import annotations

import torch

from ._common import upcast
from .causal_conv1d import causal_conv1d
from .feature_map import feature_map


def conv_feature_map(
    x: torch.Tensor,
    conv_weight: torch.Tensor,
    fm_weight: torch.Tensor,
    conv_bias: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    *,
    silu: bool = False,
    kind: str = "softmax",
    fullspace: bool = True,
    eps: float = 1e-12,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(phi [B, T, H, 2f or f], final state [N, Hx d, W-1]) in x's dtype.

    x [B, T, Hx, d], conv_weight [H d, W], fm_weight [M, d, f], conv_bias [H d], initial_state [N, Hx d, W-1].
    """
    maps, width = fm_weight.shape[:2]
    heads = conv_weight.shape[0] // width
    bias = None if conv_bias is None else upcast(conv_bias)
    state = None if initial_state is None else upcast(initial_state)
    groups = heads // max(1, x.shape[2])
    flat = upcast(x).flatten(2)
    y, final = causal_conv1d(flat, upcast(conv_weight), bias, state, None, cu_seqlens, groups, width, silu)
    weight = upcast(fm_weight).repeat_interleave(heads // max(1, maps), 0)
    phi = feature_map(y.unflatten(2, (heads, width)), weight, kind=kind, fullspace=fullspace, eps=eps)
    return phi.to(x.dtype), final.to(x.dtype)
