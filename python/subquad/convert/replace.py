"""The one way in which layers of a model are exchanged: find, make, settle, put in place; roll back if anything fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any

import torch
from torch import nn

from .. import _checks
from ..nn._children import places_children
from .record import record


def _nothing(module: Any) -> None:
    pass


def _no_parameters(module: Any) -> dict[str, nn.Parameter]:
    return {}


def _no_options(module: Any) -> dict[str, Any]:
    return {}


def _agrees(module: Any, config: Any) -> None:
    pass


def plain(value: Any) -> Any:
    """A value of an option as JSON says it."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


@dataclass(frozen=True)
class Kind:
    """What layers of one kind are like in a model that nothing has been replaced in.

    Attributes:
        name: "mlp" or "attention".
        places: what such a module is called by its parent.
        looks: whether a module has the attributes of one; it may still be one that cannot be converted.
        expected: the same in words, for messages.
    """

    name: str
    places: tuple[str, ...]
    looks: Callable[[nn.Module], bool]
    expected: str


@dataclass(frozen=True)
class Replacement:
    """One way to replace the layers of a kind, in the registry under (kind.name, name).

    Attributes:
        kind, name: of `convert(model, mlp="cats")`.
        layer: class of the new modules. Their `original` is the module that they were made from, or None; not a submodule.
        config: dataclass of the options.
        constructor: how a layer is converted alone, for a message.
        make: a new module of (module, **options) that shares its weights. Changes nothing that the model has.
        restore: the original of a new module, its weights laid out as they were.
        settle: changes what a new module shares with its original, such as the layout of a weight.
        unsettle: undoes that, also when it was interrupted.
        new_parameters: those that the model had not, by name.
        options: of a new module as it is now, for another config: what JSON can say.
        check: ValueError for a new module and another config that differ in what `options` leaves out.
    """

    kind: Kind
    name: str
    layer: type[nn.Module]
    config: type
    constructor: str
    make: Callable[..., nn.Module]
    restore: Callable[[Any], nn.Module]
    settle: Callable[[Any], None] = _nothing
    unsettle: Callable[[Any], None] = _nothing
    new_parameters: Callable[[Any], dict[str, nn.Parameter]] = _no_parameters
    options: Callable[[Any], dict[str, Any]] = _no_options
    check: Callable[[Any, Any], None] = _agrees


_REGISTRY: dict[tuple[str, str], Replacement] = {}


def register(replacement: Replacement) -> Replacement:
    """Make a replacement known to `convert` and `revert`.

    Raises:
        ValueError: its name is taken.
    """
    if _REGISTRY.setdefault((replacement.kind.name, replacement.name), replacement) is not replacement:
        raise ValueError(f"name: expected one that no {replacement.kind.name} has yet, got {replacement.name!r}")
    return replacement


def named(kind: str) -> dict[str, Replacement]:
    """The replacements of a kind, by name."""
    return {name: replacement for (of, name), replacement in _REGISTRY.items() if of == kind}


def recorded_replacement(group: dict[str, Any]) -> tuple[Replacement, Any]:
    """What a group of a record was converted by, with its config.

    Raises:
        ValueError: an unknown kind, name or option.
    """
    try:
        if not isinstance(group["layers"], list):
            raise ValueError("layers are no list")
        by = _REGISTRY[group["kind"], group["name"]]
        return by, by.config(**group["options"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"config: expected a conversion that convert has written, got {group!r}: {error!r}") from error


def replacement_of(module: nn.Module, kind: str) -> Replacement | None:
    """What made a module; None if it is an original one."""
    return next((r for r in named(kind).values() if isinstance(module, r.layer)), None)


# --- finding ----------------------------------------


def find(model: nn.Module, kind: Kind, layers: Iterable[int | str] | None = None) -> dict[str, nn.Module]:
    """The layers of a kind, original or converted, by qualified name, in order.

    A model that is itself one is found under the name "", a module that is used twice under both names.

    Args:
        model: any module.
        kind: what is looked for.
        layers: decoder layer numbers (negative from the end) or qualified names; None for all.

    Raises:
        ValueError: if there is none, or an entry of `layers` names none.
        TypeError: no module, or `layers` is no list of numbers and names.
    """
    _checks.module("model", model)
    found = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if replacement_of(module, kind.name) or (name.rpartition(".")[2] in ("", *kind.places) and kind.looks(module))
    }
    if not found:
        raise ValueError(f"model: expected {kind.expected}, got a {type(model).__name__}")
    if layers is None:
        return found
    wanted = {name for layer in listed(layers) for name in match_layer(found, layer)}
    return {name: module for name, module in found.items() if name in wanted}


