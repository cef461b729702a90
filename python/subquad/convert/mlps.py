"""Gated MLPs of a model, and what can take their place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from operator import methodcaller
from typing import Any

import torch
from torch import nn

from .. import _checks
from ..nn._codes import Codes
from ..nn._gated import looks_gated
from ..nn._options import CatsConfig
from ..nn.cats_mlp import CATSMLP
from ..nn.quantised_cats_mlp import QuantisedCATSMLP
from .replace import ConversionReport, Kind, Replacement, find, register, replace, restore

MLP = Kind(
    name="mlp",
    places=("mlp", "feed_forward"),  # experts of a mixture are not meant
    looks=looks_gated,
    expected="gated MLPs (gate_proj, up_proj, down_proj)",
)


def _cats(mlp: nn.Module, **options: Any) -> CATSMLP:
    if isinstance(getattr(mlp, "down_proj", None), Codes):
        return QuantisedCATSMLP.from_llama_mlp(mlp, **options)
    return CATSMLP.from_llama_mlp(mlp, lay_out=False, **options)


def _restore(mlp: CATSMLP) -> nn.Module:
    """Its original, with quantised projections if it has those."""
    return CATSMLP.to_dense(mlp)


def _options(mlp: CATSMLP) -> dict[str, Any]:
    """The threshold is in the state dict."""
    return {field.name: getattr(mlp, field.name) for field in fields(CatsConfig) if field.name != "threshold"}


def _check_threshold(mlp: CATSMLP, config: CatsConfig) -> None:
    """None asks for none in particular."""
    if config.threshold is None or _checks.traced(mlp.threshold):
        return
    held, wanted = mlp.threshold, torch.as_tensor(config.threshold, dtype=torch.float32, device=mlp.threshold.device)
    if held.shape != wanted.shape or not bool((held == wanted).all()):
        raise ValueError("threshold: expected None, or that of the layer, got another; set_threshold changes it")


CATS = register(
    Replacement(
        kind=MLP,
        name="cats",
        layer=CATSMLP,
        config=CatsConfig,
        constructor="CATSMLP.from_llama_mlp",
        make=_cats,
        restore=_restore,
        settle=methodcaller("lay_out"),
        unsettle=methodcaller("restore_layout"),
        options=_options,
        check=_check_threshold,
    )
)


def find_mlps(model: nn.Module, layers: Iterable[int | str] | None = None) -> dict[str, nn.Module]:
    """The gated MLPs of a model, dense or converted; see `find`."""
    return find(model, MLP, layers)


def convert_mlps(
    model: nn.Module, config: CatsConfig | None = None, layers: Iterable[int | str] | None = None
) -> ConversionReport:
    """Replace the gated MLPs of a model by `CATSMLP`s that share their weights; see `replace`."""
    return replace(model, [(CATS, config or CatsConfig())], layers)


def revert_mlps(model: nn.Module) -> list[str]:
    """Put back the modules that `convert_mlps` replaced; see `restore`."""
    return restore(model, MLP.name)
