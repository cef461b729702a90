"""Self-attention layers of a model, and what can take their place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, fields
from operator import methodcaller
from typing import Any

from torch import nn

from ..nn._options import LawcatConfig, SinkConfig
from ..nn.lawcat import LawcatAttention
from ..nn.sink_attention import SinkAttention
from ..nn.superlinear_attention import SuperlinearAttention
from ..superlinear import SuperlinearConfig
from .replace import ConversionReport, Kind, Replacement, find, plain, register, replace, restore


def _looks(module: nn.Module) -> bool:
    return hasattr(module, "o_proj") and hasattr(module, "head_dim")


ATTENTION = Kind(
    name="attention",
    places=("self_attn", "attention", "attn"),
    looks=_looks,
    expected="attention layers (q_proj, ..., o_proj, head_dim)",
)


def _options(attention: LawcatAttention | SinkAttention) -> dict[str, Any]:
    """What it was made with; `keep` may have been set since."""
    own = {name: getattr(attention, name) for name in ("keep",) if hasattr(attention, name)}
    return {name: plain(value) for name, value in asdict(attention.config).items()} | own


LAWCAT = register(
    Replacement(
        kind=ATTENTION,
        name="lawcat",
        layer=LawcatAttention,
        config=LawcatConfig,
        constructor="LawcatAttention.from_attention",
        make=LawcatAttention.from_attention,
        restore=methodcaller("to_attention"),
        new_parameters=methodcaller("new_parameters"),
        options=_options,
    )
)


SINK = register(
    Replacement(
        kind=ATTENTION,
        name="sink",
        layer=SinkAttention,
        config=SinkConfig,
        constructor="SinkAttention.from_attention",
        make=SinkAttention.from_attention,
        restore=methodcaller("to_attention"),
        new_parameters=methodcaller("new_parameters"),
        options=_options,
    )
)


def _superlinear(attention: nn.Module, **options: Any) -> SuperlinearAttention:
    return SuperlinearAttention.from_attention(attention, SuperlinearConfig(**options))


def _superlinear_options(attention: SuperlinearAttention) -> dict[str, Any]:
    return {field.name: getattr(attention.config, field.name) for field in fields(SuperlinearConfig) if field.init}


SUPERLINEAR = register(
    Replacement(
        kind=ATTENTION,
        name="superlinear",
        layer=SuperlinearAttention,
        config=SuperlinearConfig,
        constructor="SuperlinearAttention.from_attention",
        make=_superlinear,
        restore=methodcaller("to_attention"),
        new_parameters=methodcaller("new_parameters"),
        options=_superlinear_options,
    )
)


def find_attentions(model: nn.Module, layers: Iterable[int | str] | None = None) -> dict[str, nn.Module]:
    """The self-attention layers of a model, softmax or converted; see `find`."""
    return find(model, ATTENTION, layers)


def convert_attentions(
    model: nn.Module, config: LawcatConfig | None = None, layers: Iterable[int | str] | None = None
) -> ConversionReport:
    """Replace attention layers of a model by `LawcatAttention`s that share their projections; see `replace`."""
    return replace(model, [(LAWCAT, config or LawcatConfig())], layers)


def revert_attentions(model: nn.Module) -> list[str]:
    """Put back the modules that `convert_attentions` replaced; see `restore`."""
    return restore(model, ATTENTION.name)
