"""The mask of one forward pass, from what transformers says about it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ... import _checks
from ...masks import IntervalMask
from ...masks.model_mask import ModelMask
from .predicates import Pattern, neighbours, recognised, run_starts, run_stops

_LOG = logging.getLogger(__name__)
# What makes the mask of tokens that lie on several ranks, innermost last; see `subquad.distributed.context_parallel`.
SHARDED: list[Callable[..., IntervalMask]] = []


def attention_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | IntervalMask | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> IntervalMask:
    """transformers' mask function: the mask of one forward pass, made once and shared by the layers of its kind.

    What it is made of depends on shapes alone where values cannot be read, or would be at every step of a preallocated cache: a
    graph is then compiled once for all of them.

    Args:
        batch_size, q_length, kv_length: sizes of the attention.
        q_offset, kv_offset: positions of the first query and of the first key.
        mask_function: transformers' predicate (b, h, q, kv). Those that the library composes itself are recognised, see
            `predicates`; others are asked about every pair.
        attention_mask: bool [B, positions], False where a token is padding.
        device: where the mask is used.
        kwargs: what transformers tells its own mask functions, `use_vmap` and `local_size` for example; `cache_position` in
            transformers 4.57, which has no `q_length` and `q_offset`.

    Returns:
        The mask. Rows that are padding on the left see nothing, so that their output is 0.

    Raises:
        ValueError: an `attention_mask` of another shape.
    """
    if isinstance(attention_mask, IntervalMask):  # made before, by `generate`
        return attention_mask
    if q_length is None or isinstance(q_length, torch.Tensor):  # 4.57: positions of the queries
        cache_position = kwargs.pop("cache_position", q_length)
        q_length, q_offset = cache_position.shape[0], cache_position[0]
    pattern = recognised(mask_function, batch_size, kv_length, kwargs)
    if SHARDED:
        return SHARDED[-1](pattern, batch_size, q_length, kv_length, attention_mask)
    if pattern is None:
        return _from_predicate(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device, kwargs
        )
    padding = _padding(attention_mask, kv_length, kv_offset, device)
    unread = padding is not None and (_checks.traced(padding) or isinstance(q_offset, torch.Tensor))
    if padding is not None and not unread and bool(padding.all()):
        padding = None
    first_row = q_offset - kv_offset
    sequence_ids = None
    if not pattern.broken:
        mask = plain(pattern.causal, pattern.window, q_length, kv_length, first_row, device, pattern.ahead)
    else:
        assert mask_function is not None
        seen = neighbours(mask_function, batch_size, kv_offset, kv_length, device)
        mask = _broken(pattern, *seen, q_length, first_row)
        if pattern.apart is not None:
            same, _ = seen if pattern.apart is mask_function else neighbours(
                pattern.apart, batch_size, kv_offset, kv_length, device
            )  # fmt: skip
            sequence_ids = run_starts(same)
    if padding is not None:
        mask = mask.with_live_keys(padding) if unread else mask.with_keys(padding)
    return ModelMask.of(
        mask,
        padded_causal=pattern.linear,
        autoregressive=pattern.causal,
        chunked=pattern.chunked,
        padding=padding,
        sequence_ids=sequence_ids,
        sliding_window=pattern.window,
        first_row=first_row,
    )


def _padding(
    mask: torch.Tensor | None, kv_length: int, kv_offset: int, device: torch.device | str
) -> torch.Tensor | None:
    """Which keys are tokens, bool [B, kv_length]; what a preallocated cache has not got yet is none."""
    if mask is None:
        return None
    if mask.dim() != 2:
        raise ValueError(f"attention_mask: expected shape [B, T], or four dimensions, got {list(mask.shape)}")
    missing = kv_length + kv_offset - mask.shape[1]
    padded = nn.functional.pad(mask.bool(), (0, missing)) if missing > 0 else mask.bool()
    return padded[:, kv_offset : kv_offset + kv_length].to(device)


def plain(
    causal: bool,
    window: int,
    tq: int,
    tk: int,
    first_row: int | torch.Tensor,
    device: torch.device | str,
    ahead: int | None = None,
) -> IntervalMask:
    """Full, causal or sliding attention of queries of which the first stands at key `first_row`, at the end or not.

    A window that is not causal has as many keys `ahead` as behind, or its own number of them.
    """
    if not causal and window < 0:
        return IntervalMask.full(tq, tk)
    if causal and not isinstance(first_row, torch.Tensor) and first_row + tq == tk:
        return IntervalMask.causal(tq, tk) if window < 0 else IntervalMask.sliding(window, tq, tk)
    own = torch.arange(tq, device=device) + first_row
    if causal:
        start, stop = (own + 1 - window if window >= 0 else torch.zeros_like(own)), own + 1
    else:
        start, stop = own - window, own + 1 + (window if ahead is None else ahead)
    return _of_runs(start[None], stop[None], tk)


def _broken(
    pattern: Pattern, behind: torch.Tensor, ahead: torch.Tensor, tq: int, first: int | torch.Tensor
) -> IntervalMask:
    """The mask of a pattern with sequences, chunks or blocks, by what neighbours see of each other; see `predicates`."""
    tk = behind.shape[1]
    own = torch.arange(tq, device=behind.device) + first
    place = own.clamp(0, max(0, tk - 1))
    start, stop = run_starts(behind)[:, place], run_stops(ahead)[:, place]
    if pattern.causal:  # a token that sees one ahead sees its whole block, in whatever window
        block = own if pattern.cut else run_starts(ahead.roll(1, -1))[:, place]
        start = start if pattern.window < 0 else torch.minimum(block, torch.maximum(start, own + 1 - pattern.window))
    elif pattern.window >= 0:
        start, stop = torch.maximum(start, own - pattern.window), torch.minimum(stop, own + 1 + pattern.ahead)
    return _of_runs(start, stop, tk)


def _of_runs(start: torch.Tensor, stop: torch.Tensor, tk: int) -> IntervalMask:
    """Row t of batch b sees [start, stop) [B, Tq]."""
    return IntervalMask.spans(start.clamp_min(0)[:, None, :, None], stop[:, None, :, None], tk)


def _from_predicate(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    kv_offset: int,
    function: Callable[..., Any] | None,
    padding: torch.Tensor | None,
    device: torch.device | str,
    kwargs: dict[str, Any],
) -> IntervalMask:
    """The mask of any predicate, through transformers' own dense one.

    Raises:
        TypeError: the predicate does not say True or False.
    """
    from transformers.masking_utils import sdpa_mask

    if not torch.compiler.is_compiling():
        name = getattr(function, "__qualname__", repr(function))
        _LOG.debug(
            "dense mask [%d, 1, %d, %d]: mask_function %s has no known form", batch_size, q_length, kv_length, name
        )

    more = {name: value for name, value in kwargs.items() if name == "use_vmap"}
    dense: Any = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]
        kv_offset=kv_offset,
        mask_function=function,  # type: ignore[arg-type]
        attention_mask=padding,
        allow_is_causal_skip=False,
        device=device,
        **more,
    )
    if dense.dtype is not torch.bool:
        raise TypeError(f"mask_function: expected one that returns bool, got {dense.dtype}")
    return ModelMask.of(IntervalMask.from_dense(dense))
