"""Checks of what masks are made from; the messages name the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _checks
from .builders import Span


def sizes(**values: int) -> None:
    """Numbers of tokens, by name."""
    for name, value in values.items():
        _checks.size(name, value)


def integers(name: str, value: torch.Tensor, dims: tuple[int, ...]) -> None:
    """A tensor of any integer type, with as many dimensions as one of `dims`."""
    if not isinstance(value, torch.Tensor) or value.is_floating_point() or value.dtype is torch.bool:
        raise TypeError(f"{name}: expected an integer tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if value.dim() not in dims:
        raise ValueError(f"{name}: expected {' or '.join(map(str, dims))} dimensions, got shape {list(value.shape)}")


def places(name: str, value: torch.Tensor, length: int) -> None:
    """A list of places in a sequence of `length` tokens."""
    integers(name, value, (1,))
    if value.numel() and not 0 <= int(value.min()) <= int(value.max()) < length:
        raise ValueError(f"{name}: expected numbers in [0, {length}), got {int(value.min())} to {int(value.max())}")


def indices(name: str, value: torch.Tensor, dims: int, like: torch.Tensor | None = None) -> None:
    """An int32 tensor of `dims` dimensions, shaped and placed as `like`."""
    _checks.integers(name, value, dims, (torch.int32,))
    if like is not None and value.shape != like.shape:
        raise ValueError(f"{name}: expected shape {list(like.shape)}, got {list(value.shape)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {value.device}")


def lifetime(key_start: torch.Tensor | None, key_stop: torch.Tensor | None, tk: int) -> None:
    """Both or neither, int32 [B|1, H|1, tk]."""
    if (key_start is None) != (key_stop is None):
        raise ValueError("key_stop: expected together with key_start")
    if key_start is None or key_stop is None:
        return
    indices("key_start", key_start, 3)
    indices("key_stop", key_stop, 3, key_start)
    if key_start.shape[2] != tk:
        raise ValueError(f"key_start: expected shape [B|1, H|1, {tk}], got {list(key_start.shape)}")


def sorted_intervals(starts: torch.Tensor, ends: torch.Tensor, tk: int) -> None:
    """Inside [0, tk]; those that are not empty sorted and disjoint in every row."""
    wrong = (starts < 0) | (ends > tk) | (starts > ends)
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        got = f"[{int(starts[at])}, {int(ends[at])}) at {list(at)}"
        raise ValueError(f"starts: expected intervals with 0 <= start <= end <= {tk}, got {got}")
    live = starts < ends
    reach = torch.where(live, ends, 0).cummax(-1).values
    bad = live[..., 1:] & (starts[..., 1:] < reach[..., :-1])
    if bool(bad.any()):
        at = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"starts: expected sorted intervals that do not overlap, got others in row {list(at[:3])}")


def spans_inside(name: str, spans: Sequence[Span], length: int) -> None:
    """(start, stop) pairs inside [0, length]."""
    for start, stop in spans:
        if not 0 <= start <= stop <= length:
            raise ValueError(f"{name}: expected spans inside [0, {length}], got ({start}, {stop})")
