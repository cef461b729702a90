"""`convert` and `revert`: layers of a model, recognised by their attributes. The library itself is never imported."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from torch import nn

from ... import _checks
from ...convert import (
    CatsConfig,
    ConversionReport,
    GgufFile,
    LawcatConfig,
    Replacement,
    Rounded,
    SinkConfig,
    SuperlinearConfig,
    convert_weights,
    named,
    replace,
    restore,
)
from ...convert.weights import Source
from ...nn._codes import Codes
from ...reference.quantised_linear import FORMATS

KINDS = ("attention", "mlp")  # in the order in which a report lists them


def convert(
    model: nn.Module,
    *,
    mlp: str | CatsConfig | None = None,
    attention: str | LawcatConfig | SinkConfig | SuperlinearConfig | None = None,
    weights: str | None = None,
    gate_weights: str | None = None,
    gguf_file: str | os.PathLike[str] | None = None,
    layers: Iterable[int | str] | None = None,
    **options: Any,
) -> ConversionReport:
    """Replace layers of a model by subquad's, in place, sharing the weights. All or nothing: errors change nothing.

    A converted MLP is dense until it has a threshold: see `subquad.CatsCalibrator`, or pass `threshold=`. LAWCAT must learn
    first: see `subquad.attention_transfer`. Attention with sinks and a window learns nothing, and is the model's own as long as
    nothing is forgotten. Superlinear attention is the model's own while texts fit its window; its search then starts from the
    queries, and learns. Layers that are converted already stay as they are; other options for them are refused: `revert`
    first.

    With `weights`, every Linear is exchanged for one in few bits, and so is an embedding that is tied to the output layer; what
    attention has learned besides stays as it is. Dense weights are dropped. CATS reads the codes: calibrate afterwards.

    Args:
        model: a model with gated MLPs named `mlp` or `feed_forward`, or attention named `self_attn` with separate projections:
            Llama, Mistral, Qwen, SmolLM and others like them.
        mlp: "cats", or a `CatsConfig`.
        attention: "lawcat", "sink" or "superlinear", or a `LawcatConfig`, `SinkConfig` or `SuperlinearConfig`.
        weights: "int8", "int4" or "int4_min", rounded from the model's own; or "gguf", taken as they are from the file that the
            model was loaded from.
        gate_weights: the format of the gates of MLPs, where it is not that of the others.
        gguf_file: for "gguf". Blocks of Q8_0, Q4_0 and Q4_1 are taken, tensors in F32, F16 and BF16 stay dense.
        layers: decoder layer numbers (negative from the end) or qualified module names; None for all. Attention that is not
            listed stays softmax: a hybrid model. With `weights`, the output layer is among all only.
        options: fields of the config that a name stands for. With both kinds, give config objects.

    Returns:
        Qualified names of the modules converted, a list that also counts their new and shared parameters and, in `left`, says
        which Linears are dense still, and why: sizes without groups of 32, hooks.

    Raises:
        ValueError: for an unknown conversion, an unknown entry of `layers`, a model without such layers, a layer that cannot be
            converted (named in the message), or one that is converted with other options or, named in `layers`, otherwise; a
            Linear inside an adapter; a GGUF file of another model, or with blocks of another type.
        ImportError: weights="gguf" without the package gguf.
        TypeError: for an unknown option.

    Example:
        >>> convert(model, mlp="cats")  # doctest: +SKIP
        ['model.layers.0.mlp', 'model.layers.1.mlp']
        >>> convert(model, attention="lawcat", layers=range(1, 30))  # doctest: +SKIP
        >>> convert(model, attention="sink", sink_tokens=4, window=1020)  # doctest: +SKIP
        >>> convert(model, mlp="cats", weights="int8")  # doctest: +SKIP
        >>> convert(model, attention="superlinear", sw_index=31, backward_factor=3.0)  # doctest: +SKIP
    """
    if mlp is None and attention is None and weights is None:
        raise ValueError(
            "mlp: expected 'cats' or a CatsConfig, or attention 'lawcat', 'sink', 'superlinear' or a config of theirs, or "
            "weights, got None for all"
        )
    if mlp is not None and attention is not None and options:
        raise TypeError(f"{next(iter(options))}: with mlp and attention, options belong into config objects")
    if mlp is None and attention is None and options:
        raise TypeError(f"{next(iter(options))}: unknown option of weights; expected gate_weights, gguf_file or none")
    given = {"attention": attention, "mlp": mlp}
    conversions = [_conversion(kind, given[kind], options) for kind in KINDS if given[kind] is not None]
    source = _source(weights, gate_weights, gguf_file)
    return (
        replace(model, conversions, layers) if source is None else convert_weights(model, source, conversions, layers)
    )


def _source(weights: str | None, gate_weights: str | None, gguf_file: Any) -> Source | None:
    """Where codes come from."""
    if gguf_file is not None and weights != "gguf":
        raise ValueError(f"gguf_file: expected None unless weights is 'gguf', got weights {weights!r}")
    if gate_weights is not None and weights in (None, "gguf"):
        raise ValueError(f"gate_weights: expected None with weights {weights!r}, got {gate_weights!r}")
    if weights is None:
        return None
    _checks.choice("weights", weights, (*FORMATS, "gguf"))
    return GgufFile(gguf_file) if weights == "gguf" else Rounded(weights, gate_weights)


def _conversion(kind: str, value: Any, options: dict[str, Any]) -> tuple[Replacement, Any]:
    """The replacement and the config that an argument of `convert` means."""
    known = named(kind)
    names, configs = list(known), " or ".join(f"a {replacement.config.__name__}" for replacement in known.values())
    if isinstance(value, str) and value in known:
        config = known[value].config
        fields_of = [field.name for field in fields(config) if field.init]
        unknown = [option for option in options if option not in fields_of]
        if unknown:
            raise TypeError(f"{unknown[0]}: unknown option; expected some of {', '.join(fields_of)}")
        return known[value], config(**options)
    for name, replacement in known.items():
        if isinstance(value, replacement.config):
            if options:
                text = f"options come with {kind}={name!r}; with a {replacement.config.__name__}, set them there"
                raise TypeError(f"{next(iter(options))}: {text}")
            return replacement, value
    raise ValueError(f"{kind}: expected one of {', '.join(map(repr, names))} or {configs}, got {value!r}")


def revert(model: nn.Module) -> list[str]:
    """Undo every `convert`: the original module objects return, with their weights in the original layout.

    Weights in few bits stay so, for the dense ones are gone; `to_dense` makes new ones.

    Returns:
        Qualified names of the modules put back; empty when nothing was converted.

    Raises:
        ValueError: there is nothing to put back but weights in few bits.
    """
    back = restore(model, *KINDS)
    codes = next((name for name, module in model.named_modules() if isinstance(module, Codes)), None)
    if not back and codes is not None:
        raise ValueError(
            f"{codes}: expected a layer that can be put back, got weights in few bits, whose dense ones are gone; "
            "to_dense(model) makes new ones"
        )
    return back
