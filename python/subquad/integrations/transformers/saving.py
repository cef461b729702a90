"""`load_converted`: the way back from a directory that `save_pretrained` of a converted model has written."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...convert import find, replace
from ...convert.record import recorded, same_layer
from ...convert.replace import recorded_replacement
from ...convert.weights import WEIGHT, add_shells
from ...nn._codes import Codes
from .convert import KINDS

_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def load_converted(path: str | os.PathLike[str], model_class: Any = None, **kwargs: Any) -> Any:
    """A converted model with all that it had when it was saved: layers, options, thresholds, trained parameters.

    `save_pretrained` writes the new parameters beside the model's own, and into the config what `convert` has done.
    `from_pretrained` alone gives the model without conversions: it reports the rest as unexpected.

    Args:
        path: a directory, or the name of a repository on the hub, with weights as safetensors.
        model_class: a model class of transformers; None for the one that the config names.
        kwargs: of its `from_pretrained`; `dtype` is "auto" unless given, and then holds for new parameters too.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: nothing was converted in this model; what convert has written is not in the config or not among the weights,
            or has another shape; a file that is no whole one.
        TypeError: `output_loading_info`, which would be about a model without conversions.
    """
    import transformers

    if kwargs.pop("output_loading_info", False):
        raise TypeError("output_loading_info: expected False, got True; the model is not as from_pretrained left it")

    hub = {name: kwargs.pop(name) for name in _HUB if name in kwargs}
    if not os.path.isdir(path):
        from huggingface_hub import snapshot_download

        path = snapshot_download(
            str(path), allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.py"], **hub
        )
    config = transformers.AutoConfig.from_pretrained(path)
    groups = recorded(kwargs.get("config", config))
    for group in groups:
        recorded_replacement(group)
    if model_class is None:
        model_class = getattr(transformers, config.architectures[0])
    as_saved = kwargs.setdefault("dtype", "auto") == "auto"
    files = _files(Path(path), kwargs.get("variant"))
    model = _without_conversions(model_class, groups, path, kwargs, files)
    for group in groups:
        if group["kind"] not in KINDS:
            continue
        by, config = recorded_replacement(group)
        there = find(model, by.kind)
        layers = [same_layer(name, there) for name in group["layers"]]
        replace(model, [(by, config)], layers)
        for name in layers:
            _load(model.get_submodule(name), name, files, as_saved)
    return model


def _without_conversions(
    model_class: Any, groups: list[dict[str, Any]], path: Any, kwargs: dict[str, Any], files: dict[str, Path]
) -> Any:
    """`from_pretrained`, which does not report what is loaded afterwards; weights in few bits are loaded into their places."""
    codes = any(group["kind"] == WEIGHT.name for group in groups)
    if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
        if codes:
            raise ValueError(
                f"model_class: expected the class of a model, whose weights are in few bits, got {model_class.__name__}"
            )
        return model_class.from_pretrained(path, **kwargs)
    names = [name for group in groups for name in group["layers"] if group["kind"] in KINDS]
    tails = [
        found[0] if (found := re.search(r"[^.]+\.\d+\..*", name)) else name for name in names
    ]  # without wrappers' names
    later = [rf"(^|\.){re.escape(tail)}\." for tail in tails]
    own: dict[str, Any] = {"_keys_to_ignore_on_load_unexpected": later}
    tied: dict[str, tuple[Codes, str | None]] = {}

    def build(self: Any, *args: Any, **options: Any) -> None:
        model_class.__init__(self, *args, **options)
        add_shells(self, groups)
        tied.update(_take_tied(self, files))
        _check_codes(self, files)

    quiet: Any = type(model_class.__name__, (model_class,), own | ({"__init__": build} if codes else {}))
    model = quiet.from_pretrained(path, **kwargs)
    model.__class__ = model_class
    _put_tied(model, tied)
    return model


def _check_codes(model: nn.Module, files: dict[str, Path]) -> None:
    """Codes are among the weights in full: the library would leave memory as it is where there are none, and cast others."""
    from safetensors import safe_open

    for module_name, module in model.named_modules():
        for own, tensor in module.state_dict().items() if isinstance(module, Codes) else ():
            name = f"{module_name}.{own}"
            key = _key(name, files)
            if key is None:
                raise ValueError(f"path: expected codes {name!r} among the weights, got none")
            with safe_open(files[key], framework="pt") as file:
                found = file.get_slice(key)
                kind, shape = found.get_dtype(), list(found.get_shape())
            if shape != list(tensor.shape) or (kind == "U8") != (tensor.dtype == torch.uint8):
                wanted = f"{'U8' if tensor.dtype == torch.uint8 else 'floating numbers'} {list(tensor.shape)}"
                raise ValueError(f"path: expected codes {name!r} in {wanted}, got {kind} {shape}")


def _key(name: str, files: dict[str, Path]) -> str | None:
    """What a tensor is called among the weights, of a model with more or fewer modules around it."""
    tail = name
    while tail not in files and "." in tail:
        tail = tail.partition(".")[2]
    return tail if tail in files else next((key for key in files if key.endswith(f".{name}")), None)


def _take_tied(model: Any, files: dict[str, Path]) -> dict[str, tuple[Codes, str | None]]:
    """Take out what has no tensor of its own in the files, for that of the embedding is written once. The library ties
    parameters, and would make a new one."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tied = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Codes)
        and any(module is end for end in ends)
        and not any(f".{key}".endswith(f".{name}.weight") for key in files)
    }
    if tied and all(module in tied.values() for module in ends if isinstance(module, Codes)):
        raise ValueError(f"path: expected codes '{next(iter(tied))}.weight' among the weights, got none")
    for name, module in tied.items():
        place = nn.Module()
        place.register_parameter("bias", module._parameters.get("bias"))
        model.set_submodule(name, place)
    keys = getattr(model, "all_tied_weights_keys", {})  # from transformers 5 on
    sources = {name: keys.pop(f"{name}.weight", None) for name in tied}
    return {name: (module, sources[name]) for name, module in tied.items()}


