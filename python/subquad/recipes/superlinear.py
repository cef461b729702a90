"""Superlinear attention: a search, a window and spans, mixed by a gate that trains the search."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import _checks
from .._packing import Packed
from ..cache.superlinear import SuperlinearKVCache
from ..contract import CONTRACTS
from ..masks import IntervalMask
from ..ops import _call, _spans
from ..ops.span_attention import attend, check_attention, span_window, window
from ..ops.span_search import SpanSearch, config_of, search
from ..reference.span_attention import mix
from ..superlinear import SuperlinearConfig, scale_of, warn_of_gaps


class SuperlinearAux(NamedTuple):
    """What `superlinear_attention` has done on its way.

    Attributes:
        search: the spans, see `SpanSearch`.
        gate: float32 [B, T, H, num_spans], the weights of the slots, which sum to 1.
        lse: float32 [B, T, H, num_spans], log-sum-exp of each slot's scores, those of the window among them.
    """

    search: SpanSearch
    gate: torch.Tensor
    lse: torch.Tensor


def superlinear_attention(
    q_search: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    config: SuperlinearConfig | None = None,
    search_keys: torch.Tensor | None = None,
    cache_position: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | Packed | None = None,
    return_aux: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, SuperlinearAux]:
    r"""Causal attention to a window and to spans that every head of every query chooses (Superlinear, arXiv 2601.18401).

    out = sum_s g_s softmax(sm_scale * q k^T over span s and the window) v, with g the softmax of the search scores of the
    chosen anchors. Work grows as T ** (1 + max(power, span_power)). Differentiable in q_search, q, k, v and search_keys: the
    search learns through g. A row is the same, but for rounding, whether it comes alone, in a chunk or in a whole prompt: a chunk
    is a call with its queries, the keys of all tokens so far and, where k is longer than that, `cache_position`;
    `superlinear_attention_step` does so with a cache.

    Args:
        q_search: queries of the search [B, T, H, D], rotated like q where k is.
        q: queries [B, T, H, D], float32, bfloat16, float16 (float64 on the reference backend), D in 1..256; any strides.
        k: keys [B, N, Hkv, D]; Hkv divides H.
        v: values [B, N, Hkv, Dv], Dv in 1..256.
        config: see `SuperlinearConfig`; None for its defaults.
        search_keys: keys of the search [B, N, Hkv, D]; None for k.
        cache_position: int [T] or [B, T], the key of each query, in any order; None: the last T keys. On a GPU the values are
            checked under SUBQUAD_DEBUG=1 only.
        attention_mask: bool [B, >= N], True for tokens: padding on either side, and holes.
        cu_seqlens: [N + 1], bounds of sequences packed into a batch of one, T = N.
        return_aux: also return the spans, the gate and the log-sum-exps.
        backend: "native", "triton", "reference", or None to choose.

    Returns:
        out [B, T, H, Dv] in q's dtype; with `return_aux`, (out, `SuperlinearAux`). Rows that see nothing are 0.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: shapes or devices that do not fit, positions that are no keys, `cu_seqlens` with positions or a mask, a
            backend that cannot run.

    Example:
        >>> import torch, subquad
        >>> q_search, q, k, v = (torch.randn(1, 40, 2, 8) for _ in range(4))
        >>> subquad.superlinear_attention(q_search, q, k, v).shape
        torch.Size([1, 40, 2, 8])
    """
    config = config_of(config)
    _checks.flag("return_aux", return_aux)
    q_search, q, k, v, search_keys = _call.autocast(q_search, q, k, v, search_keys)
    keys = check_attention(q, k, v)
    search_keys = _checked_search(q_search, search_keys, q, k)
    mask = _spans.key_mask(attention_mask, q.shape[0], keys, q.device)
    reached = _spans.reach(config, q.shape[0], q.shape[1], keys, q.device, cache_position, mask, cu_seqlens, q)
    warn_of_gaps(config)
    seen = _spans.window_mask(config, reached, keys, mask)
    out, aux = attended(q_search, q, k, v, search_keys, config, reached, seen, mask, backend)
    return (out, aux) if return_aux else out


def attended(
    q_search: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    search_keys: torch.Tensor,
    config: SuperlinearConfig,
    reached: _spans.Reach,
    seen: IntervalMask | None,
    mask: torch.Tensor | None,
    backend: str | None,
) -> tuple[torch.Tensor, SuperlinearAux]:
    """The same with arguments that have been checked, what every query may reach and its window."""
    keys, scale = k.shape[1], scale_of(config, q.shape[3])
    found = search(q_search, search_keys, config, reached, keys, mask, None, backend)
    base: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    if seen is not None:
        base = window(q, k, v, seen, scale, backend)
    gate = gates(found)
    out, lse = attend(q, k, v, found.start, found.end, gate, *base, mask, None, scale, backend)
    return out, SuperlinearAux(found, gate, lse)


def superlinear_attention_step(
    q_search: torch.Tensor,
    q: torch.Tensor,
    cache: SuperlinearKVCache | tuple[torch.Tensor, ...],
    positions: torch.Tensor,
    *,
    config: SuperlinearConfig | None = None,
    attention_mask: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    r"""`superlinear_attention` for decoding: queries at positions of their own in every row, keys from a cache that has them.

    One token or a chunk of a prompt. A row sees the stripes, spans and window of the same row of a whole prompt, to the bit, and
    nothing behind its position, whatever lies there. No value is read from a GPU and shapes do not depend on positions, so
    that a step can be captured and compiled.

    Args:
        q_search, q: [B, T, H, D], as in `superlinear_attention`.
        cache: a `SuperlinearKVCache` to which the keys of these tokens have been appended; or (k, v) or (k, v, search_keys) as in
            `superlinear_attention`, whose N may be any capacity.
        positions: int32 or int64 [B], the key of each row's first query, which the others follow; or [B, T]. A query at -1 sees
            nothing. On a GPU the values are checked under SUBQUAD_DEBUG=1 only.
        config: see `SuperlinearConfig`; None for its defaults.
        attention_mask: bool [B, >= N], True for tokens, where the keys have padding. A `SuperlinearKVCache` has none.
        backend: "native", "triton", "reference", or None to choose.

    Returns:
        out [B, T, H, Dv] in q's dtype. Rows that see nothing are 0.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: shapes or devices that do not fit, positions that are not in the cache, a gradient through pages, a backend
            that cannot run.

    Example:
        >>> import torch, subquad
        >>> k, v = torch.randn(2, 100, 2, 8), torch.randn(2, 100, 2, 8)
        >>> q_search, q = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 4, 8)
        >>> subquad.superlinear_attention_step(q_search, q, (k, v), torch.tensor([60, 99])).shape
        torch.Size([2, 1, 4, 8])
    """
    config = config_of(config)
    k, v, search_keys, block_table, lens = _stored(cache)
    q_search, q = _call.autocast(q_search, q, to=k)
    keys = check_attention(q, k, v, block_table)
    search_keys = _checked_search(q_search, search_keys, q, k, block_table)
    mask = _spans.key_mask(attention_mask, q.shape[0], keys, q.device)
    position = _step_positions(positions, q, keys, lens)
    reached = _spans.reach_from(config, position, _spans.first_key(mask, q.device), keys)
    warn_of_gaps(config)
    scale = scale_of(config, q.shape[3])
    found = search(q_search, search_keys, config, reached, keys, mask, block_table, backend)
    base: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    if config.window_len():
        if block_table is not None or q.shape[1] <= CONTRACTS["span_attention"].few:
            base = span_window(q, k, v, config, reached, mask, block_table, scale, backend)
        else:
            seen = _spans.window_mask(config, reached, keys, mask)
            assert seen is not None
            base = window(q, k, v, seen, scale, backend)
    return attend(q, k, v, found.start, found.end, gates(found), *base, mask, block_table, scale, backend)[0]


def gates(found: SpanSearch) -> torch.Tensor:
    """The softmax of the scores of what was found; uniform where nothing was."""
    limit = torch.finfo(found.score.dtype).max
    nothing = found.anchor[..., :1] < 0  # the best come first
    score = found.score.clamp(max=limit).masked_fill(found.anchor < 0, -torch.inf)
    return torch.softmax(score.masked_fill(nothing, 0.0), -1)


def combine_spans(
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    gate: torch.Tensor | None = None,
    base_out: torch.Tensor | None = None,
    base_lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmaxes over parts of the keys, as `span_attention` returns them, as one result; plain PyTorch, differentiable.

    With `gate` sum_s gate_s * (the softmax of slot s and the base); without, one softmax over all slots and the base, weighted by
    exp(lse), as attention over their disjoint union is.

    Args:
        out: [B, T, H, S, Dv], any float dtype.
        lse: [B, T, H, S].
        gate: [B, T, H, S], or None.
        base_out, base_lse: [B, T, H, Dv] and [B, T, H], one more softmax, such as a window's; both or neither.

    Returns:
        [B, T, H, Dv] in out's dtype.

    Raises:
        TypeError: what is no float tensor.
        ValueError: shapes or devices that do not fit.
    """
    _checks.tensor("out", out)
    if out.dim() != 5:
        raise ValueError(f"out: expected shape [B, T, H, S, Dv], got {list(out.shape)}")
    if (base_out is None) != (base_lse is None):
        raise ValueError("base_lse: expected together with base_out, got one of them")
    slot, row = out.shape[:4], out.shape[:3]
    expected = (
        ("lse", lse, slot),
        ("gate", gate, slot),
        ("base_out", base_out, (*row, out.shape[4])),
        ("base_lse", base_lse, row),
    )
    for name, x, shape in expected:
        if x is None and name != "lse":
            continue
        _checks.tensor(name, x)
        assert isinstance(x, torch.Tensor)
        if x.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)} to fit out, got {list(x.shape)}")
        _checks.same_device(name, x, out.device, "out")
    wide = torch.promote_types(out.dtype, torch.float32)
    return mix(out.to(wide), lse.to(wide), gate, base_out, base_lse)[0].to(out.dtype)