def listed(layers: Any) -> list[int | str]:
    """`layers` as a list; TypeError for what is one layer, or none at all."""
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Iterable):
        raise TypeError(f"layers: expected a list of decoder layer numbers or names, got {layers!r}")
    return list(layers)


def match_layer(names: Iterable[str], layer: int | str, argument: str = "layers") -> list[str]:
    """Those of `names` that `layer` means: a qualified name, or a layer number (the first number in a name).

    Raises:
        ValueError: if there is none; the message speaks of `argument`.
        TypeError: neither a number nor a name.
    """
    if isinstance(layer, bool) or not isinstance(layer, (str, Integral)):
        raise TypeError(f"{argument}: expected numbers or names, got {layer!r}")
    numbers = {name: next((int(part) for part in name.split(".") if part.isdigit()), None) for name in names}
    count = 1 + max((n for n in numbers.values() if n is not None), default=-1)
    wanted = layer + count if isinstance(layer, int) and layer < 0 else layer
    hits = [name for name, number in numbers.items() if wanted in (name, number)]
    if not hits:
        raise ValueError(
            f"{argument}: expected numbers below {count} or names such as {next(iter(numbers))!r}, got {layer!r}"
        )
    return hits


# --- exchanging ----------------------------------------


class ConversionReport(list[str]):
    """Qualified names of the modules that a conversion replaced.

    Attributes:
        new_parameters: how many numbers they have that the model had not: what attention transfer trains.
        shared_parameters: how many they took over.
        left: why a layer stayed as it was, by name: with `weights`, those whose weights are not in few bits.
    """

    new_parameters = 0
    shared_parameters = 0

    def __init__(self, names: Iterable[str] = ()) -> None:
        super().__init__(names)
        self.left: dict[str, str] = {}


@dataclass(frozen=True)
class Exchange:
    """`new` comes to the place of `old` in the model."""

    name: str
    old: nn.Module
    new: nn.Module
    by: Replacement


def replace(
    model: nn.Module,
    conversions: Iterable[tuple[Replacement, Any]],
    layers: Iterable[int | str] | None = None,
    undo: ExitStack | None = None,
) -> ConversionReport:
    """Exchange layers of a model for new ones that share their weights, in place.

    Layers that are converted already, with the same options, stay as they are. All or nothing: whatever is raised, and wherever,
    the model has its very modules again, with their weights laid out as they were.

    Args:
        model: any module.
        conversions: replacements, each with a config of its class.
        layers: see `find`.
        undo: gets what puts the old layers back, where this is a part of something larger.

    Returns:
        Names of the modules converted by this call, and counts of their parameters.

    Raises:
        ValueError: see `find`; or a layer cannot be converted, lies in another, is offloaded with another, or is converted
            already, with other options or, where `layers` names it, to something else; the message names it.
        TypeError: an option of a wrong type.
    """
    wanted = None if layers is None else listed(layers)
    found = [(replacement, config, _found(model, replacement, config, wanted)) for replacement, config in conversions]
    names = [name for _, _, chosen in found for name in chosen]
    _check_apart(names)
    check_places(model, names)
    exchanges = [e for replacement, config, chosen in found for e in _made(replacement, config, chosen)]
    if undo is not None:
        return exchange(model, exchanges, undo)
    with ExitStack() as own:
        report = exchange(model, exchanges, own)
        own.pop_all()
    return report


def exchange(model: nn.Module, exchanges: Sequence[Exchange], undo: ExitStack) -> ConversionReport:
    """Put new modules in the places of old ones, and note it in the config.

    Args:
        model: any module.
        exchanges: new modules, made already.
        undo: gets what undoes a step before the step is taken.
    """
    report = _report(exchanges)
    for module, by in {id(e.new): (e.new, e.by) for e in exchanges}.values():
        undo.callback(by.unsettle, module)
        by.settle(module)
    _put(model, undo, exchanges)
    record(model, _converted(model), undo)
    return report


def _found(model: nn.Module, by: Replacement, config: Any, layers: list[int | str] | None) -> dict[str, nn.Module]:
    """The layers that are not converted yet. Of all layers, those that are something else are not meant."""
    chosen = {}
    for name, module in find(model, by.kind, layers).items():
        made = replacement_of(module, by.kind.name)
        if made is None:
            chosen[name] = module
        elif made is by:
            _check_options(name, module, by, config)
        elif layers is not None:
            raise ValueError(f"{name}: expected a layer that is not converted, got one of {made.name!r}; revert first")
    if "" in chosen:
        raise ValueError(f"model: it is itself one of the layers ({by.kind.name}); use {by.constructor}")
    return chosen


