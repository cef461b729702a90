"""What has been converted in a model, in words that a config keeps: so that a saved model can be built again."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from torch import nn

ENTRY = "subquad"  # name of the config's attribute
VERSION = 1


def record(model: nn.Module, groups: list[dict[str, Any]], undo: ExitStack) -> None:
    """Write into the model's config which layers are converted, and how; nothing where there is no config that is saved.

    Args:
        model: that it was converted with, or a wrapper of it.
        groups: of layers with the same options: dicts with "kind", "name", "options" and "layers".
        undo: gets what puts the config back.
    """
    config: Any = next((module.config for module in model.modules() if _saved(module)), None)
    if config is None:
        return
    undo.callback(_write, config, getattr(config, ENTRY, None))
    _write(config, {"version": VERSION, "converted": groups} if groups else None)


def recorded(config: Any) -> list[dict[str, Any]]:
    """The groups that a config, or one inside it, names.

    Raises:
        ValueError: there is no entry, or one of a newer version.
    """
    inner = (value for value in vars(config).values() if hasattr(value, "to_dict"))
    entry = next((found for part in (config, *inner) if (found := getattr(part, ENTRY, None))), None)
    if not isinstance(entry, dict) or "converted" not in entry:
        raise ValueError(f"config: expected an entry {ENTRY!r}, which convert writes, got none: no layer was converted")
    if entry.get("version", 0) > VERSION:
        raise ValueError(
            f"config: expected version {VERSION} of its entry {ENTRY!r} or an earlier one, got {entry['version']}"
        )
    groups: list[dict[str, Any]] = entry["converted"]
    return groups


def same_layer(name: str, names: Iterable[str]) -> str:
    """The one of `names` that is meant by a layer's name in a model with more or fewer modules around it.

    Raises:
        ValueError: there is none, or more than one.
    """
    names = list(names)
    if name in names:
        return name
    found = [other for other in names if other.endswith(f".{name}") or name.endswith(f".{other}")]
    if len(found) != 1:
        raise ValueError(f"model: expected one layer {name!r}, got {found or 'none'}")
    return found[0]


def _saved(module: nn.Module) -> bool:
    return hasattr(module, "save_pretrained") and hasattr(getattr(module, "config", None), "to_dict")


def _write(config: Any, entry: dict[str, Any] | None) -> None:
    if entry is not None:
        setattr(config, ENTRY, entry)
    elif hasattr(config, ENTRY):
        delattr(config, ENTRY)
