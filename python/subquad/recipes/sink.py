"""StreamingLLM: the first tokens and a window, at positions as a rolling cache has them."""

from __future__ import annotations

import torch

from .. import _checks
from .._packing import Packed
from ..masks import IntervalMask
from ..ops.interval_attention import interval_attention
from ..rope import RopeSpec, check_rope


def sink_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sink_tokens: int = 4,
    window: int | None = 1020,
    sink_logits: torch.Tensor | None = None,
    scale: float | None = None,
    block: int = 1,
    q_shift: RopeSpec | None = None,
    pad: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | Packed | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Attention to the first tokens of a sequence and to a window, for training and prompts (StreamingLLM, arXiv 2309.17453).

    Token i sees token j if j < sink_tokens or i - window < j, and j <= i. Work is proportional to what is seen, and every call is
    differentiable in q, k, v and sink_logits. Three things are called sinks: `sink_tokens` are real tokens that are never
    forgotten, `sink_logits` a term of the softmax, and the sink of videos is `block` with sinks that are frames.

    With `q_shift` the result is that of a cache that gives its tokens the positions 0, 1, 2, ... anew at every step: distances
    stay below sink_tokens + window, which the model has been trained on, however long the sequence is. Tokens of the window
    keep their distance then, and the query is turned back for the sinks by as many positions as tokens are forgotten.

    Args:
        q: queries [B, Tq, Hq, D], as in `interval_attention`; the last query is that of the last key.
        k: keys [B, Tk, Hkv, D], Tk >= Tq, rotated like q at the positions of the tokens in their sequence.
        v: values [B, Tk, Hkv, Dv].
        sink_tokens: S, of every sequence.
        window: W, keys up to the query's own, which counts; None for all, where attention is causal.
        sink_logits: [Hq], one more term exp(sink_logits[h]) of the softmax denominator (gpt-oss).
        scale: factor of the scores; None for D ** -0.5.
        block: tokens that are generated together: all see up to the end of their block, and the window ends there (LongLive).
        q_shift: the rotation of q and k, for positions in the cache; None: positions as they are.
        pad: int [B], columns before the first token of each sequence, which are no tokens. Padding at the end needs no word:
            tokens do not see it.
        cu_seqlens: [N + 1], bounds of sequences in a batch of one, Tq = Tk.
        return_lse: also return the log-sum-exp of the scores, sink logit included.
        backend: as in `interval_attention`.

    Returns:
        out [B, Tq, Hq, Dv] in q's dtype; with `return_lse`, (out, lse) with lse [B, Tq, Hq] float32. Rows that are padding, and
        those of nothing to see, are 0.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: shapes or devices that do not fit, negative sizes, fewer keys than queries, `pad` with `cu_seqlens` or not
            in 0..Tk.

    Example:
        >>> import torch, subquad
        >>> q, k, v = (torch.randn(1, 40, 2, 8) for _ in range(3))
        >>> subquad.sink_attention(q, k, v, sink_tokens=2, window=6).shape
        torch.Size([1, 40, 2, 8])
    """
    for name, x in (("q", q), ("k", k)):
        _checks.tensor(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name}: expected shape [B, T, H, D], got {list(x.shape)}")
    tq, tk = q.shape[1], k.shape[1]
    _checks.size("sink_tokens", sink_tokens)
    _checks.size("block", block, 1)
    if window is not None:
        _checks.size("window", window)
    if tk < tq:
        raise ValueError(f"k: expected at least {tq} keys, as many as queries, got {tk}")
    check_rope("q_shift", q_shift)
    if q_shift is not None and q_shift.rotary_dim > q.shape[3]:
        raise ValueError(f"q_shift: expected rotary_dim <= {q.shape[3]}, the head dimension, got {q_shift.rotary_dim}")
    sinks, width = min(sink_tokens, tk), tk if window is None else min(window, tk)
    turned = q_shift is not None and sinks > 0 and sinks + width < tk
    if block == 1 and pad is None and cu_seqlens is None and not turned:
        mask = IntervalMask.sink(sinks, width, tq, tk)
    else:
        mask = _mask(_begin(q, tk, pad, cu_seqlens), tq, tk, sinks, width, block, turned)
    return interval_attention(
        q, k, v, mask, scale=scale, sink_logits=sink_logits, q_shift=q_shift if turned else None,
        return_lse=return_lse, backend=backend,
    )  # fmt: skip


def _begin(
    q: torch.Tensor, tk: int, pad: torch.Tensor | None, cu_seqlens: torch.Tensor | Packed | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the sequence of every row: its first column and the one behind its last, int64 [B|1, Tq|1]."""
    if cu_seqlens is not None:
        if pad is not None:
            raise ValueError("pad: expected None beside cu_seqlens, got both")
        if q.shape[1] != tk:
            raise ValueError(f"k: expected {q.shape[1]} keys as there are queries, beside cu_seqlens, got {tk}")
        packed = Packed.of(cu_seqlens, q)
        edges, row = packed.int64, packed.sequence.long()
        return edges[row][None], edges[row + 1][None]
    if pad is None:
        first = torch.zeros(1, 1, dtype=torch.int64, device=q.device)
    else:
        _checks.integers("pad", pad, 1)
        _checks.same_device("pad", pad, q.device, "q")
        if pad.shape[0] != q.shape[0]:
            raise ValueError(f"pad: expected shape [{q.shape[0]}], got {list(pad.shape)}")
        if _checks.readable(pad) and any(not 0 <= n <= tk for n in pad.tolist()):
            raise ValueError(f"pad: expected numbers in 0..{tk}, got {_checks.shown(pad.tolist())}")
        first = pad.long().clamp(0, tk)[:, None]  # where values are not read: never outside the keys
    return first, torch.full_like(first, tk)


def _mask(
    begin: tuple[torch.Tensor, torch.Tensor], tq: int, tk: int, sinks: int, window: int, block: int, turned: bool
) -> IntervalMask:
    """What every row sees, and with `turned` how far its query is turned back for the sinks."""
    first, stop = begin
    token = torch.arange(tk - tq, tk, device=first.device) - first  # of the row, in its sequence
    last = torch.minimum((token // block + 1) * block, stop - first)  # tokens up to the end of its block
    last = torch.where(token < 0, 0, last)
    near = (last - window).clamp_min(sinks)
    spans = [(torch.zeros_like(last), last.clamp_max(sinks)), (near, last)] if sinks else [(near, last)]
    seen = torch.stack([begin < end for begin, end in spans], -1)
    starts, ends = (
        torch.where(seen, torch.stack([span[side] + first for span in spans], -1), tk).int()[:, None] for side in (0, 1)
    )
    if not turned:
        return IntervalMask._raw(starts, ends, tk)
    forgotten = (last - sinks - window).clamp_min(0)
    shift = torch.stack([-forgotten, torch.zeros_like(forgotten)], -1).int()
    return IntervalMask._raw(starts, ends, tk, shift[:, None])
