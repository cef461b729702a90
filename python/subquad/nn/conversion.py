"""An earlier place of `subquad.convert`'s MLPs, for code that imports them from here."""

from __future__ import annotations

from ..convert.mlps import CatsConfig, convert_mlps, find_mlps, revert_mlps
from ..convert.replace import match_layer

__all__ = ["CatsConfig", "convert_mlps", "find_mlps", "match_layer", "revert_mlps"]
