r"""New tokens attend to sinks, to a window in a ring, and to each other, and enter the cache: the definition.

A sequence has the tokens 0, 1, 2, ... The first S stay, those behind them live in a ring of R places: token $j \ge S$ in place
$(j - S) \bmod R$. With $n$ tokens in the cache, $m$ new ones and $\bar\imath = i$ (all new ones together:
$\bar\imath = n + m - 1$), the new token $i \in [n, n + m)$ sees

$$ j \le \bar\imath \quad\text{and}\quad (j < S \;\text{ or }\; \bar\imath - j < W,\; j \ge \mathrm{first}) , $$

and $E_i = \max(0,\ \bar\imath + 1 - S - W,\ \mathrm{first} - S)$ tokens between sinks and window are forgotten. Positions in the
cache are $c_i(j) = j$ for sinks and $j - E_i$ for the others, the query included (StreamingLLM, arXiv 2309.17453, section 3.2).
With $R(\cdot)$ the rotation by a position, a group,

$$ \langle R(c_i(i))\, q,\ R(c_i(j))\, k \rangle = \langle R(i)\, q, R(j)\, k \rangle \ (j \ge S), \qquad
   \langle R(i - E_i)\, q, R(j)\, k \rangle \ (j < S) , $$

so what is kept is one rotation per query and key, whatever was forgotten. The softmax has the term exp(sink logit) more.
The equations hold for finite numbers, and kernels rotate by other positions of the same distance: a score that is not finite
is NaN.
"""

from __future__ import annotations

import math

import torch

from ._common import upcast
from .interval_attention import _product as weighted

INT8_MAX, FP8_MAX = 127.0, 448.0


