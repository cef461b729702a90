"""Gated linear attention, token by token, as it is defined."""

from __future__ import annotations

import torch


def gated_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    s0: torch.Tensor | None,
    z0: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    eps: float,
    normalize: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    r"""The recurrence of gated linear attention (GLA, arXiv 2312.06635; LAWCAT, arXiv 2509.18467), per state head:

        S_t = diag(exp g_t) S_{t-1} + k_t v_t^T        z_t = exp(g_t) z_{t-1} + k_t
        o_t = scale q_t^T S_t / (scale q_t^T z_t + eps)          (without `normalize` the numerator alone)

    Computed in float32, in float64 for float64 inputs. Shapes as in `subquad.gated_linear_attention`; q may have no heads.

    Returns:
        (o, S, z), z None without `normalize`.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    gate_heads = () if g is None else (g.shape[2],)
    states = max(k.shape[2], v.shape[2], *gate_heads)
    queries = q.to(wide).unflatten(2, (states, q.shape[2] // states))
    keys, values = (_per_state(x.to(wide), states) for x in (k, v))
    decay = None
    if g is not None:
        decay = _per_state((g if g.dim() == 4 else g.unsqueeze(-1)).to(wide), states).exp()
    count = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    empty = keys.new_zeros(count, states, k.shape[3], v.shape[3])
    s0 = empty if s0 is None else s0.to(wide)
    z0 = empty[..., 0] if z0 is None else z0.to(wide)
    if q.shape[1] == 0:
        nothing = sum(x.sum().to(wide) for x in (q, k, v, g) if x is not None)
        o = nothing * values.new_zeros(*q.shape[:3], v.shape[3])
        return o.to(q.dtype), s0.clone(), z0.clone() if normalize else None
    s, z, outputs, history = s0, z0, [], []
    if cu_seqlens is not None:
        tokens = torch.arange(q.shape[1], device=q.device)
        sequence = torch.searchsorted(cu_seqlens, tokens, right=True) - 1
        first = cu_seqlens[sequence] == tokens
        s, z = s0[:1] * 0, z0[:1] * 0
    for t in range(q.shape[1]):
        if cu_seqlens is not None:
            s, z = (torch.where(first[t], x0[sequence[t : t + 1]], x) for x0, x in ((s0, s), (z0, z)))
        if decay is not None:
            s, z = s * decay[:, t].unsqueeze(-1), z * decay[:, t]
        s = s + keys[:, t].unsqueeze(-1) * values[:, t].unsqueeze(-2)
        z = z + keys[:, t]
        o = scale * torch.einsum("bsgk,bskv->bsgv", queries[:, t], s)
        if normalize:
            o = o / (scale * torch.einsum("bsgk,bsk->bsg", queries[:, t], z) + eps).unsqueeze(-1)
        outputs.append(o)
        history.append((s, z))
    if cu_seqlens is not None:
        ends, some = cu_seqlens[1:], cu_seqlens[1:] > cu_seqlens[:-1]
        last = (ends - 1).clamp_min(0)
        s = torch.where(some[:, None, None, None], torch.cat([x[0] for x in history])[last], s0)
        z = torch.where(some[:, None, None], torch.cat([x[1] for x in history])[last], z0)
    return torch.stack(outputs, 1).flatten(2, 3).to(q.dtype), s, z if normalize else None


def gated_linear_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    state: torch.Tensor,
    z: torch.Tensor | None,
    state_indices: torch.Tensor | None,
    scale: float,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    """(o, state, z): one token of the recurrence per row, new pools in place of changed ones, without z where there is none.

    Shapes as in `subquad.gated_linear_attention_step`.
    """
    rows = torch.arange(q.shape[0], device=q.device) if state_indices is None else (state_indices >= 0).nonzero()[:, 0]
    places = rows if state_indices is None else state_indices[rows].long()
    q1, k1, v1 = (x[rows].unsqueeze(1) for x in (q, k, v))
    g1 = None if g is None else g[rows].unsqueeze(1)
    z0 = None if z is None else z[places]
    found = gated_linear_attention(q1, k1, v1, g1, state[places], z0, None, scale, eps, z is not None)
    o = q.new_zeros(*q.shape[:2], v.shape[2]).index_put((rows,), found[0].squeeze(1))
    after = [state.index_put((places,), found[1].to(state.dtype))]
    if z is not None and found[2] is not None:
        after.append(z.index_put((places,), found[2].to(z.dtype)))
    return (o, *after)


def _per_state(x: torch.Tensor, states: int) -> torch.Tensor:
    """State head s reads head s * heads // states."""
    return x.repeat_interleave(states // x.shape[2], dim=2)
