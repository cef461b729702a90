r"""One token of a LAWCAT layer (arXiv 2509.18467) between its projections: convolution, feature map, gate, state, output.

With $q_0, k_0$ the projected token, $[\cdot]$ the last $W - 1$ of them before it, and key head $j$ of state head $s$:

$$ q = \phi(c_q * [q_0]), \qquad k_s = \phi(c_{k,s} * [k_{0,j}]), \qquad a = \exp(\max(\log\sigma(u) / \tau,\, m)) , $$
$$ S \leftarrow \mathrm{diag}(a) S + k v^\top, \qquad z \leftarrow a z + k, \qquad
   o = \frac{\mathrm{scale}\; q^\top S}{\mathrm{scale}\; q^\top z + \varepsilon} . $$

Nothing is rounded on the way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._common import upcast
from .causal_conv1d import causal_conv1d
from .feature_map import feature_map
from .gated_linear_attention import gated_linear_attention


def lawcat_decode_step(
    q0: torch.Tensor,
    k0: torch.Tensor,
    v: torch.Tensor,
    u: torch.Tensor | None,
    cq: torch.Tensor,
    ck: torch.Tensor,
    cq_bias: torch.Tensor | None,
    ck_bias: torch.Tensor | None,
    wphi: torch.Tensor,
    wphi_k: torch.Tensor,
    conv_q: torch.Tensor,
    conv_k: torch.Tensor,
    state: torch.Tensor,
    z: torch.Tensor | None,
    state_indices: torch.Tensor | None,
    silu: bool,
    tau: float,
    clamp_min: float,
    scale: float,
    eps: float,
    fm_eps: float,
) -> tuple[torch.Tensor, ...]:
    """(o, conv_q, conv_k, state, z), new pools in place of changed ones, without z where there is none.

    Shapes as in `subquad.lawcat_decode_step`, but cq [HQ d, W] and ck [HS d, W].
    """
    rows = (
        torch.arange(q0.shape[0], device=q0.device) if state_indices is None else (state_indices >= 0).nonzero()[:, 0]
    )
    places = rows if state_indices is None else state_indices[rows].long()
    d = q0.shape[2]

    def convolved(x: torch.Tensor, taps: torch.Tensor, bias: torch.Tensor | None, past: torch.Tensor) -> torch.Tensor:
        """The last token [B, 1, D] of [past, x], with its heads repeated as the taps have them."""
        wide = upcast(x[rows]).flatten(1)[:, None]
        groups = taps.shape[0] // wide.shape[2]
        y, _ = causal_conv1d(
            wide,
            upcast(taps),
            None if bias is None else upcast(bias),
            upcast(past[places]),
            None,
            None,
            groups,
            d,
            silu,
        )
        return y.unflatten(2, (-1, d))

    def features(x: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        """phi of x [B, 1, H, d], head h through map h * maps // H."""
        return feature_map(x, upcast(maps).repeat_interleave(x.shape[2] // maps.shape[0], 0), eps=fm_eps)

    q = features(convolved(q0, cq, cq_bias, conv_q), wphi)
    k = features(convolved(k0, ck, ck_bias, conv_k), wphi_k)
    gate = None
    if u is not None:
        gate = (F.logsigmoid(upcast(u[rows])) / tau).clamp_min(clamp_min)[:, None]
    values = upcast(v[rows])[:, None]
    z0 = None if z is None else z[places]
    o, s, sums = gated_linear_attention(q, k, values, gate, state[places], z0, None, scale, eps, z is not None)
    out = q0.new_zeros(*q0.shape[:2], v.shape[2]).index_put((rows,), o[:, 0].to(q0.dtype))

    def moved(pool: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        token = x[rows].flatten(1)[..., None].to(pool.dtype)
        return pool.index_put((places,), torch.cat([pool[places], token], 2)[:, :, 1:])

    after = [moved(conv_q, q0), moved(conv_k, k0), state.index_put((places,), s.to(state.dtype))]
    if z is not None and sums is not None:
        after.append(z.index_put((places,), sums.to(z.dtype)))
    return (out, *after)
