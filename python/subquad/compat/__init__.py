"""Other packages' functions under their own names and in their own layouts, for people who switch."""

from __future__ import annotations

from . import causal_conv1d, fla, superlinear

__all__ = ["causal_conv1d", "fla", "superlinear"]
