"""The old place of `subquad.cache.LawcatCache`."""

from __future__ import annotations

from ..cache.lawcat import LawcatCache, LawcatState

__all__ = ["LawcatCache", "LawcatState"]
