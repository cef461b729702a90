"""Models of the transformers library: `convert` their layers, or `register` our attention for all of them.

Converting recognises modules by their attributes and never imports the library; `register` imports it when it is called.
"""

from __future__ import annotations

from ...convert import CatsConfig, ConversionReport, LawcatConfig, SinkConfig, SuperlinearConfig, to_dense
from ...nn.cats_mlp import dense_state_dict
from .attention import attention_forward, register
from .convert import convert, revert
from .masks import attention_mask
from .saving import load_converted

__all__ = [
    "CatsConfig",
    "ConversionReport",
    "LawcatConfig",
    "SinkConfig",
    "SuperlinearConfig",
    "attention_forward",
    "attention_mask",
    "convert",
    "dense_state_dict",
    "load_converted",
    "register",
    "revert",
    "to_dense",
]
