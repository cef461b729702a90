"""What counts as a gated MLP: its projections, its activation, and the proof that it computes what we assume."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import _checks
from ..reference.cats_activation import ACTIVATIONS, activate
from ._children import FLOATS, features, placement, plain
from ._sharded import NEURONS, check_placed, localised, mesh_of

SPLIT = ("gate_proj", "up_proj", "down_proj")
FUSED = ("gate_up_proj", "down_proj")

# Class names rather than classes, so that transformers need not be installed.
_MODULES = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "ReLU": "relu",
}
_NAMES = {"swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_FUNCTIONS: dict[Callable[..., torch.Tensor], str] = {
    F.silu: "silu",
    F.relu: "relu",
    torch.relu: "relu",
}


def activation_name(act: object) -> str:
    """The activation code of a module, function or name.

    Raises:
        ValueError: if the activation is none of silu, gelu_tanh, gelu and relu.
    """
    name: str | None = None
    if isinstance(act, str):
        name = _NAMES.get(act, act if act in ACTIVATIONS else None)
    elif isinstance(act, nn.GELU):
        name = "gelu_tanh" if act.approximate == "tanh" else "gelu"
    elif isinstance(act, nn.Module):
        name = _MODULES.get(type(act).__name__)
    elif act is F.gelu:
        name = "gelu"
    elif isinstance(act, functools.partial) and act.func is F.gelu and not act.args:
        name = "gelu_tanh" if act.keywords.get("approximate") == "tanh" else "gelu"
    elif callable(act):
        name = _FUNCTIONS.get(act)
    if name is None:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)} or a module computing one, got {act!r}")
    return name


@dataclass(frozen=True)
class GatedParts:
    """The pieces of a gated MLP: projections by attribute name, and the activation code."""

    projections: dict[str, nn.Module]
    activation: str


def looks_gated(module: nn.Module) -> bool:
    """Whether the module has the attributes of a gated MLP; says nothing about whether it can be converted."""
    return any(all(isinstance(getattr(module, n, None), nn.Module) for n in names) for names in (SPLIT, FUSED))


def gated_activation(mlp: nn.Module) -> str:
    """The activation code of a gated MLP, from `act_fn`, `activation_fn` or `act`."""
    for attribute in ("act_fn", "activation_fn", "act"):
        act = getattr(mlp, attribute, None)
        if act is not None:
            return activation_name(act)
    raise ValueError(f"mlp: {type(mlp).__name__} has no act_fn, activation_fn or act")


def gated_parts(mlp: nn.Module) -> GatedParts:
    """Take a gated MLP apart, without changing it.

    Raises:
        ValueError: if a projection is missing or no linear map, shapes disagree, the activation is unknown,
            `pretraining_tp` exceeds 1, or the module does not compute down(act(gate(x)) * up(x)).
    """
    kind = type(mlp).__name__
    if not looks_gated(mlp):
        raise ValueError(f"mlp: expected a module with {', '.join(SPLIT)} (or {', '.join(FUSED)}), got {kind}")
    if "modules_to_save" in mlp._modules:
        raise ValueError("mlp: expected the MLP itself, got peft's copies of it (modules_to_save); convert first")
    names = FUSED if isinstance(getattr(mlp, "gate_up_proj", None), nn.Module) else SPLIT
    parts = GatedParts({name: getattr(mlp, name) for name in names}, gated_activation(mlp))
    slices = getattr(getattr(mlp, "config", None), "pretraining_tp", None) or 1
    if slices > 1:
        raise ValueError(f"mlp.config.pretraining_tp: expected 1, got {slices}")
    _check_shapes(parts.projections)
    check_placed(mlp, NEURONS, halves=FUSED[0])
    down = parts.projections["down_proj"]
    mesh = mesh_of(down)
    with nullcontext() if mesh is None else localised(mlp, mesh, down):
        _check_formula(mlp, parts)
    return parts


def _check_shapes(projections: dict[str, nn.Module]) -> None:
    """Sizes of all projections, and dtypes and devices of those whose weights can be read."""
    sizes = {name: features(child) for name, child in projections.items()}
    for name, size in sizes.items():
        if size is None:
            kind = type(projections[name]).__name__
            raise ValueError(f"mlp.{name}: expected a linear map with in_features and out_features, got {kind}")
    intermediate, hidden = sizes["down_proj"]  # type: ignore[misc]
    for name, size in sizes.items():
        rows = 2 * intermediate if name == "gate_up_proj" else intermediate
        if name != "down_proj" and size != (hidden, rows):
            raise ValueError(
                f"mlp.{name}.weight: expected shape {(rows, hidden)} to fit down_proj {(hidden, intermediate)}, got "
                f"{size[::-1]}"  # type: ignore[index]
            )
    read = {name: child.weight for name, child in projections.items() if plain(child, nn.Linear)}
    for name, weight in read.items():
        if weight.dtype not in FLOATS:
            raise ValueError(f"mlp.{name}.weight: expected a float dtype of 16, 32 or 64 bits, got {weight.dtype}")
        last, like = next(reversed(read.items()))
        if weight.dtype != like.dtype or weight.device != like.device:
            raise ValueError(
                f"mlp.{name}.weight: expected {like.dtype} on {like.device} like {last}, got {weight.dtype} on "
                f"{weight.device}"
            )


@torch.no_grad()
def _check_formula(mlp: nn.Module, parts: GatedParts) -> None:
    """Compare with the module on one token: scale factors, inner norms or clipping would be lost silently."""
    down: Any = parts.projections["down_proj"]
    device, dtype = placement(down)
    if device.type == "meta":
        return
    x = torch.arange(1, down.out_features + 1, device=device).float().cos().to(dtype)[None, None]
    with _without_dropout(mlp):
        if "gate_up_proj" in parts.projections:
            z, u = parts.projections["gate_up_proj"](x).chunk(2, dim=-1)
        else:
            z, u = parts.projections["gate_proj"](x), parts.projections["up_proj"](x)
        expected, got = down(activate(z, parts.activation) * u).double(), mlp.forward(x).double()
    if _checks.traced(expected):
        return
    tolerance = 3e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-3
    if got.shape != expected.shape or (got - expected).norm() > tolerance * expected.norm():
        raise ValueError(
            f"mlp: {type(mlp).__name__} does not compute down(act(gate(x)) * up(x)) with act = {parts.activation}; a "
            "CATS version would change its results"
        )


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """Of adapters, in training. Flags alone: `eval()` may do more."""
    active = [part for part in module.modules() if part.training and isinstance(part, nn.modules.dropout._DropoutNd)]
    try:
        for part in active:
            part.training = False
        yield
    finally:
        for part in active:
            part.training = True
