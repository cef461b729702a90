"""Many new tokens of a `SinkKVCache`: attention over intervals of the cache, put in order, and the tokens behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import _checks
from ..masks import IntervalMask
from ..ops import _call
from ..ops._autograd import without_autocast
from ..ops._sink_checks import check_states, check_tokens, count_of
from ..ops.interval_attention import interval_attention
from . import _sink_moves as moves

if TYPE_CHECKING:
    from .sink import SinkKVCache


def attend(
    cache: SinkKVCache,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    m: torch.Tensor | None,
    together: bool,
    scale: float | None,
    sink_logits: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of `sink_attention_step`, over the tokens that the cache's share has; writes nothing.

    Keys lie in columns: S + W for the cache, then the new ones. With n tokens in the cache, token j >= S has column
    S + W + j - n. The sinks come first or, while they are not complete, directly before the new tokens: a query sees two runs.
    Of a share, S, W, n and j count its tokens.
    """
    q, k, v = _call.autocast(q, k, v, to=cache.sink_k)
    if torch.is_grad_enabled():
        for name, x in (("q", q), ("k", k), ("v", v), ("sink_logits", sink_logits)):
            _checks.no_gradient(name, x, "call it under torch.no_grad(), or train with sink_attention")
    check_tokens(q, k, v)
    check_states(k, v, cache.sink_k, cache.sink_v, cache.ring_k, cache.ring_v, cache.k_scale, cache.v_scale)
    m = None if m is None else count_of(m, k)
    sinks, window, width, seen = cache.sink_tokens, cache.window, k.shape[1], cache.seen[:, None]
    share, first, n = cache.share, cache.sink_k.shape[2], cache.share.count(seen)
    before, column = first + share.most(window), torch.arange(width, device=k.device)
    place = torch.arange(before, device=k.device)
    number = torch.where((place < first) & (n >= first), place, n - before + place)
    number = torch.where((number < first) | (number >= share.count(cache._oldest())[:, None]), number, -1)
    token, entering = share.token(number), share.token(n + torch.arange(share.most(width), device=k.device))
    count = torch.full_like(seen, width) if m is None else m.clamp(0, width)[:, None]
    fresh, real = seen + column, column < count
    last = (seen + count - 1).expand_as(fresh) if together else fresh
    near = torch.maximum(last + 1 - window, cache.first[:, None]).clamp_min(sinks)  # the oldest token in the window
    start = torch.where(n >= first, 0, before - n)
    runs = [(start.expand_as(last), start + share.count((last + 1).clamp_max(sinks)))] if sinks else []
    runs.append((before - n + share.count(near), before - n + share.count(last + 1)))
    ok = torch.stack([real & (a < b) for a, b in runs], -1)
    end = before + entering.shape[1]
    starts, ends = (
        torch.where(ok, torch.stack([run[side] for run in runs], -1), end).int()[:, None] for side in (0, 1)
    )
    gone = torch.maximum(last + 1 - sinks - window, cache.first[:, None] - sinks).clamp_min(0)
    rope, base = cache.rope, gone[:, :1]
    turned = rope is not None and sinks > 0 and cache.positions == "cache"
    # Sinks are turned on by what the first new token has forgotten, and the queries of later ones back by the rest: a number
    # below the chunk's length at any position of the stream.
    behind, ahead = (torch.where((x < sinks) & (x >= 0), base * turned, 0) for x in (token, entering))
    if share.size > 1:
        k, v = (moves.columns(x, share.columns(seen, width)) for x in (k, v))
    with torch.no_grad(), without_autocast(q.device.type):
        held = moves.rows(cache, "k", number)
        if rope is not None:
            if cache.key_rope == "pre" or turned:
                held = rope.rotate(held, (behind + token if cache.key_rope == "pre" else behind)[:, None])
            q, k = (
                rope.rotate(q, fresh[:, :, None], rope.attention_scaling**2),
                rope.rotate(k, (entering + ahead)[:, :, None]),
            )
        keys = torch.cat([held.transpose(1, 2).to(k.dtype), k], 1)
        values = torch.cat([moves.rows(cache, "v", number).transpose(1, 2).to(v.dtype), v], 1)
        shift = None
        if turned and not together:
            shift = torch.stack([base - gone, torch.zeros_like(gone)], -1).int()[:, None]
        mask = IntervalMask._raw(starts, ends, end, shift)
        result = interval_attention(
            q, keys, values, mask, scale=scale, sink_logits=sink_logits, return_lse=True,
            q_shift=None if shift is None else rope, backend=cache.backend,
        )  # fmt: skip
    assert isinstance(result, tuple)
    return result[0], result[1].masked_fill(~real[..., None], -torch.inf)
