"""What layers remember between calls: one protocol (`state`), and the states and caches that follow it."""

from __future__ import annotations

from .frames import FrameSinkCache
from .lawcat import LawcatCache, LawcatState
from .sink import SinkKVCache
from .state import State
from .superlinear import SuperlinearKVCache

__all__ = ["FrameSinkCache", "LawcatCache", "LawcatState", "SinkKVCache", "State", "SuperlinearKVCache"]
