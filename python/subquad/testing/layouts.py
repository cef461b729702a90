"""The same values laid out in memory in other ways."""

from __future__ import annotations

from collections.abc import Callable

import torch


def poison(dtype: torch.dtype) -> float:
    """What nobody may read: NaN, or the largest number of an integer type."""
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


def _sliced(tensor: torch.Tensor) -> torch.Tensor:
    """The inner part of a buffer that is larger in every dimension, poisoned around it."""
    larger = torch.full([n + 3 for n in tensor.shape], poison(tensor.dtype), dtype=tensor.dtype, device=tensor.device)
    view = larger[tuple(slice(1, n + 1) for n in tensor.shape)]
    return view.copy_(tensor)


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    """Every second element of the last dimension, poison between them."""
    shape = (*tensor.shape[:-1], 2 * tensor.shape[-1])
    larger = torch.full(shape, poison(tensor.dtype), dtype=tensor.dtype, device=tensor.device)
    return larger[..., ::2].copy_(tensor)


def _offset(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, one element behind an aligned address."""
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return flat[1:].view(tensor.shape).copy_(tensor)


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    """Last two dimensions exchanged in memory."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.dim() > 1 else tensor


def _expanded(tensor: torch.Tensor) -> torch.Tensor:
    """The first entry of the first dimension, contiguous, repeated with stride 0. These are other values."""
    return tensor[:1].contiguous().expand(tensor.shape)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": _transposed,
    "sliced": _sliced,
    "strided": _strided,
    "offset": _offset,
    "expanded": _expanded,
}


def lay_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """`tensor` in the named layout; "contiguous" is allowed too."""
    return tensor.contiguous() if layout == "contiguous" else LAYOUTS[layout](tensor)


def changes_strides(tensor: torch.Tensor, layout: str) -> bool:
    """Whether the layout is one of its own for this shape: a single row has no transpose."""
    if tensor.dim() == 0 or tensor.numel() == 0:
        return False
    if layout == "transposed":
        return tensor.dim() > 1 and min(tensor.shape[-2:]) > 1
    if layout == "expanded":
        return tensor.shape[0] > 1
    return layout != "strided" or tensor.shape[-1] > 1