def _check_options(name: str, module: nn.Module, by: Replacement, config: Any) -> None:
    """A layer keeps its options, and nobody who asks for others is left to believe that it has those."""
    for option, own in by.options(module).items():
        wanted = plain(getattr(config, option))
        if own != wanted:
            raise ValueError(
                f"{name}: {option}: expected {own!r}, as it was converted with, got {wanted!r}; revert first"
            )
    try:
        by.check(module, config)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _made(by: Replacement, config: Any, chosen: dict[str, nn.Module]) -> list[Exchange]:
    """New modules, beside a model that has not changed."""
    options = {field.name: getattr(config, field.name) for field in fields(by.config) if field.init}
    made: dict[int, nn.Module] = {}
    exchanges = []
    for name, old in chosen.items():
        if id(old) not in made:
            try:
                made[id(old)] = by.make(old, **options)
            except (TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"{name}: {error}") from error
        exchanges.append(Exchange(name, old, made[id(old)], by))
    return exchanges


def _check_apart(names: Sequence[str]) -> None:
    for outer in names:
        inner = next((name for name in names if name.startswith(f"{outer}.")), None)
        if inner is not None:
            raise ValueError(f"layers: expected none inside another, got {inner!r} in {outer!r}; name those you mean")


def check_places(model: nn.Module, names: Sequence[str]) -> None:
    """What offloads a module with all that is in it would look for the parameters of the layer that was there."""
    for outer, module in model.named_modules(remove_duplicate=False):
        inner = next((name for name in names if f"{name}.".startswith(f"{outer}." if outer else "")), None)
        if inner is not None and places_children(module):
            raise ValueError(
                f"{inner}: expected a layer that may be exchanged, got one that accelerate offloads as a part of "
                f"{outer or 'the model'!r} (preload_module_classes); remove the hooks first"
            )


def _report(exchanges: Sequence[Exchange]) -> ConversionReport:
    report = ConversionReport(e.name for e in exchanges)
    new = {id(p): p.numel() for e in exchanges for p in e.by.new_parameters(e.new).values()}
    shared = {id(p): p.numel() for e in exchanges for p in e.new.parameters() if id(p) not in new}
    report.new_parameters, report.shared_parameters = sum(new.values()), sum(shared.values())
    return report


def _converted(model: nn.Module) -> list[dict[str, Any]]:
    """Every converted layer of a model, for its record: layers with the same options together."""
    groups: list[dict[str, Any]] = []
    for name, module in model.named_modules(remove_duplicate=False):
        by = next((r for r in _REGISTRY.values() if isinstance(module, r.layer)), None)
        if by is None:
            continue
        group: dict[str, Any] = {"kind": by.kind.name, "name": by.name, "options": by.options(module)}
        known = next((other for other in groups if group.items() <= other.items()), None)
        if known is None:
            known = group | {"layers": []}
            groups.append(known)
        known["layers"].append(name)
    return groups


def restore(model: nn.Module, *kinds: str, layers: Iterable[int | str] | None = None) -> list[str]:
    """Put back the modules that `replace` exchanged, with their weights in the original layout. All or nothing, too.

    Args:
        model: any module.
        kinds: which layers, "attention" or "mlp".
        layers: see `find`; None for all that are converted.

    Returns:
        Names of the modules put back.

    Raises:
        ValueError: `layers` is given and there is no converted module, or none that an entry names; or a module is offloaded
            with another.
    """
    _checks.module("model", model)
    modules = dict(model.named_modules(remove_duplicate=False))
    converted = {
        name: (module, by)
        for kind in kinds
        for name, module in modules.items()
        if name and (by := replacement_of(module, kind)) and module.original is not None
    }
    if layers is not None:
        if not converted:
            raise ValueError(f"model: expected converted layers, got a {type(model).__name__} without")
        wanted = {name for layer in listed(layers) for name in match_layer(converted, layer)}
        converted = {name: value for name, value in converted.items() if name in wanted}
    check_places(model, list(converted))
    originals: dict[int, nn.Module] = {}
    with ExitStack() as undo:
        for module, by in converted.values():
            if id(module) not in originals:
                undo.callback(by.settle, module)
                originals[id(module)] = by.restore(module)
        _put(model, undo, [Exchange(name, m, originals[id(m)], by) for name, (m, by) in converted.items()])
        record(model, _converted(model), undo)
        undo.pop_all()
    return list(converted)


def _put(model: nn.Module, undo: ExitStack, exchanges: Sequence[Exchange]) -> None:
    for e in exchanges:
        undo.callback(model.set_submodule, e.name, e.old, strict=True)
        model.set_submodule(e.name, e.new, strict=True)
