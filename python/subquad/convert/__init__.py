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
from .gguf import GgufFile
from .mlps import CatsConfig, convert_mlps, find_mlps, revert_mlps
from .replace import ConversionReport, Kind, Replacement, find, match_layer, named, register, replace, restore
from .weights import Rounded, convert_weights, to_dense

__all__ = [
    "CatsConfig",
    "ConversionReport",
    "GgufFile",
    "Kind",
    "LawcatConfig",
    "Replacement",
    "Rounded",
    "SinkConfig",
    "SuperlinearConfig",
    "convert_attentions",
    "convert_mlps",
    "convert_weights",
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
    "to_dense",
]