def rotate(x: torch.Tensor, positions: torch.Tensor, turns: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [..., D] with its first 2 f elements rotated by `positions`, turns int64 [f] in units of 2^-64 per position."""
    phase = positions.long()[..., None] * turns  # wraps modulo one turn
    angle = (phase >> 11).double() * (2 * math.pi / 2.0**53)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    width = 2 * turns.shape[0]
    turned, rest = x[..., :width], x[..., width:]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    rotated = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([rotated, rest], -1)


def quantised(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., D] in int8 or float8 and its scale [...]: the largest magnitude of a row is the largest number of the type."""
    most = INT8_MAX if dtype is torch.int8 else FP8_MAX
    scale = (x.float().abs().amax(-1) / most).masked_fill(x.eq(0).all(-1), 1.0)
    ratio = (x.float() / scale[..., None]).nan_to_num(0.0, 0.0, 0.0).clamp(-most, most)
    return (ratio.round() if dtype is torch.int8 else ratio).to(dtype), scale


def token_of_place(n: torch.Tensor, sinks: int, ring: int) -> torch.Tensor:
    """The token in every place of the ring when there are n [B]: int64 [B, R], -1 where there never was one."""
    place, last = torch.arange(ring, device=n.device), (n - 1 - sinks)[:, None]
    token = sinks + last - (last - place) % ring
    return torch.where(last < place, -1, token)


def sink_attention_step(
    k: torch.Tensor,
    v: torch.Tensor,
    q: torch.Tensor | None,
    sink_k: torch.Tensor,
    sink_v: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    seen: torch.Tensor,
    written: torch.Tensor,
    first: torch.Tensor,
    tokens: torch.Tensor | None,
    sink_logits: torch.Tensor | None,
    turns: torch.Tensor | None,
    window: int,
    scale: float,
    rotary_scale: float,
    interleaved: bool,
    rotated: bool,
    absolute: bool,
    together: bool,
    advance: bool,
) -> tuple[object, ...]:
    """((out, lse), then the states after it, from sink_k to written): shapes as in `subquad.sink_attention_step`."""
    batch, width = k.shape[:2]
    seen = seen.clamp_min(0)
    sinks, ring = sink_k.shape[2], ring_k.shape[2]
    count = torch.full_like(seen, width) if tokens is None else tokens.long().clamp(0, width)
    column = torch.arange(width, device=k.device)
    fresh, real = seen[:, None] + column, column < count[:, None]  # the new tokens [B, T], those that are some
    entering = upcast(k)
    if rotated and turns is not None:
        entering = rotate(entering, fresh[:, :, None], turns, interleaved)
    result: tuple[torch.Tensor, torch.Tensor]
    if q is None:
        result = (v.new_zeros((batch, width, 0, v.shape[3])), upcast(k).new_zeros((batch, width, 0)))
    else:
        held_k, held_v = (
            torch.cat([upcast(s), upcast(r) if c is None else r.to(upcast(s).dtype) * c[..., None]], 2).transpose(1, 2)
            for s, r, c in ((sink_k, ring_k, k_scale), (sink_v, ring_v, v_scale))
        )
        in_ring = token_of_place(seen, sinks, ring)
        in_ring = torch.where(in_ring < first[:, None], -1, in_ring)
        in_sinks = torch.arange(sinks, device=k.device).expand(batch, -1)
        in_sinks = torch.where(in_sinks < seen[:, None], in_sinks, -1)
        key = torch.cat([in_sinks, in_ring, torch.where(real, fresh, -1)], 1)  # the token of each key, or -1
        last = (fresh if not together else (seen + count - 1)[:, None].expand_as(fresh))[:, :, None]
        keep = (key >= 0)[:, None] & (key[:, None] <= last) & ((key < sinks)[:, None] | (last - key[:, None] < window))
        keep = keep & real[:, :, None]
        gone = torch.maximum((last[..., 0] + 1 - sinks - window).clamp_min(0), (first[:, None] - sinks).clamp_min(0))
        keys = torch.cat([held_k, entering], 1)
        near = far = upcast(q)
        if turns is not None:
            if not rotated:
                keys = rotate(keys, key.clamp_min(0)[:, :, None], turns, interleaved)
            near = torch.cat([near[..., : 2 * turns.shape[0]] * rotary_scale, near[..., 2 * turns.shape[0] :]], -1)
            back = torch.zeros_like(gone) if absolute else gone
            far = rotate(near, (fresh - back)[:, :, None], turns, interleaved)
            near = rotate(near, fresh[:, :, None], turns, interleaved)
        result = _attend(
            near, far, keys, torch.cat([held_v, upcast(v)], 1), (key < sinks)[:, None] & keep, keep, sink_logits, scale
        )
        result = (
            result[0].masked_fill(~real[:, :, None, None], 0.0),
            result[1].masked_fill(~real[:, :, None], -torch.inf),
        )
    out = result[0].to(v.dtype), result[1]
    states = _written(entering, v, (sink_k, sink_v, ring_k, ring_v), (k_scale, v_scale), seen, count)
    after = seen + count
    return (out, *states, after if advance else seen.clone(), torch.maximum(written, after))


def _attend(
    near: torch.Tensor,
    far: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    is_sink: torch.Tensor,
    keep: torch.Tensor,
    sink_logits: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of queries [B, T, Hq, D], `far` for sinks, over keys [B, N, Hkv, D]; masks [B, T, N]."""
    groups = near.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.where(
        is_sink[:, None], torch.einsum("bthd,bshd->bhts", far, k), torch.einsum("bthd,bshd->bhts", near, k)
    )
    keep = keep[:, None].expand_as(scores)
    scores = scores * scale
    scores = torch.where(scores.isfinite(), scores, torch.nan).masked_fill(~keep, -torch.inf)
    if sink_logits is not None:
        column = sink_logits.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], 3)
    elif scores.shape[3] == 0:
        scores = torch.cat([scores, scores.new_full((*scores.shape[:3], 1), -torch.inf)], 3)
    lse = torch.logsumexp(scores, -1)
    p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])[..., : k.shape[1]]
    return weighted(p, v, keep), lse.transpose(1, 2)


def _written(
    k: torch.Tensor,
    v: torch.Tensor,
    held: tuple[torch.Tensor, ...],
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
    seen: torch.Tensor,
    count: torch.Tensor,
) -> list[torch.Tensor]:
    """Sinks, rings and the scales that there are, with the new tokens in their places."""
    sink_k, sink_v, ring_k, ring_v = held
    sinks, ring, (batch, width) = sink_k.shape[2], ring_k.shape[2], k.shape[:2]
    in_sinks = torch.arange(sinks, device=k.device).expand(batch, -1)
    in_ring = token_of_place(seen + count, sinks, ring)

    def put(place: torch.Tensor, token: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Of places [B, H, P, ...] and new tokens [B, T, H, ...]: the places after it, given the token of each [B, P]."""
        column = token - seen[:, None]
        enters = ((column >= 0) & (column < count[:, None]))[:, None].expand(place.shape[:3])
        if width == 0:
            return place.clone()
        taken = x.transpose(1, 2).gather(2, _like(column.clamp(0, width - 1)[:, None], place))
        return torch.where(_like(enters, place), taken.to(place.dtype), place)

    sink_k, sink_v = put(sink_k, in_sinks, k), put(sink_v, in_sinks, v)
    rings, factors = [], []
    for x, places, factor in ((k, ring_k, scales[0]), (v, ring_v, scales[1])):
        if factor is not None:
            x, fresh = quantised(x, places.dtype)
            factors.append(put(factor, in_ring, fresh))
            x, held_as = x.float(), places.float()  # float8 knows neither gather nor where; the round trip is exact
            rings.append(put(held_as, in_ring, x).to(places.dtype))
        else:
            rings.append(put(places, in_ring, x))
    return [sink_k, sink_v, *rings, *factors]


def _like(index: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """index [B, 1|H, P] with the shape of `of`, [B, H, P] or [B, H, P, D]."""
    return (index if of.dim() == 3 else index[..., None]).expand(of.shape)
