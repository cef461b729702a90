"""Two children of a layer with the same parameters, which stay the same ones when they are moved, written and loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .. import _checks


def tie(layer: nn.Module, child: str, like: str) -> None:
    """Give a child the parameters of another, for as long as neither is exchanged.

    `to_empty` and `load_state_dict(assign=True)` would take the two apart. State dicts have both names, with separate tensors:
    safetensors refuses shared ones, and what offloads a model looks up every name.
    """
    layer._tied = child, like  # type: ignore[assignment]
    _join(layer)
    layer.register_state_dict_post_hook(_write_apart)
    layer.register_load_state_dict_pre_hook(_before_load)
    layer.register_load_state_dict_post_hook(_after_load)


def _names(layer: nn.Module) -> list[tuple[str, str]]:
    """What is tied at the moment, as pairs of qualified names."""
    child, like = layer._tied  # type: ignore[misc]
    own, other = layer.get_submodule(child)._parameters, layer.get_submodule(like)._parameters
    return [(f"{child}.{n}", f"{like}.{n}") for n, p in own.items() if p is not None and p is other.get(n)]


def _join(layer: nn.Module) -> None:
    child, like = layer._tied  # type: ignore[misc]
    layer.get_submodule(child)._parameters.update(layer.get_submodule(like)._parameters)


@contextmanager
def tied_again(layer: nn.Module) -> Iterator[None]:
    """What is tied before the block is so after it."""
    tied = getattr(layer, "_tied", None) is not None and bool(_names(layer))
    yield
    if tied:
        _join(layer)


def _write_apart(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, _ in _names(layer):
        value = state.get(prefix + name)
        if value is not None and not isinstance(value, nn.Parameter):  # not with keep_vars=True
            state[prefix + name] = value.clone()


def _before_load(
    layer: nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: Any,
    unexpected: Any,
    errors: Any,
) -> None:
    names = _names(layer)
    layer._tied_before_load = bool(names)  # type: ignore[assignment]
    for name, like in names:
        one, other = state.get(prefix + name), state.get(prefix + like)
        if one is not None and other is not None and not _checks.traced(one) and not torch.equal(one, other):
            errors.append(f"{prefix}{name}: expected what {like} has, with which it is shared, got another tensor")
            state[prefix + name] = other


def _after_load(layer: nn.Module, incompatible: Any) -> None:
    if layer.__dict__.pop("_tied_before_load", False):
        _join(layer)
