"""Finding the attention layers of a model, exchanging them for `LawcatAttention`, and putting them back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from torch import nn

from ._options import LawcatConfig
from .conversion import match_layer
from .lawcat import LawcatAttention

ATTENTION_NAMES = ("self_attn", "attention", "attn")


def find_attentions(model: nn.Module, layers: Iterable[int | str] | None = None) -> dict[str, nn.Module]:
    """The self-attention layers of a model, softmax or converted, by qualified name, in order.

    Args:
        model: any module.
        layers: decoder layer numbers (negative from the end) or qualified names; None for all.

    Raises:
        ValueError: if there is none, or an entry of `layers` names none.
    """
    found = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LawcatAttention)
        or (name.rpartition(".")[2] in ATTENTION_NAMES and hasattr(module, "o_proj") and hasattr(module, "head_dim"))
    }
    if not found:
        raise ValueError(
            f"model: expected attention layers (q_proj, ..., o_proj, head_dim), got a {type(model).__name__}"
        )
    if layers is None:
        return found
    wanted = {name for layer in layers for name in match_layer(found, layer)}
    return {name: module for name, module in found.items() if name in wanted}


def convert_attentions(
    model: nn.Module, config: LawcatConfig | None = None, layers: Iterable[int | str] | None = None
) -> list[str]:
    """Replace attention layers of a model by `LawcatAttention`s that share their projections.

    Those already converted stay as they are. All or nothing: when one cannot be converted, the model is unchanged.

    Returns:
        Names of the modules converted by this call.

    Raises:
        ValueError: see `find_attentions` and `LawcatAttention.from_attention`; the message names the module.
    """
    config = config or LawcatConfig()
    options = {field.name: getattr(config, field.name) for field in fields(config)}
    softmax = {n: m for n, m in find_attentions(model, layers).items() if not isinstance(m, LawcatAttention)}
    converted = {}
    for name, module in softmax.items():
        if not name:
            raise ValueError("model: it is itself an attention layer; use LawcatAttention.from_attention")
        try:
            converted[name] = LawcatAttention.from_attention(module, **options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
    for name, layer in converted.items():
        model.set_submodule(name, layer, strict=True)
    return list(converted)


def revert_attentions(model: nn.Module) -> list[str]:
    """Put back the modules that `convert_attentions` replaced.

    Returns:
        Names of the modules put back.
    """
    converted = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and isinstance(module, LawcatAttention) and module.original is not None
    }
    for name, module in converted.items():
        model.set_submodule(name, module.to_attention(), strict=True)
    return list(converted)
