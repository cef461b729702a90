"""Weights of a model in few bits: every Linear quantised, or taken from a file. The dense weights are dropped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from operator import methodcaller
from typing import Any, Protocol

import torch
from torch import nn

from .. import _checks
from ..nn._children import check_whole, placement, plain
from ..nn._codes import Codes, check_dense_dtype
from ..nn._gated import FUSED, SPLIT
from ..nn.cats_mlp import CATSMLP
from ..nn.quantised_cats_mlp import QuantisedCATSMLP, QuantisedDown
from ..nn.quantised_embedding import QuantisedEmbedding
from ..nn.quantised_linear import QuantisedLinear
from ..reference.quantised_linear import FORMATS, GROUP
from .mlps import CATS, MLP
from .record import same_layer
from .replace import (
    ConversionReport,
    Exchange,
    Kind,
    Replacement,
    check_places,
    exchange,
    find,
    listed,
    match_layer,
    recorded_replacement,
    register,
    replace,
    replacement_of,
)

# --- what a config says of them ----------------------------------------

WEIGHT = Kind(
    name="weight",
    places=(),
    looks=lambda module: isinstance(module, nn.Linear),
    expected="Linears",
)


@dataclass(frozen=True)
class CodesConfig:
    """How a weight is kept; `shared` of a down projection, whose scales may belong to 32 neurons."""

    weights: str = "int8"
    shared: bool = False


def _linear(linear: nn.Linear, weights: str, shared: bool) -> QuantisedLinear:
    return QuantisedLinear.from_linear(linear, weights)


def _down(linear: nn.Linear, weights: str, shared: bool) -> QuantisedDown:
    rows: Any = QuantisedLinear.from_linear(linear, weights) if shared else linear
    return QuantisedDown.from_linear(rows, weights)


def _embedding(embedding: nn.Embedding, weights: str, shared: bool) -> QuantisedEmbedding:
    return QuantisedEmbedding.from_embedding(embedding, weights)


def _options(module: Any) -> dict[str, Any]:
    return {"weights": module.format, "shared": getattr(module, "shared", False)}


LINEAR, DOWN, EMBEDDING = (
    register(
        Replacement(
            kind=WEIGHT,
            name=name,
            layer=layer,
            config=CodesConfig,
            constructor=constructor,
            make=make,
            restore=methodcaller("to_dense"),
            options=_options,
        )
    )
    for name, layer, constructor, make in (
        ("linear", QuantisedLinear, "QuantisedLinear.from_linear", _linear),
        ("down", QuantisedDown, "QuantisedDown.from_linear", _down),
        ("embedding", QuantisedEmbedding, "QuantisedEmbedding.from_embedding", _embedding),
    )
)

# --- where the codes come from ----------------------------------------


class Left(Exception):
    """A weight that stays as it is; the message says why."""


class Source(Protocol):
    """What gives a Linear its codes: `Rounded`, or a `GgufFile`."""

    def make(self, name: str, linear: nn.Linear, down: bool) -> QuantisedLinear | QuantisedDown:
        """The module in the place of a Linear, neuron by neuron for a `down` projection of CATS; or raises `Left`."""

    def check(self, name: str, module: Codes) -> None:
        """ValueError for a module that is quantised already, and otherwise than it would be now."""


@dataclass(frozen=True)
class Rounded:
    """Codes of the model's own weights, rounded.

    Attributes:
        weights: "int8", "int4" or "int4_min".
        gate_weights: of the gates of MLPs; None for `weights`.
    """

    weights: str
    gate_weights: str | None = None

    def __post_init__(self) -> None:
        _checks.choice("weights", self.weights, tuple(FORMATS))
        if self.gate_weights is not None:
            _checks.choice("gate_weights", self.gate_weights, tuple(FORMATS))

    def format(self, name: str) -> str:
        """Of a Linear of this name."""
        gate = self.gate_weights is not None and name.rpartition(".")[2] == "gate_proj"
        return str(self.gate_weights) if gate else self.weights

    def make(self, name: str, linear: nn.Linear, down: bool) -> QuantisedLinear | QuantisedDown:
        """The module in the place of a Linear.

        Raises:
            Left: its size has no groups.
            ValueError: weights that are not finite.
        """
        if self.gate_weights is not None and name.rpartition(".")[2] == FUSED[0]:
            raise ValueError(
                f"gate_weights: expected None for a fused {FUSED[0]}, whose rows have one format, got {self.gate_weights!r}"
            )
        side, size = ("out_features", linear.out_features) if down else ("in_features", linear.in_features)
        if size % GROUP:
            raise Left(f"{side}: expected a multiple of {GROUP}, got {size}")
        made = QuantisedDown if down else QuantisedLinear
        return made.from_linear(linear, self.format(name))

    def check(self, name: str, module: Codes) -> None:
        """ValueError for a module that is quantised in another format."""
        wanted = self.format(name)
        if module.format != wanted:
            raise ValueError(
                f"{name}: weights: expected {module.format!r}, which it is in, got {wanted!r}; its dense weights are gone"
            )


# --- converting ----------------------------------------


def convert_weights(
    model: nn.Module,
    source: Source,
    conversions: Iterable[tuple[Replacement, Any]] = (),
    layers: Iterable[int | str] | None = None,
) -> ConversionReport:
    """Exchange layers as `replace` does, and every Linear for one in few bits; dense weights are dropped on success.

    Args:
        model: any module.
        source: of the codes.
        conversions: of MLPs or attention, as in `replace`. CATS reads the codes.
        layers: see `find`; a name stands for the Linears in it, too. None for all, and for an embedding that is tied to one.

    Returns:
        Names of the layers converted by this call; `left` says which Linears are dense still, and why.

    Raises:
        ValueError: see `replace`; or there is no Linear, one that is in another format, one inside an adapter, an MLP of CATS of
            which a part stays dense, weights that are not finite or lie on several processes.
    """
    _checks.module("model", model)
    wanted = None if layers is None else listed(layers)
    attention = [(by, config) for by, config in conversions if by.kind is not MLP]
    mlps = [(by, config) for by, config in conversions if by.kind is MLP]
    with ExitStack() as undo:
        reports = [replace(model, attention, wanted, undo)] if attention else []
        chosen = _chosen(model, wanted)
        sparse = find(model, MLP, wanted) if mlps else _cats(model, chosen)
        codes, left = _made(model, source, chosen, sparse, embeddings=wanted is None)
        own = exchange(model, codes, undo)
        _tell_originals(model, codes, undo)
        for name in sparse:
            _check_parts(name, model.get_submodule(name), left)
        if mlps:
            reports.append(replace(model, mlps, wanted, undo))
        dense = {name: m for name, m in model.named_modules() if type(m) is CATSMLP and isinstance(m.down_proj, Codes)}
        reports.append(
            exchange(model, [Exchange(n, m, QuantisedCATSMLP.from_cats(m), CATS) for n, m in dense.items()], undo)
        )
        undo.pop_all()
    inside = tuple(f"{name}." for name in sparse)
    report = ConversionReport(name for part in reports for name in part)
    report.extend(name for name in own if not name.startswith(inside))
    report.new_parameters = sum(part.new_parameters for part in reports)
    report.shared_parameters = sum(p.numel() for p in _parameters(model, report)) - report.new_parameters
    report.left = left
    return report


def add_shells(model: nn.Module, groups: Iterable[dict[str, Any]]) -> None:
    """Put in the modules in few bits that a record names, for codes to be loaded into.

    Args:
        model: dense, on the meta device.
        groups: of `recorded`; those of other kinds are left out.
    """
    for group in groups:
        if group["kind"] != WEIGHT.name:
            continue
        by, _ = recorded_replacement(group)
        modules = dict(model.named_modules(remove_duplicate=False))
        for recorded_name in group["layers"]:
            name = same_layer(recorded_name, modules)
            try:
                shell = by.make(modules[name], **group["options"])
            except (AttributeError, TypeError, ValueError) as error:
                raise ValueError(f"config: {name}: expected a layer that was converted, got {error}") from error
            model.set_submodule(name, shell, strict=True)


def to_dense(model: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """Exchange weights in few bits for dense ones, in place: what the codes stand for. CATS goes with them.

    Args:
        model: any module.
        dtype: of the new weights; None for that of the model's parameters. What is tied stays tied.

    Returns:
        Names of the modules exchanged.

    Raises:
        TypeError: dtype is no floating one.
    """
    _checks.module("model", model)
    dtype = placement(model)[1] if dtype is None else check_dense_dtype(dtype)
    names = [name for name, module in model.named_modules() if name and isinstance(module, QuantisedCATSMLP)]
    for name in names:
        mlp: Any = model.get_submodule(name)
        model.set_submodule(name, mlp.to_dense(dtype) if mlp.original is None else CATSMLP.to_dense(mlp))
    dense: dict[int, nn.Module] = {}
    weights: dict[int, nn.Parameter] = {}
    exchanges = []
    for name, module in model.named_modules(remove_duplicate=False):
        by = replacement_of(module, WEIGHT.name)
        if by is None:
            continue
        if id(module) not in dense:
            new: Any = module.to_dense(dtype)  # type: ignore[operator]
            new.weight = weights.setdefault(id(module.weight), new.weight)
            dense[id(module)] = new
        exchanges.append(Exchange(name, module, dense[id(module)], by))
    with ExitStack() as undo:
        exchange(model, exchanges, undo)
        _tell_originals(model, exchanges, undo)
        undo.pop_all()
    return names + [e.name for e in exchanges]


def _cats(model: nn.Module, chosen: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Layers of CATS with a chosen projection."""
    outer = {name.rpartition(".")[0] for name in chosen}
    return {name: module for name, module in model.named_modules() if name in outer and isinstance(module, CATSMLP)}


