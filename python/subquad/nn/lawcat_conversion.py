"""An earlier place of `subquad.convert`'s attention layers, for code that imports them from here."""

from __future__ import annotations

from ..convert.attentions import LawcatConfig, convert_attentions, find_attentions, revert_attentions

__all__ = ["LawcatConfig", "convert_attentions", "find_attentions", "revert_attentions"]
