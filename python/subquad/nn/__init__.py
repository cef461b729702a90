"""Modules: each keeps the parameter names of the layer it replaces."""

from __future__ import annotations

from .cats_mlp import CATSMLP, dense_state_dict
from .feature_map import LearnedFeatureMap

__all__ = ["CATSMLP", "LearnedFeatureMap", "dense_state_dict"]
