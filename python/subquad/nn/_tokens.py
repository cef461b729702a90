"""What a linear attention layer reads off a model's masks and positions."""

from __future__ import annotations

import torch
from torch import nn

from ..masks import IntervalMask
from ..masks.model_mask import ModelMask


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [B, T, H, d] rotated as transformers does it: halves are pairs; cos and sin [B|1, T, <= d]."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
    a, b = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-b, a], -1) * sin, rest], -1).to(x.dtype)


def sliding_window(attention: nn.Module) -> int | None:
    """The window of an attention layer of transformers, which some keep in their config only."""
    config = getattr(attention, "config", None)
    window: int | None = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    return window


def tokens_of(
    mask: torch.Tensor | IntervalMask | None,
    batch: int,
    length: int,
    window: int | None = None,
    seen: int | None = None,
) -> torch.Tensor | None:
    """Which of the current `length` positions are tokens, bool [B, T], from any mask that a causal model is given.

    Args:
        mask: see `LawcatAttention.forward`.
        batch, length: B and T.
        window: of the sliding window that the mask may have, since linear attention does not need it.
        seen: positions before these. A preallocated cache has columns for later ones, a sliding one lacks those of the first.

    Raises:
        ValueError: a mask of another shape, or that is not causal with padding.
    """
    if mask is None:
        return None
    if isinstance(mask, IntervalMask):
        if not isinstance(mask, ModelMask) or not mask.padded_causal:
            raise ValueError("attention_mask: expected a causal mask of the model, got another IntervalMask")
        if mask.sequence_ids is not None:
            raise ValueError("attention_mask: expected one sequence in each row, got packed ones")
        padding = mask.padding
        if padding is None:
            return None
        first = mask.first_row
        if isinstance(first, torch.Tensor):  # compiled code may not ask for its value
            columns = torch.arange(length, device=padding.device) + first.to(padding.device)
            return padding.index_select(1, columns).expand(batch, -1)
        assert first is not None
        return padding[:, first : first + length].expand(batch, -1)
    if mask.dim() == 2:
        if mask.shape[0] != batch or mask.shape[1] < length:
            raise ValueError(f"attention_mask: expected shape [{batch}, >= {length}], got {list(mask.shape)}")
        past = mask.shape[1] - length if seen is None else min(seen, mask.shape[1] - length)
        return mask[:, past : past + length].bool()
    if mask.dim() != 4 or mask.shape[2] != length or mask.shape[3] < length:
        raise ValueError(f"attention_mask: expected [B, 1, {length}, >= {length}] or [B, T], got {list(mask.shape)}")
    visible = mask if mask.dtype is torch.bool else mask == 0
    past = mask.shape[3] - length if seen is None else min(seen, mask.shape[3] - length)
    visible = visible[..., past : past + length]
    tokens = visible[:, 0].diagonal(0, 1, 2)
    if not torch.compiler.is_compiling():
        row, column = (torch.arange(length, device=mask.device) for _ in range(2))
        causal = column <= row[:, None]
        if window is not None:
            causal = causal & (column > row[:, None] - window)
        if not bool((visible == (causal & tokens[:, None, None])).all()):
            raise ValueError("attention_mask: expected a causal mask with padding, got another pattern")
    return tokens.expand(batch, -1)
