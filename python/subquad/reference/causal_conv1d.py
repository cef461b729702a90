r"""Causal depthwise convolution over time, as LAWCAT (arXiv 2509.18467) puts it on queries and keys before its feature map.

With $X$ the input of one sequence, preceded by $W-1$ raw inputs of its past (the state $s$, where there is one), and output
channel $c$ reading input channel $m(c)$:

$$ z_{t,c} = \beta_c + \sum_{j=0}^{W-1} w_{c,W-1-j}\, X_{t-j,m(c)}, \qquad y = f(z) + r. $$

with $f$ the identity or silu. A tap that reaches before the first token of its sequence reads the state; without a state there is
no such term, so neither its weight nor a neighbouring sequence can leak into the sum. $m(h d + e) = \lfloor h / G \rfloor d + e$
for $G$ = `groups` heads of width $d$ = `head_dim` that share one input head.
The final state is the last $W-1$ columns of $[s, x]$.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._common import upcast


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    groups: int = 1,
    head_dim: int = 1,
    silu: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y [B, T, D], final state [N, D/G, W-1]) in x's dtype; x [B, T, D/G], weight [D, W], initial_state [N, D/G, W-1]."""
    taps = weight.shape[1]
    wide_x, wide_w = upcast(x), upcast(weight)
    state = None if initial_state is None else upcast(initial_state)
    position, sequence = _positions(x.shape[1], cu_seqlens, x.device)
    z = wide_x.new_zeros(()) if bias is None else upcast(bias)
    for j in reversed(range(taps)):
        inside = (position >= j)[:, None]
        shifted = wide_x[:, (torch.arange(x.shape[1], device=x.device) - j).clamp_min(0)]
        w = wide_w[:, taps - 1 - j]
        if j and state is not None:
            slot = (taps - 1 - j + position).clamp_max(taps - 2)
            past = state[:, :, slot].transpose(1, 2) if cu_seqlens is None else state[sequence, :, slot]
            shifted = torch.where(inside, shifted, past)
        else:
            shifted = torch.where(inside, shifted, torch.zeros_like(shifted))
            w = torch.where(inside, w, torch.zeros_like(w))
        z = z + _repeat(shifted, groups, head_dim) * w
    y = F.silu(z) if silu else z
    if residual is not None:
        y = y + upcast(residual)
    return y.to(x.dtype), final_state(wide_x, taps, state, cu_seqlens).to(x.dtype)


def _positions(
    tokens: int, cu_seqlens: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of every token: how many tokens of its sequence precede it, and which sequence that is (None: the row of the batch)."""
    t = torch.arange(tokens, device=device)
    if cu_seqlens is None:
        return t, None
    sequence = torch.searchsorted(cu_seqlens.long(), t, right=True) - 1
    return t - cu_seqlens.long()[sequence], sequence


def _repeat(x: torch.Tensor, groups: int, head_dim: int) -> torch.Tensor:
    """[..., D/G] -> [..., D]: each head of width head_dim, `groups` times in a row."""
    return x if groups == 1 else x.unflatten(-1, (-1, head_dim)).repeat_interleave(groups, -2).flatten(-2)


def final_state(
    x: torch.Tensor, taps: int, initial_state: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """The last W-1 raw inputs of every sequence, [N, D/G, W-1]; zeros stand for a past that does not exist."""
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    before = x.new_zeros((sequences, x.shape[2], taps - 1)) if initial_state is None else initial_state
    if cu_seqlens is None:
        return torch.cat([before, x.transpose(1, 2)], 2)[:, :, x.shape[1] :]
    ends = cu_seqlens.long()[1:, None]
    column = torch.arange(taps - 1, device=x.device)
    row = ends - (taps - 1) + column  # of x, unless it lies before the sequence
    started = row >= cu_seqlens.long()[:-1, None]
    rows = torch.cat([x[0], x.new_zeros((1, x.shape[2]))])[row.clamp(0, x.shape[1])].transpose(1, 2)
    length = (cu_seqlens[1:] - cu_seqlens[:-1]).long()[:, None]
    slot = (column + length).clamp_max(max(0, taps - 2))
    past = before.gather(2, slot[:, None].expand_as(before))
    return torch.where(started[:, None], rows, past)


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
    groups: int = 1,
    head_dim: int = 1,
    silu: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y [B, s, D], new conv_state [P, D/G, L]) of x [B, s, D/G]: a continued convolution, and the state after it.

    The state is a shift register of the last L inputs, or with `cache_seqlens` a ring: input number n lives in slot n mod L.
    """
    batch, tokens = x.shape[:2]
    past, length = weight.shape[1] - 1, conv_state.shape[2]
    live = (
        torch.ones(batch, dtype=torch.bool, device=x.device) if conv_state_indices is None else conv_state_indices >= 0
    )
    rows = conv_state if conv_state_indices is None else conv_state[conv_state_indices.long().clamp_min(0)]
    new = x.transpose(1, 2)
    if cache_seqlens is None:
        history = rows[:, :, length - past :]
        rows = torch.cat([rows, new], 2)[:, :, tokens:]
    else:
        slots = (cache_seqlens.long()[:, None] + torch.arange(-past, tokens, device=x.device)) % max(1, length)
        index = slots[:, None].expand(batch, x.shape[2], past + tokens)
        history = rows.gather(2, index[:, :, :past])
        for i in range(tokens if length else 0):
            rows = rows.scatter(2, index[:, :, past + i : past + i + 1], new[:, :, i : i + 1])
    y, _ = causal_conv1d(x, weight, bias, history, residual, None, groups, head_dim, silu)
    y = torch.where(live[:, None, None], y, torch.zeros_like(y))
    if conv_state_indices is None or batch == 0:
        return y, rows if batch else conv_state.clone()
    hit = conv_state_indices.long() == torch.arange(conv_state.shape[0], device=x.device)[:, None]
    source = hit.to(torch.uint8).argmax(1)
    return y, torch.where(hit.any(1)[:, None, None], rows[source], conv_state)
