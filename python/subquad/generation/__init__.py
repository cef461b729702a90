"""Text from any causal language model of transformers, in compiled steps."""

from __future__ import annotations

from .loop import generate

__all__ = ["generate"]
