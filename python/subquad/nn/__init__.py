"""Modules: each keeps the parameter names of the layer it replaces."""

from __future__ import annotations

from ..cache import LawcatCache
from .cats_mlp import CATSMLP, dense_state_dict
from .causal_conv1d import ShortConvolution
from .feature_map import LearnedFeatureMap
from .lawcat import GateProjection, LawcatAttention
from .quantised_cats_mlp import QuantisedCATSMLP, QuantisedDown
from .quantised_embedding import QuantisedEmbedding
from .quantised_linear import QuantisedLinear
from .sink_attention import SinkAttention
from .superlinear_attention import SuperlinearAttention

__all__ = [
    "CATSMLP",
    "GateProjection",
    "LawcatAttention",
    "LawcatCache",
    "LearnedFeatureMap",
    "QuantisedCATSMLP",
    "QuantisedDown",
    "QuantisedEmbedding",
    "QuantisedLinear",
    "ShortConvolution",
    "SinkAttention",
    "SuperlinearAttention",
    "dense_state_dict",
]
