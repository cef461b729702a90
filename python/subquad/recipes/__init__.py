"""Attention systems that are a few calls of `interval_attention`."""

from .pine import pine_attention, pine_importance, pine_shift, segment_lse
from .sink import sink_attention
from .soft_causal import soft_causal_attention

__all__ = [
    "pine_attention",
    "pine_importance",
    "pine_shift",
    "segment_lse",
    "sink_attention",
    "soft_causal_attention",
]