def _made(
    model: nn.Module, source: Source, chosen: dict[str, nn.Module], sparse: dict[str, nn.Module], embeddings: bool
) -> tuple[list[Exchange], dict[str, str]]:
    """New modules beside a model that has not changed, and what stays dense."""
    check_places(model, list(chosen))
    downs = {f"{name}.down_proj" for name in sparse}
    tied = _tied(model, chosen)
    if tied and not embeddings:
        raise ValueError(
            f"layers: expected none whose weight is tied to {next(iter(tied))!r}, of which both would have to change, got one; "
            "convert all layers, or name others"
        )
    made: dict[int, Any] = {}
    weights: dict[int, Any] = {}
    exchanges: list[Exchange] = []
    left: dict[str, str] = {}
    for name, module in chosen.items():
        if isinstance(module, Codes):
            source.check(name, module)
            continue
        try:
            for other, embedding in tied.items():
                if embedding.weight is module.weight:  # type: ignore[union-attr]
                    _check_embedding(other, embedding)
            if id(module) not in made:
                made[id(module)] = _module(source, name, module, name in downs, weights)
        except Left as reason:
            left[name] = str(reason)
            continue
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{name}: {error}") from error
        exchanges.append(Exchange(name, module, made[id(module)], DOWN if name in downs else LINEAR))
    for name, embedding in tied.items():
        codes = weights.get(id(embedding.weight))
        if codes is None:
            left[name] = "tied to a weight that stays dense"
            continue
        new = QuantisedEmbedding.from_bytes(codes.weight, format=codes.format, like=embedding)  # type: ignore[arg-type]
        exchanges.append(Exchange(name, embedding, new, EMBEDDING))
    return exchanges, left


