"""subquad: kernels for efficient attention variants, as torch ops and drop-in modules.

>>> import torch, subquad
>>> y = subquad.cats_mlp(torch.randn(1, 64), *(torch.randn(128, 64) for _ in range(2)), torch.randn(64, 128), 0.1)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._backends import SubquadWarning, backends, use_backend
from ._packing import Packed
from .cache import FrameSinkCache, SinkKVCache, SuperlinearKVCache
from .masks import IntervalMask
from .ops.cats_activation import cats_activation
from .ops.cats_mlp import cats_mlp
from .ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from .ops.conv_feature_map import conv_feature_map
from .ops.feature_map import feature_map
from .ops.gated_linear_attention import gated_linear_attention, gated_linear_attention_step
from .ops.interval_attention import interval_attention
from .ops.lawcat_decode_step import lawcat_decode_step
from .ops.quantised_cats_mlp import quantised_cats_mlp
from .ops.quantised_linear import dequantise, quantise, quantised_linear
from .ops.sink_attention_step import sink_attention_step
from .ops.span_attention import span_attention
from .ops.span_search import SpanSearch, span_search
from .recipes.sink import sink_attention
from .recipes.superlinear import combine_spans, superlinear_attention, superlinear_attention_step
from .rope import RopeSpec
from .superlinear import SuperlinearConfig, coverage_gaps, span_lengths, stripe_offsets

if TYPE_CHECKING:
    from . import compat as compat
    from . import convert as convert
    from . import integrations as integrations
    from . import nn as nn
    from . import recipes as recipes
    from .calibration import CatsCalibrator, sparsity_report, track_sparsity
    from .distillation import attention_transfer, attention_transfer_loss, trainable_parameters
    from .generation import generate
    from .integrations.transformers.sink_cache import SinkCache as SinkCache

__version__ = "0.1.0"

_LAZY = {
    "CatsCalibrator": "subquad.calibration",
    "SinkCache": "subquad.integrations.transformers.sink_cache",
    "attention_transfer": "subquad.distillation",
    "attention_transfer_loss": "subquad.distillation",
    "generate": "subquad.generation",
    "sparsity_report": "subquad.calibration",
    "track_sparsity": "subquad.calibration",
    "trainable_parameters": "subquad.distillation",
}
_LAZY_MODULES = ("compat", "convert", "integrations", "kernels", "nn", "ops", "recipes", "reference", "testing")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _LAZY_MODULES:
        return import_module(f"subquad.{name}")
    raise AttributeError(f"module 'subquad' has no attribute {name!r}")


__all__ = [  # without SinkCache, which needs transformers: "import *" must not
    "CatsCalibrator",
    "FrameSinkCache",
    "IntervalMask",
    "Packed",
    "RopeSpec",
    "SinkKVCache",
    "SpanSearch",
    "SubquadWarning",
    "SuperlinearConfig",
    "SuperlinearKVCache",
    "__version__",
    "attention_transfer",
    "attention_transfer_loss",
    "backends",
    "cats_activation",
    "cats_mlp",
    "causal_conv1d",
    "causal_conv1d_update",
    "combine_spans",
    "conv_feature_map",
    "coverage_gaps",
    "dequantise",
    "feature_map",
    "gated_linear_attention",
    "gated_linear_attention_step",
    "generate",
    "interval_attention",
    "lawcat_decode_step",
    "quantise",
    "quantised_cats_mlp",
    "quantised_linear",
    "sink_attention",
    "sink_attention_step",
    "span_attention",
    "span_lengths",
    "span_search",
    "sparsity_report",
    "stripe_offsets",
    "superlinear_attention",
    "superlinear_attention_step",
    "track_sparsity",
    "trainable_parameters",
    "use_backend",
]
