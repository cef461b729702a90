"""Masks that are unions of key intervals."""

from __future__ import annotations

from .interval_mask import IntervalMask

__all__ = ["IntervalMask"]
