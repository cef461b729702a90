"""Lifetimes of keys: key j may be seen by rows start[j] to stop[j].

A lifetime is (start, stop), int32 [B|1, H|1, Tk], or None.
"""

from __future__ import annotations

import torch

from . import algebra

Lifetime = tuple[torch.Tensor, torch.Tensor] | None


def of(key_start: torch.Tensor | None, key_stop: torch.Tensor | None) -> Lifetime:
    """The lifetime of a mask's attributes, both None or neither."""
    return None if key_start is None or key_stop is None else (key_start, key_stop)


def of_keys(visible: torch.Tensor, tq: int) -> Lifetime:
    """All `tq` rows or none, by a bool tensor [B, Tk]."""
    stop = torch.where(visible, tq, 0).int()[:, None]
    return torch.zeros_like(stop), stop


def joined(a: Lifetime, b: Lifetime) -> Lifetime:
    """The rows that are in both."""
    if a is None or b is None:
        return a if b is None else b
    return torch.maximum(a[0], b[0]), torch.minimum(a[1], b[1])


def alive(lifetime: Lifetime, rows: torch.Tensor) -> torch.Tensor | bool:
    """Which keys these rows [n] may see, bool [B|1, H|1, n, Tk]."""
    if lifetime is None:
        return True
    start, stop = lifetime
    return (rows[:, None] >= start[:, :, None]) & (rows[:, None] < stop[:, :, None])


def closed(starts: torch.Tensor, ends: torch.Tensor, lifetime: Lifetime, tk: int, lo: int, hi: int) -> bool:
    """Whether rows [lo, hi) of these intervals see only keys [lo, hi)."""
    if lifetime is None:
        rows, stops = starts[:, :, lo:hi], ends[:, :, lo:hi]
        return bool(((rows >= stops) | ((rows >= lo) & (stops <= hi))).all())
    for first, last in ((t, min(hi, t + 256)) for t in range(lo, hi, 256)):  # no [Tq, Tk] tensor
        seen = algebra.contains(starts[:, :, first:last], ends[:, :, first:last], tk)
        seen = seen & alive(lifetime, torch.arange(first, last, device=starts.device))
        if bool(seen[..., :lo].any() or seen[..., hi:].any()):
            return False
    return True
