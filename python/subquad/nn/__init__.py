"""Modules: each keeps the parameter names of the layer it replaces."""

from __future__ import annotations

from .cats_mlp import CATSMLP, dense_state_dict

__all__ = ["CATSMLP", "dense_state_dict"]
