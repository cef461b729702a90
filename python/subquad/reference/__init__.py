"""Plain PyTorch oracles: differentiable, float64-capable, free of triton and of native code."""

from . import (
    cats_activation,
    cats_mlp,
    causal_conv1d,
    conv_feature_map,
    feature_map,
    gated_linear_attention,
    interval_attention,
    lawcat_decode_step,
)

__all__ = [
    "cats_activation",
    "cats_mlp",
    "causal_conv1d",
    "conv_feature_map",
    "feature_map",
    "gated_linear_attention",
    "interval_attention",
    "lawcat_decode_step",
]
