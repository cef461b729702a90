"""An earlier place of `subquad.cache`'s LAWCAT states, for code that imports them from here."""

from __future__ import annotations

from typing import Any

from ..cache.lawcat import LawcatCache, LawcatState, state_of

__all__ = ["LawcatCache", "LawcatState", "state_of"]


def __getattr__(name: str) -> Any:
    if name == "cache_layer_class":
        new = "subquad.integrations.transformers.cache.StateLayer"
        raise AttributeError(f"{name}: expected {new}, the class of such layers, in its place")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
