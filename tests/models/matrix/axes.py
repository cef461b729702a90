"""The axes of the matrix, which of its cells make no sense, which are refused, and a sample that covers their values together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import torch

from .kinds import KINDS, Kind
from .oracle import Conversion

LOLCATS = {
    "window_size": 3, "linear_covers_window": False, "linear_scale": 1.0, "rope": "linear", "gate": "none",
    "tie_qk_feature_map": False, "conv_size": 1,
}  # fmt: skip
CONVERSIONS = {
    conversion.name: conversion
    for conversion in (
        Conversion("none"),
        Conversion("cats", cats=True),
        Conversion("lawcat", lawcat={}),
        Conversion("lawcat_window", lawcat={"window_size": 4}),
        Conversion("first", lawcat={}, layers=(0,)),
        Conversion("last_window", lawcat={"window_size": 3, "linear_covers_window": False}, layers=(-1,)),
        Conversion("rest_lolcats_cats", cats=True, lawcat=LOLCATS, layers=(1, -1)),
    )
}
AXES: dict[str, tuple[str, ...]] = {
    "kind": tuple(KINDS),
    "conversion": tuple(CONVERSIONS),
    "implementation": ("eager", "sdpa", "subquad"),
    "cache": ("none", "dynamic", "static", "dynamic_chunks", "static_chunks"),
    "padding": ("none", "ones", "left", "right", "inside"),
    "variant": ("plain", "lora_before", "lora_after", "compiled"),
}


@dataclass(frozen=True)
class Case:
    """A cell of the matrix."""

    kind: str
    conversion: str
    implementation: str
    cache: str
    padding: str
    variant: str

    def __str__(self) -> str:
        return "-".join(getattr(self, axis) for axis in AXES)


def whole() -> list[Case]:
    """Every cell that makes sense and is not refused."""
    return [case for case in _cells() ]

def _cells() -> list[Case]:
    return [Case(*values) for values in product(*AXES.values())]
