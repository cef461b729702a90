"""Generic checks: one function per law, registered by importing the modules."""

from __future__ import annotations

from . import compilation, memory, numerics, operators, state
from .registry import CHECKS, Check

__all__ = ["CHECKS", "Check", "compilation", "memory", "numerics", "operators", "state"]
