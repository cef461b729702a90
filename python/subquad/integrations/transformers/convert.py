"""`convert` and `revert`: layers of a model, recognised by their attributes. The library itself is never imported."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from torch import nn

from ...nn.conversion import CatsConfig, convert_mlps, revert_mlps
from ...nn.lawcat import LawcatAttention
from ...nn.lawcat_conversion import LawcatConfig, convert_attentions, revert_attentions

MLPS = ("cats",)
ATTENTIONS = ("lawcat",)


class ConversionReport(list[str]):
    """Qualified names of the modules that `convert` converted.

    Attributes:
        new_parameters: how many numbers they have that the model had not: what attention transfer trains.
        shared_parameters: how many they took over.
    """

    new_parameters = 0
    shared_parameters = 0

    @classmethod
    def of(cls, model: nn.Module, names: Iterable[str]) -> ConversionReport:
        report = cls(names)
        new: dict[int, int] = {}
        shared: dict[int, int] = {}
        for name in report:
            module = model.get_submodule(name)
            added = module.new_parameters().values() if isinstance(module, LawcatAttention) else ()
            new |= {id(p): p.numel() for p in added}
            shared |= {id(p): p.numel() for p in module.parameters() if id(p) not in new}
        report.new_parameters, report.shared_parameters = sum(new.values()), sum(shared.values())
        return report


def convert(
    model: nn.Module,
    *,
    mlp: str | CatsConfig | None = None,
    attention: str | LawcatConfig | None = None,
    layers: Iterable[int | str] | None = None,
    **options: Any,
) -> ConversionReport:
    """Replace layers of a model by subquad's, in place, sharing the weights. All or nothing: errors change nothing.

    A converted MLP is dense until it has a threshold: see `subquad.CatsCalibrator`, or pass `threshold=`. Converted attention
    must learn first: see `subquad.attention_transfer`. Layers that are converted already stay as they are; `revert` first to
    change their options.

    Args:
        model: a model with gated MLPs named `mlp` or `feed_forward`, or attention named `self_attn` with separate projections:
            Llama, Mistral, Qwen, SmolLM and others like them.
        mlp: "cats", or a `CatsConfig`.
        attention: "lawcat", or a `LawcatConfig`.
        layers: decoder layer numbers (negative from the end) or qualified module names; None for all. Attention that is not
            listed stays softmax: a hybrid model.
        options: fields of the `CatsConfig` or `LawcatConfig` that a name stands for. With both, give config objects.

    Returns:
        Qualified names of the modules converted, a list that also counts their new and shared parameters.

    Raises:
        ValueError: for an unknown conversion, an unknown entry of `layers`, a model without such layers, or a layer that
            cannot be converted (named in the message).
        TypeError: for an unknown option.

    Example:
        >>> convert(model, mlp="cats")  # doctest: +SKIP
        ['model.layers.0.mlp', 'model.layers.1.mlp']
        >>> convert(model, attention="lawcat", layers=range(1, 30))  # doctest: +SKIP
    """
    if mlp is None and attention is None:
        raise ValueError(
            "mlp: expected 'cats' or a CatsConfig, or attention 'lawcat' or a LawcatConfig, got None for both"
        )
    if mlp is not None and attention is not None and options:
        raise TypeError(f"{next(iter(options))}: with mlp and attention, options belong into config objects")
    wanted = None if layers is None else list(layers)
    mlp_config = _config("mlp", mlp, MLPS, CatsConfig, options)
    attention_config = _config("attention", attention, ATTENTIONS, LawcatConfig, options)
    converted = [] if attention_config is None else convert_attentions(model, attention_config, wanted)
    if mlp_config is None:
        return ConversionReport.of(model, converted)
    try:
        return ConversionReport.of(model, converted + convert_mlps(model, mlp_config, wanted))
    except BaseException:
        for name in converted:
            model.set_submodule(name, model.get_submodule(name).to_attention(), strict=True)  # type: ignore[operator]
        raise


def _config(name: str, value: Any, names: tuple[str, ...], kind: Any, options: dict[str, Any]) -> Any:
    """The config object that the argument `name` of `convert` means."""
    if value is None:
        return None
    if isinstance(value, kind):
        if options:
            raise TypeError(
                f"{next(iter(options))}: options come with {name}={names[0]!r}; with a {kind.__name__}, set them there"
            )
        return value
    if value not in names:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, names))} or a {kind.__name__}, got {value!r}")
    known = [field.name for field in fields(kind)]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise TypeError(f"{unknown[0]}: unknown option; expected some of {', '.join(known)}")
    return kind(**options)


def revert(model: nn.Module) -> list[str]:
    """Undo every `convert`: the original module objects return, with their weights in the original layout.

    Returns:
        Qualified names of the modules put back; empty when nothing was converted.
    """
    return revert_attentions(model) + revert_mlps(model)
