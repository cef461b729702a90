"""Layers of a model exchanged for others that share their weights, and put back: all or nothing."""

from __future__ import annotations

from .attentions import (
    LawcatConfig,
    SinkConfig,
    SuperlinearConfig,
    convert_attentions,
    find_attentions,
    revert_attentions,
)
from .mlps import CatsConfig, convert_mlps, find_mlps, revert_mlps
from .replace import ConversionReport, Kind, Replacement, find, match_layer, named, register, replace, restore

__all__ = [
    "CatsConfig",
    "ConversionReport",
    "Kind",
    "LawcatConfig",
    "Replacement",
    "SinkConfig",
    "SuperlinearConfig",
    "convert_attentions",
    "convert_mlps",
    "find",
    "find_attentions",
    "find_mlps",
    "match_layer",
    "named",
    "register",
    "replace",
    "restore",
    "revert_attentions",
    "revert_mlps",
]
