"""Weights that were distilled into linear attention, loaded into the model they were made for.

A file of safetensors holds what conversion added (convolutions, feature maps, gates, window factors) and the two factors of every
LoRA, which are multiplied out on loading: no peft is needed. Its metadata says how the layers are made, and a digest of the
projections says what model they belong to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..convert import find_attentions, restore
from ..integrations.transformers import LawcatConfig, convert

FORMAT = "subquad-lawcat-1"
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def digest(model: nn.Module) -> str:
    """A hash of the shapes of all attention projections, and of the first numbers of each in bfloat16."""
    found = hashlib.sha256()
    for name, attention in find_attentions(model).items():
        for own in _PROJECTIONS:
            weight = getattr(attention, own).weight
            start = weight.detach().flatten()[:64].to("cpu", torch.bfloat16).view(torch.uint8)
            found.update(f"{name}.{own} {list(weight.shape)}".encode() + bytes(start.tolist()))
    return found.hexdigest()


def save_distilled(
    path: Path, parameters: dict[str, torch.Tensor], config: LawcatConfig, lora_scale: float, digest: str
) -> None:
    """Write the parameters in bfloat16.

    Args:
        path: of the file.
        parameters: by their names in the model, factors of LoRA as `<projection>.lora_A` [r, in] and `.lora_B` [out, r].
        config: of the converted layers.
        lora_scale: what B A is multiplied by, alpha / r.
        digest: of the model before the conversion.
    """
    from safetensors.torch import save_file

    told = {"format": FORMAT, "config": asdict(config), "lora_scale": lora_scale, "model": digest}
    tensors = {name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in sorted(parameters.items())}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"subquad": json.dumps(told)})


def load_distilled(model: nn.Module, path: Path, layers: Sequence[int] | None = None) -> list[str]:
    """Convert layers of a model and give them their distilled weights. Parameters of the model are replaced, not written to.

    Args:
        model: the stock model that the file was made for, in any dtype.
        path: what `save_distilled` wrote.
        layers: numbers of the layers to convert; None for all. The others stay softmax, without LoRA.

    Returns:
        The names of the converted layers.

    Raises:
        ValueError: another file, a file that lacks something, or another model; it is then as it was.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        told = json.loads((file.metadata() or {}).get("subquad", "{}"))
        if told.get("format") != FORMAT:
            raise ValueError(f"path: expected weights of format {FORMAT!r}, got {told.get('format')!r} in {path}")
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    if (found := digest(model)) != told["model"]:
        raise ValueError(
            f"model: expected the one that {path.name} was made for ({told['model'][:12]}), got {found[:12]}"
        )
    attentions = find_attentions(model)
    if strange := [name for name in tensors if name.rpartition(".self_attn.")[0] + ".self_attn" not in attentions]:
        raise ValueError(f"path: expected no {strange[0]}, of which the model has no layer")
    names = list(convert(model, attention=LawcatConfig(**told["config"]), layers=layers))
    try:
        filled = [_read(model.get_submodule(name), f"{name}.", tensors, told["lora_scale"]) for name in names]
    except ValueError:
        restore(model, "attention", layers=names)
        raise
    for name, (parameters, weights) in zip(names, filled, strict=True):
        _fill(model.get_submodule(name), parameters, weights)
    return names


Tensors = dict[str, torch.Tensor]


def _read(layer: Any, prefix: str, tensors: Tensors, scale: float) -> tuple[Tensors, Tensors]:
    """The new parameters of a layer, and the weights of its projections, LoRA included, by name.

    Raises:
        ValueError: one that is not in the file, or of another shape.
    """

    def get(name: str, shape: list[int] | None = None) -> torch.Tensor:
        found = tensors.get(prefix + name)
        if found is None or (shape is not None and list(found.shape) != shape):
            said = "none" if found is None else str(list(found.shape))
            raise ValueError(f"path: expected {prefix}{name} of shape {shape}, got {said}")
        return found.float()

    new = {name: get(name, list(p.shape)) for name, p in layer.new_parameters().items()}
    merged = {}
    for name in _PROJECTIONS:
        if f"{prefix}{name}.lora_A" not in tensors:
            continue
        weight = getattr(layer, name).weight
        a = get(f"{name}.lora_A")
        b = get(f"{name}.lora_B", [weight.shape[0], a.shape[0]])
        if a.shape[1:] != weight.shape[1:]:
            raise ValueError(f"path: expected {prefix}{name}.lora_A of {weight.shape[1]} columns, got {list(a.shape)}")
        merged[name] = weight.detach().float() + scale * (b @ a).to(weight.device)
    return new, merged


@torch.no_grad()
def _fill(layer: Any, parameters: Tensors, weights: Tensors) -> None:
    """Projections get modules of their own: the given ones, and their weights, may be in use elsewhere."""
    for name, parameter in layer.new_parameters().items():
        parameter.copy_(parameters[name])
    for name, weight in weights.items():
        given = getattr(layer, name)
        made = nn.Linear(given.in_features, given.out_features, bias=given.bias is not None, device="meta")
        made.weight = nn.Parameter(weight.to(given.weight.dtype), requires_grad=given.weight.requires_grad)
        made.bias = given.bias
        setattr(layer, name, made.train(given.training))