def _module(source: Source, name: str, linear: Any, down: bool, weights: dict[int, Any]) -> nn.Module:
    """The new module; one codes for a weight that several have."""
    check_whole(linear)
    if not plain(linear, nn.Linear):
        raise Left(f"a {type(linear).__name__} that is called, for it has hooks, is offloaded or of another class")
    known = weights.get(id(linear.weight))
    if known is not None and not down:
        return QuantisedLinear.from_bytes(known.weight, linear.bias, format=known.format).train(linear.training)
    made: nn.Module = source.make(name, linear, down)
    if not down:
        weights[id(linear.weight)] = made
    return made


def _chosen(model: nn.Module, layers: list[int | str] | None) -> dict[str, nn.Module]:
    """Linears, dense or not, but for those that a conversion of attention has brought.

    Raises:
        ValueError: there is none, an entry of `layers` names none, or one is inside an adapter.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    new = {
        id(parameter)
        for module in modules.values()
        if (by := replacement_of(module, "attention")) is not None
        for parameter in by.new_parameters(module).values()
    }
    found: dict[str, nn.Module] = {
        name: module
        for name, module in modules.items()
        if name and isinstance(module, (nn.Linear, QuantisedLinear, QuantisedDown)) and id(module.weight) not in new
    }
    if not found:
        raise ValueError(f"model: expected one with Linears in it, got a {type(model).__name__}")
    if layers is not None:
        chosen = _meant(list(found), layers)
        found = {name: module for name, module in found.items() if name in chosen}
    for name in found:
        for outer in _above(name):
            if any(child in modules[outer]._modules for child in ("base_layer", "modules_to_save")):  # as peft has them
                kind = type(modules[outer])
                raise ValueError(
                    f"{name}: expected no adapter around it, got {kind.__module__}.{kind.__qualname__}, which codes could not be "
                    "merged with; merge it first, or make weights dense again with to_dense"
                )
    return found


def _above(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def _meant(names: list[str], layers: list[int | str]) -> set[str]:
    """Those that an entry of `layers` means, by number, by name or as a part of what it names."""
    meant: set[str] = set()
    for layer in layers:
        inner = [name for name in names if isinstance(layer, str) and name.startswith(f"{layer}.")]
        meant.update(inner or match_layer(names, layer))
    return meant


def _tied(model: nn.Module, chosen: dict[str, nn.Module]) -> dict[str, nn.Embedding]:
    """Embeddings with the weight of a Linear."""
    weights = {id(module.weight) for module in chosen.values()}
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and isinstance(module, nn.Embedding) and id(module.weight) in weights
    }


def _check_embedding(name: str, embedding: nn.Embedding) -> None:
    try:
        QuantisedEmbedding.check(embedding)
    except (TypeError, ValueError) as error:
        raise Left(f"tied to {name}: {error}") from error


def _check_parts(name: str, mlp: nn.Module, left: dict[str, str]) -> None:
    """Of the projections of an MLP of CATS, all are in few bits or none."""
    parts = {child: getattr(mlp, child) for child in (*SPLIT, FUSED[0]) if hasattr(mlp, child)}
    dense = [f"{name}.{child}" for child, part in parts.items() if not isinstance(part, Codes)]
    if dense and len(dense) < len(parts):
        reason = left.get(dense[0], f"a {type(parts[dense[0].rpartition('.')[2]]).__name__} that layers do not name")
        raise ValueError(f"{dense[0]}: expected a weight in few bits like the others, got {reason}")


def _tell_originals(model: nn.Module, exchanges: list[Exchange], undo: ExitStack) -> None:
    """What a converted layer would give back must not keep the old modules."""
    for e in exchanges:
        outer, _, child = e.name.rpartition(".")
        original = getattr(model.get_submodule(outer), "original", None)
        if isinstance(original, nn.Module) and getattr(original, child, None) is e.old:
            undo.callback(setattr, original, child, e.old)
            setattr(original, child, e.new)


def _parameters(model: nn.Module, names: Iterable[str]) -> list[nn.Parameter]:
    return list({id(p): p for name in names for p in model.get_submodule(name).parameters()}.values())