def _checked_search(
    q_search: object, search_keys: object, q: torch.Tensor, k: torch.Tensor, block_table: torch.Tensor | None = None
) -> torch.Tensor:
    """The keys of the search, which fit its queries."""
    _checks.like("q_search", q_search, None, q, "q")
    assert isinstance(q_search, torch.Tensor)
    if search_keys is None:
        if q_search.shape != q.shape:
            raise ValueError(f"q_search: expected shape {list(q.shape)} as q has, got {list(q_search.shape)}")
        return k
    if q_search.dim() != 4 or q_search.shape[:3] != q.shape[:3]:
        expected = f"[{', '.join(map(str, q.shape[:3]))}, D]"
        raise ValueError(f"q_search: expected shape {expected}, got {list(q_search.shape)}")
    _spans.check_heads("q_search", q_search)
    _spans.check_keys("search_keys", search_keys, q_search, "q_search", block_table)
    assert isinstance(search_keys, torch.Tensor)
    if search_keys.shape[:3] != k.shape[:3]:
        expected = f"[{', '.join(map(str, k.shape[:3]))}, D]"
        raise ValueError(f"search_keys: expected shape {expected} as k has, got {list(search_keys.shape)}")
    return search_keys


_Stored = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _stored(cache: object) -> _Stored:
    """k, v, search_keys, block_table and the lengths of a cache."""
    if isinstance(cache, SuperlinearKVCache):
        return cache.k, cache.v, cache.search_keys, cache.block_table, cache.seq_lens
    if not isinstance(cache, (tuple, list)):
        got = type(cache).__name__
        raise TypeError(f"cache: expected a SuperlinearKVCache, (k, v) or (k, v, search_keys), got {got}")
    if len(cache) not in (2, 3):
        raise ValueError(f"cache: expected (k, v) or (k, v, search_keys), got {len(cache)} of them")
    k, v, search_keys = (*cache, None)[:3]
    _checks.tensor("k", k)
    return k, v, search_keys, None, None


def _step_positions(positions: object, q: torch.Tensor, keys: int, lens: torch.Tensor | None) -> torch.Tensor:
    """int32 [B, T]."""
    given = _checks.integers("positions", positions)
    _checks.same_device("positions", given, q.device, "q")
    batch, tokens = q.shape[:2]
    if given.shape not in ((batch,), (batch, tokens)):
        raise ValueError(f"positions: expected shape [{batch}] or [{batch}, {tokens}], got {list(given.shape)}")
    if given.dim() == 1:
        given = given[:, None] + torch.arange(tokens, device=q.device)
    if _checks.readable(given) and given.numel():
        low, beyond = int(given.min()), given >= (keys if lens is None else lens[:, None])
        if low < -1 or bool(beyond.any()):
            where = f"0..{keys - 1}, the keys" if lens is None else f"below the cache's seq_lens, {lens.tolist()}"
            raise ValueError(
                f"positions: expected -1 or numbers {where}, got {_checks.shown(given.flatten().tolist())}"
            )
    return given.int()
