"""Choosing a few spans of keys for every query, among stripes whose number grows as a power of the tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import _checks
from .._packing import Packed
from ..contract.span_search import MAX_HEAD_DIM
from ..reference import span_search as reference
from ..superlinear import SuperlinearConfig
from . import _call, _spans


class SpanSearch(NamedTuple):
    """Spans of every query, best first; [B, T, H, num_spans] each.

    Attributes:
        start: int32, first key of the span; -1 where there is none.
        anchor: int32, the key that was chosen.
        end: int32, last key of the span, which counts.
        score: float32, of the anchor; -inf where there is none. Differentiable in q_search and k.
    """

    start: torch.Tensor
    anchor: torch.Tensor
    end: torch.Tensor
    score: torch.Tensor


def span_search(
    q_search: torch.Tensor,
    k: torch.Tensor,
    *,
    config: SuperlinearConfig | None = None,
    cache_position: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | Packed | None = None,
    block_table: torch.Tensor | None = None,
    backend: str | None = None,
) -> SpanSearch:
    r"""For every query the spans around the `num_spans` stripes of largest q_search . k (Superlinear, arXiv 2601.18401).

    The query at position p looks at the keys p + 1 - o_i, i > config.sw_index, which are about p ** power many, and never at
    others. Scores are search_scale * q_search . k in float32. Exact: of equal scores the farther stripe is chosen, NaN and -inf
    never. The result of a query depends on nothing but keys up to its position.

    Args:
        q_search: [B, T, H, D], float32, bfloat16, float16 (float64 on the reference backend), D in 1..256; any strides.
        k: [B, N, Hkv, D], Hkv divides H; with `block_table` pages [P, page, Hkv, D].
        config: see `SuperlinearConfig`; None for its defaults.
        cache_position: int [T] or [B, T], the key of each query, in any order; None: the last T keys. On a GPU the values are
            checked under SUBQUAD_DEBUG=1 only.
        attention_mask: bool [B, >= N], True for tokens. Keys before the first do not count as seen; masked keys are no stripes.
        cu_seqlens: [N + 1], bounds of sequences packed into a batch of one, T = N.
        block_table: int32 [B, pages], where the pages of a row lie; no gradients then.
        backend: "native", "triton", "reference", or None to choose.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: shapes or devices that do not fit, positions that are no keys, `cu_seqlens` with positions or a mask, a
            gradient through pages, a backend that cannot run.

    Example:
        >>> import torch, subquad
        >>> q, k = torch.randn(1, 30, 4, 8), torch.randn(1, 30, 2, 8)
        >>> found = subquad.span_search(q, k)
        >>> found.anchor.shape, found.anchor[0, 0, 0].tolist()
        (torch.Size([1, 30, 4, 3]), [0, -1, -1])
    """
    config = config_of(config)
    q_search, k = _call.autocast(q_search, k)
    _spans.check_heads("q_search", q_search, limit=MAX_HEAD_DIM)
    keys = _spans.check_keys("k", k, q_search, "q_search", block_table, MAX_HEAD_DIM)
    if block_table is not None and _checks.readable(block_table) and block_table.numel():
        low, high = (int(x) for x in block_table.aminmax())
        if low < -1 or high >= k.shape[0]:
            raise ValueError(f"block_table: expected numbers in -1..{k.shape[0] - 1}, the pages, got {low}..{high}")
    mask = _spans.key_mask(attention_mask, q_search.shape[0], keys, q_search.device)
    batch, tokens = q_search.shape[:2]
    reached = _spans.reach(config, batch, tokens, keys, q_search.device, cache_position, mask, cu_seqlens, q_search)
    return search(q_search, k, config, reached, keys, mask, block_table, backend)


def config_of(config: object) -> SuperlinearConfig:
    """`config`, or the default."""
    if config is None:
        return SuperlinearConfig()
    if not isinstance(config, SuperlinearConfig):
        raise TypeError(f"config: expected a subquad.SuperlinearConfig or None, got {type(config).__name__}")
    return config


def search(
    q: torch.Tensor,
    k: torch.Tensor,
    config: SuperlinearConfig,
    reached: _spans.Reach,
    keys: int,
    mask: torch.Tensor | None,
    block_table: torch.Tensor | None,
    backend: str | None,
) -> SpanSearch:
    """The same with what the public function has made of its arguments."""
    if block_table is not None and torch.is_grad_enabled():
        _checks.no_gradient("q_search", q, _HINT)
        _checks.no_gradient("k", k, _HINT)
    per_row = (x.expand(q.shape[:2]) for x in reached)
    offsets = config.offsets(keys, q.device)
    arguments = (
        q, k, *per_row, offsets, mask, block_table, config.num_spans, float(config.search_scale),
        config.route_per == "group",
    )  # fmt: skip
    score, anchor, start, end = _call.run(
        "span_search_fwd", backend, arguments, reference.span_search, tokens=q.shape[1]
    )
    return SpanSearch(start, anchor, end, score)


_HINT = "pages are for decoding"
