"""Softmax attention of every query to a list of spans of its own."""

from __future__ import annotations

import torch

from .. import _checks
from ..contract.span_attention import MAX_HEAD_DIM
from ..masks import IntervalMask
from ..reference import span_attention as reference
from ..superlinear import SuperlinearConfig, scale_of
from . import _call, _spans
from .interval_attention import interval_attention
from .span_search import config_of


def span_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    *,
    config: SuperlinearConfig | None = None,
    gate: torch.Tensor | None = None,
    joint: bool = False,
    cache_position: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Attention to S spans of keys per query and head, wherever a selector has put them: Superlinear, MoBA, NSA, ...

    Work is proportional to the keys in the spans; nothing of size [T, N] exists on any backend but "reference". Spans may
    overlap, within a query too, and hold any number of keys. Differentiable in q, k, v and gate.

    Three ways to combine the spans of a query:

    - by default not at all: the softmax of each, and its log-sum-exp, by which `subquad.combine_spans` mixes them;
    - `gate`: sum_s gate_s * softmax_s (Superlinear), without a tensor of all slots;
    - `joint`: one softmax over all of them (MoBA, NSA's selected blocks). A key counts as often as spans hold it.

    Args:
        q: queries [B, T, H, D], float32, bfloat16, float16 (float64 on the reference backend), D in 1..256; any strides.
        k: keys [B, N, Hkv, D]; Hkv divides H.
        v: values [B, N, Hkv, Dv], Dv in 1..256.
        start, end: int32 or int64 [B, T, H, S], the first and the last key of each span, both seen; empty where end < start. What
            lies outside 0..N-1 is left out.
        config: with one, every softmax also covers the window of `config.window_len()` keys up to the query's own, which no
            span may reach into; None for spans alone.
        gate: float [B, T, H, S].
        joint: see above; not with `gate`.
        cache_position: int [T] or [B, T], the key of each query, for the window; None: the last T keys.
        attention_mask: bool [B, >= N], True for tokens; other keys are not seen.
        scale: factor of the scores; None for the config's, or D ** -0.5.
        backend: "native", "triton", "reference", or None to choose.

    Returns:
        (out, lse): [B, T, H, S, Dv] in q's dtype and [B, T, H, S] float32; with `gate` out is [B, T, H, Dv]; with `joint` out is
        [B, T, H, Dv] and lse [B, T, H]. What sees nothing is 0 and -inf.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: shapes or devices that do not fit, a scale that is not finite, `gate` with `joint`, a backend that cannot run.

    Example:
        >>> import torch, subquad
        >>> q, k, v = (torch.randn(1, 6, 2, 8) for _ in range(3))
        >>> start = torch.zeros(1, 6, 2, 3, dtype=torch.int32)
        >>> out, lse = subquad.span_attention(q, k, v, start, start + 1)
        >>> out.shape, lse.shape
        (torch.Size([1, 6, 2, 3, 8]), torch.Size([1, 6, 2, 3]))
    """
    q, k, v = _call.autocast(q, k, v)
    keys = check_attention(q, k, v)
    start, end = check_spans(start, end, q)
    spans = start.shape[3]
    _checks.flag("joint", joint)
    if gate is not None:
        if joint:
            raise ValueError("joint: expected False with a gate, got True")
        gate = check_gate(gate, start)
    if scale is not None:
        scale = float(_checks.number("scale", scale))
    elif config is not None:
        scale = scale_of(config_of(config), q.shape[3])
    else:
        scale = float(q.shape[3] ** -0.5)
    mask = _spans.key_mask(attention_mask, q.shape[0], keys, q.device)
    base_out = base_lse = seen = None
    if config is not None or cache_position is not None:
        used = config_of(config)
        reached = _spans.reach(used, q.shape[0], q.shape[1], keys, q.device, cache_position, mask)
        seen = None if config is None else _spans.window_mask(used, reached, keys, mask)
    if seen is not None:
        base_out, base_lse = window(q, k, v, seen, scale, backend)
    if gate is None and not joint:  # a head for every slot
        q = q.repeat_interleave(spans, 2)
        start, end = (x.flatten(2)[..., None] for x in (start, end))
        if base_out is not None and base_lse is not None:
            base_out, base_lse = base_out.repeat_interleave(spans, 2), base_lse.repeat_interleave(spans, 2)
    out, lse = attend(q, k, v, start, end, gate, base_out, base_lse, mask, None, scale, backend)
    if gate is not None:
        return out, lse
    if joint:
        return out, lse[..., 0]
    return out.unflatten(2, (-1, spans)), lse[..., 0].unflatten(2, (-1, spans))


def window(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: IntervalMask,
    scale: float,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of every query's window, as `_spans.window_mask` makes it."""
    result = interval_attention(q, k, v, seen, scale=scale, return_lse=True, backend=backend)
    assert isinstance(result, tuple)
    return result


def span_window(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: SuperlinearConfig,
    reached: _spans.Reach,
    mask: torch.Tensor | None,
    block_table: torch.Tensor | None,
    scale: float,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as one span of every query, which pages need; for few queries, as it makes no mask and splits long spans."""
    start = torch.maximum(reached.position - (config.window_len() - 1), reached.first)
    start, end = (x[..., None, None].expand(*q.shape[:3], 1) for x in (start, reached.position))
    out, lse = attend(q, k, v, start, end, None, None, None, mask, block_table, scale, backend)
    return out, lse[..., 0]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    gate: torch.Tensor | None,
    base_out: torch.Tensor | None,
    base_lse: torch.Tensor | None,
    mask: torch.Tensor | None,
    block_table: torch.Tensor | None,
    scale: float,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator, with arguments that have been checked: (out [B, T, H, Dv], lse [B, T, H, S with a gate, else 1]).

    `base_out` and `base_lse` are another softmax of the same queries, which every slot's covers too.
    """
    if block_table is not None and torch.is_grad_enabled():
        for name, x in (("q", q), ("k", k), ("v", v)):
            _checks.no_gradient(name, x, "pages are for decoding")
    arguments = (q, k, v, start, end, gate, base_out, base_lse, mask, block_table, scale)
    result: tuple[torch.Tensor, torch.Tensor] = _call.run(
        "span_attention_fwd", backend, arguments, reference.span_attention, tokens=q.shape[1]
    )
    return result


# --- checks ----------------------------------------


def check_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_table: torch.Tensor | None = None) -> int:
    """q, k and v fit each other; the number of keys."""
    _spans.check_heads("q", q, limit=MAX_HEAD_DIM)
    dtypes = [getattr(x, "dtype", None) for x in (k, v)]
    if dtypes[0] is dtypes[1] in _checks.FLOAT_DTYPES and q.dtype is not dtypes[0]:
        raise TypeError(f"q: expected {dtypes[0]} as k and v have, got {q.dtype}")
    keys = _spans.check_keys("k", k, q, "q", block_table, MAX_HEAD_DIM)
    _spans.check_heads("v", v, q, "q", MAX_HEAD_DIM)
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: expected shape [{', '.join(map(str, k.shape[:3]))}, Dv] as k has, got {list(v.shape)}")
    return keys


def check_spans(start: object, end: object, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 [B, T, H, S]."""
    spans = _checks.integers("start", start, 4)
    others = _checks.integers("end", end, 4)
    if spans.shape[:3] != q.shape[:3] or not spans.shape[3]:
        expected = f"[{', '.join(map(str, q.shape[:3]))}, S] with at least one span"
        raise ValueError(f"start: expected shape {expected}, got {list(spans.shape)}")
    if others.shape != spans.shape:
        raise ValueError(f"end: expected shape {list(spans.shape)} as start has, got {list(others.shape)}")
    for name, x in (("start", spans), ("end", others)):
        _checks.same_device(name, x, q.device, "q")
    limit = torch.iinfo(torch.int32).max
    narrow = (x if x.dtype is torch.int32 else x.clamp(-1, limit).int() for x in (spans, others))
    return next(narrow), next(narrow)


def check_gate(gate: object, start: torch.Tensor) -> torch.Tensor:
    """float32 [B, T, H, S] (float64 stays)."""
    _checks.tensor("gate", gate)
    assert isinstance(gate, torch.Tensor)
    _checks.same_device("gate", gate, start.device, "q")
    if gate.shape != start.shape:
        raise ValueError(f"gate: expected shape {list(start.shape)} as start has, got {list(gate.shape)}")
    return gate if gate.dtype is torch.float64 else gate.float()
