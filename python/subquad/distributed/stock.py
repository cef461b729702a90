"""Softmax attention and dense MLPs beside converted layers, split as their model's own plan says, by torch's styles."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from ..convert.attentions import ATTENTION
from ..convert.mlps import MLP
from ..convert.replace import Kind, replacement_of
from ..nn._children import plain
from ..nn._sharded import sharded

_STYLES: dict[str, type[ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}


def plans(model: nn.Module, size: int) -> dict[str, dict[str, ParallelStyle]]:
    """Styles for the Linears of each layer that is not converted, by the layer's name.

    Those alone whose every parameter the `base_model_tp_plan` of the model's config splits by rows or columns, and whose heads or
    neurons `size` divides. What a plan keeps whole inside a layer, such as norms of q and k, would get a part of its gradient.
    """
    plan = getattr(getattr(model, "config", None), "base_model_tp_plan", None) or {}
    found = {}
    for name, module in model.named_modules():
        kind = next((kind for kind in (ATTENTION, MLP) if _is(name, module, kind)), None)
        if kind is None:
            continue
        styles = {
            child: _style(plan, f"{name}.{child}") for child, part in module.named_children() if _has_parameters(part)
        }
        own = next(module.parameters(recurse=False), None)
        if own is None and styles and all(styles.values()) and _fits(module, kind, styles, size):
            found[name] = {child: _STYLES[style]() for child, style in styles.items()}
    return found


def _is(name: str, module: nn.Module, kind: Kind) -> bool:
    """Whether a module is an original layer of a kind."""
    return name.rpartition(".")[2] in kind.places and kind.looks(module) and replacement_of(module, kind.name) is None


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _style(plan: dict[str, str], name: str) -> str:
    """Of a Linear, where it is one of torch's; "" for none."""
    generic = re.sub(r"\.\d+(?=\.|$)", ".*", name)
    style = next((style for key, style in plan.items() if generic == key or generic.endswith(f".{key}")), "")
    return style if style in _STYLES else ""


def _fits(module: Any, kind: Kind, styles: dict[str, str], size: int) -> bool:
    linears = {name: getattr(module, name) for name in styles}
    if not all(plain(linear, nn.Linear) and not sharded(linear.weight) for linear in linears.values()):
        return False
    if list(styles.values()).count("rowwise") != 1:
        return False
    unit = module.head_dim if kind is ATTENTION else 1
    parts = [x.out_features if styles[name] == "colwise" else x.in_features for name, x in linears.items()]
    return all(part % (unit * size) == 0 for part in parts)