def _put_tied(model: Any, tied: dict[str, tuple[Codes, str | None]]) -> None:
    """Undo `_take_tied`, around the bytes that the other one has."""
    for name, (module, key) in tied.items():
        like = next(m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if isinstance(m, Codes))
        for own, buffer in module._buffers.items():
            if own != "weight" and buffer is not None:
                module._buffers[own] = torch.empty_like(buffer, device=like.weight.device)
        module.weight = like.weight
        if "bias" in module._parameters:
            module._parameters["bias"] = model.get_submodule(name).bias
        model.set_submodule(name, module.train(model.training))
        if key is not None:
            model.all_tied_weights_keys[f"{name}.weight"] = key


def _load(layer: Any, name: str, files: dict[str, Path], as_saved: bool) -> None:
    """What the layer has and its original has not, in the dtype that it was saved in or in the layer's."""
    from safetensors import safe_open

    own = layer.state_dict()
    new = [key for key in own if key not in layer.original.state_dict()]
    state = {}
    for key in new:
        prefixes = {full[: -len(key) - 1]: full for full in files if full.endswith(f".{key}")}
        try:
            full = prefixes[same_layer(name, prefixes)]
        except ValueError:
            raise ValueError(f"path: expected a parameter {f'{name}.{key}'!r} among the weights, got none") from None
        with safe_open(files[full], framework="pt") as file:
            state[key] = file.get_tensor(full).to(own[key].device)
        if not state[key].is_floating_point():
            raise ValueError(f"path: expected floating numbers in {full!r}, got {state[key].dtype}")
    try:
        layer.load_state_dict(state, strict=False, assign=as_saved)
    except RuntimeError as error:  # by name, of a shape or a value that does not fit
        raise ValueError(f"path: expected weights that fit {name}: {error}") from error


def _files(folder: Path, variant: str | None) -> dict[str, Path]:
    """Which file has a tensor."""
    dot = "" if variant is None else f".{variant}"
    whole, index = folder / f"model{dot}.safetensors", folder / f"model.safetensors.index{dot}.json"
    if whole.exists():
        return dict.fromkeys(_names(whole), whole)
    if not index.exists():
        raise ValueError(f"path: expected {whole.name} or {index.name} in {folder}, got neither")
    try:
        where = {str(key): folder / file for key, file in json.loads(index.read_text())["weight_map"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path: expected a weight_map in {index.name}, got {error!r}") from error
    there = {file: set(_names(file)) for file in dict.fromkeys(where.values())}
    lost = next((key for key, file in where.items() if key not in there[file]), None)
    if lost is not None:
        raise ValueError(f"path: expected {lost!r} in {where[lost].name}, as {index.name} says, got none")
    return where


def _names(file: Path) -> list[str]:
    """The tensors of a whole file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"path: expected a whole safetensors file {file.name}, got {error}") from error
