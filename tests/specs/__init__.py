"""The specs of all ops. Tests, benchmarks and the support table are made from them; nothing here may import pytest."""

from __future__ import annotations

from importlib import import_module

from subquad.contract import STEMS
from subquad.testing.spec import OpSpec

SPECS: tuple[OpSpec, ...] = tuple(spec for stem in STEMS for spec in import_module(f"{__name__}.{stem}").SPECS)
