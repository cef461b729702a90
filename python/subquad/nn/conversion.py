"""Finding the gated MLPs of a model, exchanging them for `CATSMLP`, and putting them back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from torch import nn

from ._gated import looks_gated
from ._options import CatsConfig
from .cats_mlp import CATSMLP

MLP_NAMES = ("mlp", "feed_forward")


def find_mlps(model: nn.Module, layers: Iterable[int | str] | None = None) -> dict[str, nn.Module]:
    """The gated MLPs of a model, dense or converted, by qualified name, in order.

    A gated MLP is a `CATSMLP`, or a module named `mlp` or `feed_forward` with the attributes of one; experts of a
    mixture are not meant. A model that is itself an MLP is found under the name "".

    Args:
        model: any module.
        layers: decoder layer numbers (negative from the end) or qualified names; None for all.

    Raises:
        ValueError: if there is none, or an entry of `layers` names none.
    """
    found = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, CATSMLP) or (name.rpartition(".")[2] in ("", *MLP_NAMES) and looks_gated(module))
    }
    if not found:
        raise ValueError(f"model: expected gated MLPs (gate_proj, up_proj, down_proj), got a {type(model).__name__}")
    if layers is None:
        return found
    wanted = {name for layer in layers for name in match_layer(found, layer)}
    return {name: module for name, module in found.items() if name in wanted}


def match_layer(names: Iterable[str], layer: int | str, argument: str = "layers") -> list[str]:
    """Those of `names` that `layer` means: a qualified name, or a layer number (the first number in a name).

    Raises:
        ValueError: if there is none; the message speaks of `argument`.
    """
    numbers = {name: next((int(part) for part in name.split(".") if part.isdigit()), None) for name in names}
    count = 1 + max((n for n in numbers.values() if n is not None), default=-1)
    wanted = layer + count if isinstance(layer, int) and layer < 0 else layer
    hits = [name for name, number in numbers.items() if wanted in (name, number)]
    if not hits:
        raise ValueError(
            f"{argument}: expected numbers below {count} or names such as {next(iter(numbers))!r}, got {layer!r}"
        )
    return hits


def convert_mlps(
    model: nn.Module, config: CatsConfig | None = None, layers: Iterable[int | str] | None = None
) -> list[str]:
    """Replace the gated MLPs of a model by `CATSMLP`s that share their weights.

    Those already converted stay as they are. All or nothing: when one cannot be converted, the model is unchanged.

    Returns:
        Names of the modules converted by this call.

    Raises:
        ValueError: see `find_mlps` and `CATSMLP.from_llama_mlp`; the message names the module.
    """
    config = config or CatsConfig()
    dense = {name: mlp for name, mlp in find_mlps(model, layers).items() if not isinstance(mlp, CATSMLP)}
    if "" in dense:
        raise ValueError("model: it is itself an MLP; use CATSMLP.from_llama_mlp")
    options = {field.name: getattr(config, field.name) for field in fields(config)} | {"down_layout": "keep"}
    converted: dict[int, CATSMLP] = {}
    for name, mlp in dense.items():
        try:
            converted[id(mlp)] = CATSMLP.from_llama_mlp(mlp, **options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    try:
        for module in converted.values():
            module.set_down_layout(config.down_layout)
    except BaseException:
        for module in converted.values():
            module.restore_layout()
        raise
    for name, mlp in dense.items():
        model.set_submodule(name, converted[id(mlp)], strict=True)
    return list(dense)


def revert_mlps(model: nn.Module) -> list[str]:
    """Put back the modules that `convert_mlps` replaced, with their weights in the original layout.

    Returns:
        Names of the modules put back.
    """
    converted = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and isinstance(module, CATSMLP) and module.original is not None
    }
    for name, module in converted.items():
        model.set_submodule(name, module.to_dense(), strict=True)
    return list(converted)
