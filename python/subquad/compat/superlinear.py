"""Functions of the package `superlinear` (0.1.0), by name, argument and layout [B, H, L, D], on our operators.

Both head counts may be given to either of a pair of names, with and without `_gqa`; all have gradients, run on every backend, and
take any number of spans from 1 to 8 and packed strides. Block sizes, warps, `span_len_factor`, `enable_gqa`, `force_mode`,
`use_triton` and `use_bf16_pv` are taken and change nothing: tiles are ours, and so is the choice of a kernel.

Where that package disagrees with itself, these follow one statement (`subquad.superlinear_attention`):

- offsets of fractional powers and lengths of spans are computed in double precision. That package has them in float32, in two
  ways: from stripe 291 on (p = 0.55) its prompts and its decoding look at different keys, and spans of 25, 100, 121, ... tokens
  may begin a key early;
- decoding is the row of the prompt: with padding, with a static cache that is not full and no mask, with equal head counts and
  any power, where that package is wrong, or raises;
- the window is computed in the dtype of its inputs, not in bfloat16;
- a row that sees nothing is 0 with gradients of 0, not NaN;
- slots without a span have start and anchor -1 and value -inf; of equal scores the farther anchor is chosen; NaN never is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import _checks
from ..ops import _spans
from ..ops import span_attention as _attention
from ..ops import span_search as _search
from ..recipes.superlinear import superlinear_attention, superlinear_attention_step
from ..superlinear import SuperlinearConfig, stripe_offsets

Spans = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


# --- powers ----------------------------------------


class StripePowerParams(NamedTuple):
    """1 / power, the power, and 1 / power once more where it is one of 2..6, else 0."""

    inv_p: float
    p: float
    triton_inv_n: int


def derive_stripe_power_params(*, search_power: float | None, inv_search_power_int: int | None) -> StripePowerParams:
    """Either of the two, the other None.

    Raises:
        TypeError, ValueError: both, neither, or numbers out of range.
    """
    exponent = SuperlinearConfig(search_power=search_power, inv_search_power_int=inv_search_power_int).exponent
    return StripePowerParams(float(exponent), 1.0 / exponent, exponent if isinstance(exponent, int) else 0)


def window_len_from_sw_index(sw_index: int, *, search_power: float | None, inv_search_power_int: int | None) -> int:
    """Keys of the window, `SuperlinearConfig.window_len`."""
    config = SuperlinearConfig(sw_index=sw_index, search_power=search_power, inv_search_power_int=inv_search_power_int)
    return config.window_len()


def max_stripe_index_for_token_pos(
    token_pos: int, *, search_power: float | None, inv_search_power_int: int | None
) -> int:
    """The largest i with an offset of at most `token_pos`; 0 for none."""
    _checks.size("token_pos", token_pos)
    config = SuperlinearConfig(search_power=search_power, inv_search_power_int=inv_search_power_int)
    return stripe_offsets(token_pos, config).shape[0]


def compute_qend_from_qanchor(
    qanchor: torch.Tensor,
    *,
    cache_position: torch.Tensor,
    key_length: int,
    sw_index: int = 0,
    attention_mask: torch.Tensor | None = None,
    forward_factor: float = 0.0,
    span_power: float = 0.5,
    search_power: float | None = None,
    inv_search_power_int: int | None = 2,
) -> torch.Tensor:
    """Last keys of spans, of the shape and dtype of their anchors [B, H, L, k]; -1 where the anchor is.

    Args:
        qanchor: int32 or int64.
        cache_position: int [L] or [B, L].
        key_length: N.
        attention_mask: [B, >= N], True or 1 for tokens.
    """
    config = SuperlinearConfig(
        sw_index=sw_index, forward_factor=forward_factor, span_power=span_power, search_power=search_power,
        inv_search_power_int=inv_search_power_int,
    )  # fmt: skip
    anchor = _checks.integers("qanchor", qanchor, 4)
    _checks.size("key_length", key_length, 1)
    batch, _, tokens, _ = anchor.shape
    mask = _spans.key_mask(_mask(attention_mask), batch, key_length, anchor.device)
    reached = _spans.reach(config, batch, tokens, key_length, anchor.device, cache_position, mask)
    ahead, last = (x.long()[:, None, :, None] for x in (reached.ahead, reached.last))
    end = anchor if not forward_factor else torch.minimum(anchor + ahead, last)
    return torch.where(anchor < 0, -1, end).to(anchor.dtype)


# --- search ----------------------------------------


def get_search_mask(
    cache_position: torch.Tensor,
    device: torch.device | str,
    batch_size: int = 1,
    attention_mask: torch.Tensor | None = None,
    sw_index: int = 0,
    *,
    kv_length: int | None = None,
    search_power: float | None = None,
    inv_search_power_int: int | None = 2,
) -> torch.Tensor:
    """bool [B, 1, L, N]: which keys are stripes of which queries. Waits for the device.

    Args:
        cache_position: int [L].
        attention_mask: [B, >= N], True or 1 for tokens.
        kv_length: N; None for the last position + 1.
    """
    config = SuperlinearConfig(sw_index=sw_index, search_power=search_power, inv_search_power_int=inv_search_power_int)
    position = _checks.integers("cache_position", cache_position, 1).to(_checks.device("device", device))
    _checks.size("batch_size", batch_size)
    if kv_length is None:
        kv_length = int(position[-1]) + 1 if position.numel() else 0
    _checks.size("kv_length", kv_length)
    mask = _spans.key_mask(_mask(attention_mask), batch_size, kv_length, position.device)
    tokens = int(position.max()) + 1 if position.numel() else 0
    searched = torch.zeros(tokens + 1, dtype=torch.bool, device=device)  # by the offset
    searched[stripe_offsets(tokens, config, device)[sw_index:]] = True
    distance = position[:, None] + 1 - torch.arange(kv_length, device=device)
    stripes = (distance > 0) & searched[distance.clamp(min=0)]
    stripes = stripes[None].expand(batch_size, -1, -1)
    return (stripes if mask is None else stripes & mask[:, None])[:, None]


def get_search_scores(Q: torch.Tensor, K: torch.Tensor, qend: torch.Tensor) -> torch.Tensor:
    """Q . K at the anchors [B, H, L, k]; -inf where there is none. Differentiable.

    Args:
        Q: [B, H, L, D].
        K: [B, Hkv, N, D].
        qend: the anchors, int32 or int64.
    """
    anchor = _checks.integers("qend", qend, 4)
    q, k = _rows("Q", Q), _rows("K", K)
    _spans.check_keys("K", k, q, "Q")
    if anchor.shape[:3] != Q.shape[:3]:
        raise ValueError(f"qend: expected shape [{', '.join(map(str, Q.shape[:3]))}, k], got {list(anchor.shape)}")
    if _checks.readable(anchor) and anchor.numel() and int(anchor.max()) >= K.shape[2]:
        raise ValueError(f"qend: expected numbers below {K.shape[2]}, the keys, got {int(anchor.max())}")
    heads, kv_heads = Q.shape[1], K.shape[1]
    batch = torch.arange(Q.shape[0], device=Q.device)[:, None, None, None]
    head = (torch.arange(heads, device=Q.device) // (heads // kv_heads))[:, None, None]
    found = K[batch, head, anchor.clamp(min=0).long()]
    return torch.einsum("bhld,bhlkd->bhlk", Q, found).masked_fill(anchor < 0, -torch.inf)


def get_spans(
    Q: torch.Tensor,
    K: torch.Tensor,
    cache_position: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    sw_index: int = 0,
    topk: int = 2,
    *,
    backward_factor: float = 2.0,
    span_power: float = 0.5,
    search_power: float | None = None,
    inv_search_power_int: int | None = 2,
) -> Spans:
    """As `span_search`."""
    return span_search(
        Q, K, cache_position, attention_mask, sw_index, topk, backward_factor=backward_factor, span_power=span_power,
        search_power=search_power, inv_search_power_int=inv_search_power_int,
    )  # fmt: skip


def span_search(
    Q: torch.Tensor,
    K: torch.Tensor,
    cache_position: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    sw_index: int = 0,
    k: int = 3,
    block_size: int = 128,
    backward_factor: float = 2.0,
    span_power: float = 0.5,
    search_power: float | None = None,
    inv_search_power_int: int | None = 2,
    use_triton: bool | None = None,
) -> Spans:
    """The spans of every query without what reaches ahead of the anchor. See `subquad.span_search`.

    Args:
        Q: queries of the search [B, H, L, D].
        K: [B, Hkv, N, D], Hkv divides H.
        cache_position: int [L] or [B, L], the key of each query, in any order.
        attention_mask: [B, >= N], True or 1 for tokens.
        k: spans, 1..8.

    Returns:
        (start int32, anchor int32, value float32), each [B, H, L, k], best first. The second is the anchor, whatever the package
        calls it; `compute_qend_from_qanchor` makes ends of it. Values are differentiable in Q and K.

    Raises:
        TypeError, ValueError: as `subquad.span_search` and `SuperlinearConfig`.
    """
    config = SuperlinearConfig(
        sw_index=sw_index, num_spans=k, backward_factor=backward_factor, span_power=span_power, search_power=search_power,
        inv_search_power_int=inv_search_power_int,
    )  # fmt: skip
    found = _search.span_search(
        _rows("Q", Q), _rows("K", K), config=config, cache_position=cache_position, attention_mask=_mask(attention_mask)
    )
    return found.start.transpose(1, 2), found.anchor.transpose(1, 2), found.score.transpose(1, 2)


def span_search_with_values(
    Q: torch.Tensor,
    K: torch.Tensor,
    cache_position: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    sw_index: int = 0,
    k: int = 3,
    block_size: int = 128,
    backward_factor: float = 2.0,
    span_power: float = 0.5,
    search_power: float | None = None,
    inv_search_power_int: int | None = 2,
) -> Spans:
    """As `span_search`."""
    return span_search(
        Q, K, cache_position, attention_mask, sw_index, k, block_size, backward_factor, span_power, search_power,
        inv_search_power_int,
    )  # fmt: skip


search_spans = span_search
span_search_with_values_gqa = span_search_with_values
span_search_triton = span_search_triton_gqa = search_spans_triton = search_spans_triton_gqa = span_search_with_values


# --- attention to given spans ----------------------------------------


def fused_span_attention(
    Q2: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    qstart: torch.Tensor,
    qend: torch.Tensor,
    cache_position: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    sw_index: int = 0,
    block_k: int = 64,
    span_len_factor: float = 2.0,
    span_power: float = 0.5,
    search_power: float | None = None,
    inv_search_power_int: int | None = 2,
) -> torch.Tensor:
    """Attention to each span and the window, out [B, H, L, k, D]. See `subquad.span_attention`.

    Args:
        Q2: [B, H, L, D].
        K, V: [B, Hkv, N, D].
        qstart, qend: int [B, H, L, k], first and last key, which counts; of any length, whatever `span_len_factor` says.
        cache_position: int [L] or [B, L].
        attention_mask: [B, >= N], True or 1 for tokens.
    """
    config = SuperlinearConfig(sw_index=sw_index, search_power=search_power, inv_search_power_int=inv_search_power_int)
    start, end = (_checks.integers(n, x, 4).transpose(1, 2) for n, x in (("qstart", qstart), ("qend", qend)))
    out, _ = _attention.span_attention(
        _rows("Q2", Q2), _rows("K", K), _rows("V", V), start, end, config=config, cache_position=cache_position,
        attention_mask=_mask(attention_mask),
    )  # fmt: skip
    return out.transpose(1, 2)


span_attention = fused_span_attention_gqa = span_attention_gqa = fused_span_attention


# --- prompts ----------------------------------------


def prefill(
    Q1: torch.Tensor,
    Q2: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    cache_position: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    sw_index: int = 0,
    num_spans: int = 3,
    block_k: int = 64,
    search_block_q: int = 128,
    backward_factor: float = 2.0,
    forward_factor: float = 0.0,
    span_power: float = 0.5,
    search_power: float | None = None,
    inv_search_power_int: int | None = 2,
    *,
    topk: int | None = None,
) -> torch.Tensor:
    """Superlinear attention, [B, H, L, D]. See `subquad.superlinear_attention`.

    Args:
        Q1, Q2: queries of the search and of attention [B, H, L, D].
        K, V: [B, Hkv, N, D], Hkv divides H.
        cache_position: int [L] or [B, L], the key of each query, in any order.
        attention_mask: [B, >= N], True or 1 for tokens.
        num_spans: 1..8; `topk`, where given, is the same.

    Raises:
        TypeError, ValueError: as `subquad.superlinear_attention` and `SuperlinearConfig`.
    """
    config = SuperlinearConfig(
        sw_index=sw_index, num_spans=num_spans if topk is None else topk, backward_factor=backward_factor,
        forward_factor=forward_factor, span_power=span_power, search_power=search_power,
        inv_search_power_int=inv_search_power_int,
    )  # fmt: skip
    rows = (_rows(name, x) for name, x in (("Q1", Q1), ("Q2", Q2), ("K", K), ("V", V)))
    mask = _mask(attention_mask)
    out = superlinear_attention(*rows, config=config, cache_position=cache_position, attention_mask=mask)
    assert isinstance(out, torch.Tensor)
    return out.transpose(1, 2)


prefill_mha = prefill


def fused_prefill_with_swtriton_gqa(
    Q1: torch.Tensor,
    Q2: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    cache_pos: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    sw_index: int = 0,
    num_spans: int = 3,
    block_k: int = 64,
    search_block_q: int = 128,
    backward_factor: float = 2.0,
    forward_factor: float = 0.0,
    span_power: float = 0.5,
    search_power: float | None = None,
    inv_search_power_int: int | None = 2,
    *,
    cache_position: torch.Tensor | None = None,
    topk: int | None = None,
) -> torch.Tensor:
    """As `prefill`; `cache_position` is the same as `cache_pos`, and goes before it."""
    position = cache_pos if cache_position is None else cache_position
    if position is None:
        raise TypeError("cache_position: expected it or cache_pos, got neither")
    return prefill(
        Q1, Q2, K, V, position, attention_mask, sw_index, num_spans, block_k, search_block_q, backward_factor,
        forward_factor, span_power, search_power, inv_search_power_int, topk=topk,
    )  # fmt: skip


prefill_gqa = fused_prefill_with_swtriton_gqa
fused_prefill_with_swtriton_bucketed_gqa = prefill_bucketed_gqa = prefill_bucketed = fused_prefill_with_swtriton_gqa
full_span_attention_fused_with_search_values = fused_prefill_with_swtriton_gqa
full_span_attention_fused_with_search_values_gqa = fused_prefill_with_swtriton_gqa


def fused_prefill_with_swtriton(
    Q1: torch.Tensor,
    Q2: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    cache_pos: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sw_index: int,
    topk: int,
    *,
    key_cache_position: torch.Tensor | None = None,
    backward_factor: float = 2.0,
    forward_factor: float = 0.0,
    span_power: float = 0.5,
    search_power: float | None = None,
    inv_search_power_int: int | None = 2,
    **tiles: Any,
) -> torch.Tensor:
    """As `prefill`. `tiles`: sw_block_k, sw_block_m_dense, sw_num_warps, sw_num_stages and use_bf16_pv, which change nothing.

    Raises:
        ValueError: `key_cache_position`: keys are at their own numbers.
    """
    if key_cache_position is not None:
        raise ValueError("key_cache_position: expected None, for keys are at their own numbers, got positions")
    for name in tiles.keys() - _TILES:
        raise TypeError(f"{name}: expected no argument of this name")
    return prefill(
        Q1, Q2, K, V, cache_pos, attention_mask, sw_index, topk, backward_factor=backward_factor,
        forward_factor=forward_factor, span_power=span_power, search_power=search_power,
        inv_search_power_int=inv_search_power_int,
    )  # fmt: skip


_TILES = {"sw_block_k", "sw_block_m_dense", "sw_num_warps", "sw_num_stages", "use_bf16_pv"}


# --- decoding ----------------------------------------


def decode_span_attention_staged(
    Q1: torch.Tensor,
    Q2: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    cache_position: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    sw_index: int = 0,
    topk: int = 3,
    backward_factor: float = 2.0,
    forward_factor: float = 0.0,
    *,
    span_power: float = 0.5,
    search_power: float | None = None,
    inv_search_power_int: int | None = 2,
) -> torch.Tensor:
    """The row of `prefill` at this position, [B, H, 1, D]; K and V may be a static cache, with anything behind the position.

    Args:
        Q1, Q2, K, V, attention_mask, topk: as for `prefill`, with L = 1 (more are taken, too).
        cache_position: int [L] or [B, L].
    """
    config = SuperlinearConfig(
        sw_index=sw_index, num_spans=topk, backward_factor=backward_factor, forward_factor=forward_factor,
        span_power=span_power, search_power=search_power, inv_search_power_int=inv_search_power_int,
    )  # fmt: skip
    q_search, q, k, v = (_rows(name, x) for name, x in (("Q1", Q1), ("Q2", Q2), ("K", K), ("V", V)))
    position = _checks.integers("cache_position", cache_position)
    if position.shape == q.shape[1:2]:
        position = position.expand(q.shape[:2])
    mask = _mask(attention_mask)
    return superlinear_attention_step(q_search, q, (k, v), position, config=config, attention_mask=mask).transpose(1, 2)


def decode_span_attention_staged_gqa(
    Q1: torch.Tensor,
    Q2: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    cache_position: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    sw_index: int = 0,
    topk: int = 3,
    enable_gqa: bool = True,
    block_k: int = 64,
    backward_factor: float = 2.0,
    forward_factor: float = 0.0,
    span_power: float = 0.5,
    search_power: float | None = None,
    inv_search_power_int: int | None = 2,
    force_mode: str | None = None,
) -> torch.Tensor:
    """As `decode_span_attention_staged`."""
    return decode_span_attention_staged(
        Q1, Q2, K, V, cache_position, attention_mask, sw_index, topk, backward_factor, forward_factor,
        span_power=span_power, search_power=search_power, inv_search_power_int=inv_search_power_int,
    )  # fmt: skip


decode_attention = decode_span_attention = decode_span_attention_staged
decode_attention_gqa = decode_span_attention_gqa = decode_span_attention_staged_gqa


# --- shared ----------------------------------------


def _rows(name: str, x: object) -> torch.Tensor:
    """[B, L, H, D] of [B, H, L, D]."""
    _checks.tensor(name, x)
    assert isinstance(x, torch.Tensor)
    if x.dim() != 4:
        raise ValueError(f"{name}: expected shape [B, H, L, D], got {list(x.shape)}")
    return x.transpose(1, 2)


def _mask(mask: object) -> torch.Tensor | None:
    """As bools; the package takes integers, too."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"attention_mask: expected a torch.Tensor or None, got {type(mask).__name__}")
    return mask.bool()


__all__ = [
    "StripePowerParams",
    "compute_qend_from_qanchor",
    "decode_attention",
    "decode_attention_gqa",
    "decode_span_attention",
    "decode_span_attention_gqa",
    "decode_span_attention_staged",
    "decode_span_attention_staged_gqa",
    "derive_stripe_power_params",
    "full_span_attention_fused_with_search_values",
    "full_span_attention_fused_with_search_values_gqa",
    "fused_prefill_with_swtriton",
    "fused_prefill_with_swtriton_bucketed_gqa",
    "fused_prefill_with_swtriton_gqa",
    "fused_span_attention",
    "fused_span_attention_gqa",
    "get_search_mask",
    "get_search_scores",
    "get_spans",
    "max_stripe_index_for_token_pos",
    "prefill",
    "prefill_bucketed",
    "prefill_bucketed_gqa",
    "prefill_gqa",
    "prefill_mha",
    "search_spans",
    "search_spans_triton",
    "search_spans_triton_gqa",
    "span_attention",
    "span_attention_gqa",
    "span_search",
    "span_search_triton",
    "span_search_triton_gqa",
    "span_search_with_values",
    "span_search_with_values_gqa",
    "window_len_from_sw_index",
]
