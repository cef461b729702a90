"""The mask of one forward pass, from what transformers says about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...masks import IntervalMask
from ...masks.model_mask import ModelMask
from .predicates import recognised


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

    Args:
        batch_size, q_length, kv_length: sizes of the attention.
        q_offset, kv_offset: positions of the first query and of the first key.
        mask_function: transformers' predicate (b, h, q, kv). Causal, sliding and full ones are recognised.
        attention_mask: bool [B, positions], False where a token is padding.
        device: where the mask is used.
        kwargs: `cache_position` in transformers 4.57, which has no `q_length` and `q_offset`.

    Returns:
        The mask. Rows at padding see nothing, so that their output is 0.
    """
    if isinstance(attention_mask, IntervalMask):  # made before, by `generate`
        return attention_mask
    if q_length is None or isinstance(q_length, torch.Tensor):  # 4.57: positions of the queries
        cache_position = kwargs.pop("cache_position", q_length)
        q_length, q_offset = cache_position.shape[0], cache_position[0]
    padding = None
    if attention_mask is not None:
        missing = kv_length + kv_offset - attention_mask.shape[-1]
        padding = nn.functional.pad(attention_mask.bool(), (0, max(0, missing)))[:, kv_offset : kv_offset + kv_length]
        if not torch.compiler.is_compiling() and bool(padding.all()):
            padding = None
    kind = recognised(mask_function)
    if kind is None:
        return _from_predicate(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device, kwargs
        )
    bidirectional, width = kind
    mask = _plain(bidirectional, width, q_length, kv_length, q_offset, kv_offset, device)
    if padding is not None:
        mask = mask.with_keys(padding.to(device))
    return ModelMask.of(
        mask,
        padded_causal=not bidirectional,
        padding=None if bidirectional else padding,
        sliding_window=width,
        first_row=q_offset - kv_offset,
    )


def _plain(
    bidirectional: bool,
    width: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    kv_offset: int,
    device: torch.device | str,
) -> IntervalMask:
    """Full, causal or sliding attention of queries that need not stand at the end of the keys (a preallocated cache)."""
    if bidirectional:
        return IntervalMask.full(q_length, kv_length)
    if not isinstance(q_offset, torch.Tensor) and q_offset + q_length == kv_length + kv_offset:
        return (
            IntervalMask.sink(0, width, q_length, kv_length) if width >= 0 else IntervalMask.causal(q_length, kv_length)
        )
    stop = torch.arange(q_length, device=device) + (q_offset - kv_offset + 1)
    start = stop - width if width >= 0 else torch.zeros_like(stop)
    return IntervalMask.spans(start.clamp_min(0)[None, None, :, None], stop[None, None, :, None], kv_length)


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
    """The mask of any predicate, through transformers' own dense one."""
    from transformers.masking_utils import sdpa_mask

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
    return ModelMask.of(IntervalMask.from_dense(dense))


def from_tensor(mask: torch.Tensor, tk: int) -> IntervalMask:
    """A mask in four dimensions, bool or additive."""
    if mask.dim() != 4 or mask.shape[-1] < tk:
        raise ValueError(f"attention_mask: expected [B, H, Tq, {tk}] or [B, T], got {list(mask.shape)}")
    mask = mask[..., :tk]
    if mask.dtype is torch.bool:
        return IntervalMask.from_dense(mask)
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if not bool(((mask == 0) | hidden).all()):
        raise ValueError(
            "attention_mask: expected bool, or 0 and very negative numbers, got other biases; use 'eager' for this model"
        )
    return IntervalMask.from_dense(~hidden)


def windowed(mask: IntervalMask, window: int, tq: int, tk: int, device: torch.device) -> IntervalMask:
    """The mask with a layer's sliding window, if it has none. One made from a predicate is final: it may show more than that."""
    made = mask if isinstance(mask, ModelMask) else ModelMask.of(mask, sliding_window=mask.window, first_row=tk - tq)
    if made.sliding_window == window or made.first_row is None:
        return mask
    return mask & _plain(False, window, tq, tk, made.first_row, 0, device).materialize(device=device)
