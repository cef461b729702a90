"""Attention systems that are a few calls of ops."""

from .pine import pine_attention, pine_importance, pine_shift, segment_lse
from .sink import sink_attention
from .soft_causal import soft_causal_attention
from .superlinear import SuperlinearAux, combine_spans, superlinear_attention, superlinear_attention_step

__all__ = [
    "SuperlinearAux",
    "combine_spans",
    "pine_attention",
    "pine_importance",
    "pine_shift",
    "segment_lse",
    "sink_attention",
    "soft_causal_attention",
    "superlinear_attention",
    "superlinear_attention_step",
]
