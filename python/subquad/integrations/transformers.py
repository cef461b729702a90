"""Models of the transformers library: `convert` their layers, or `register` our attention for all of them.

Converting recognises modules by their attributes and never imports the library; `register` imports it when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from ..masks import IntervalMask
from ..nn.cats_mlp import dense_state_dict
from ..nn.conversion import CatsConfig, convert_mlps, revert_mlps
from ..nn.lawcat import LawcatAttention
from ..nn.lawcat_conversion import LawcatConfig, convert_attentions, revert_attentions
from ..ops.interval_attention import interval_attention

MLPS = ("cats",)
ATTENTIONS = ("lawcat",)
NAME = "subquad"  # the value of attn_implementation
# Arguments that models give to their attention functions and that change the result: refused where they are given.
UNSUPPORTED = (
    "softcap", "head_mask", "position_bias", "cache", "output_attentions", "sinks", "indices", "block_indices",
)  # fmt: skip


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


# --- attn_implementation="subquad" ----------------------------------------


def register() -> None:
    """Make `attn_implementation="subquad"` known to transformers: its models then run `subquad.interval_attention`.

    Causal, sliding and padded attention, with or without a cache, need no [T, T] mask; other patterns (packed sequences, prefixes
    of images, masks given in four dimensions) are exact too, through their dense mask. May be called any number of times.

    Raises:
        ImportError: transformers is not installed, or older than 4.57.

    Example:
        >>> register()  # doctest: +SKIP
        >>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="subquad")  # doctest: +SKIP
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise ImportError(f"subquad: attn_implementation={NAME!r} needs transformers >= 4.57: {error}") from error
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | IntervalMask | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> IntervalMask:
    """transformers' mask function: the mask of one forward pass, made once and shared by the layers of its kind.

    Args:
        batch_size, q_length, kv_length: sizes of the attention.
        q_offset, kv_offset: positions of the first query and of the first key.
        mask_function: transformers' predicate (b, h, q, kv). Causal, sliding and full ones are recognised.
        attention_mask: bool [B, positions], False where a token is padding.
        device: where the mask is used.
        kwargs: `cache_position` in transformers 4.57, which has no `q_length` and `q_offset`.

    Returns:
        The mask. Rows at padding see nothing, so that their output is 0.
    """
    if isinstance(attention_mask, IntervalMask):  # made before, by `generate`
        return attention_mask
    if q_length is None or isinstance(q_length, torch.Tensor):  # 4.57: positions of the queries
        cache_position = kwargs.pop("cache_position", q_length)
        q_length, q_offset = cache_position.shape[0], cache_position[0]
    padding = None
    if attention_mask is not None:
        missing = kv_length + kv_offset - attention_mask.shape[-1]
        padding = nn.functional.pad(attention_mask.bool(), (0, max(0, missing)))[:, kv_offset : kv_offset + kv_length]
        if not torch.compiler.is_compiling() and bool(padding.all()):
            padding = None
    window = _recognised(mask_function)
    if window is None:
        return _from_predicate(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device, kwargs
        )
    bidirectional, width = window
    mask = _plain(bidirectional, width, q_length, kv_length, q_offset, kv_offset, device)
    if padding is not None:
        mask = mask.with_keys(padding.to(device))
    mask.window = width  # says to the layers that their sliding window is in it already
    model_mask = _ModelMask.of(mask)
    model_mask.first_row = q_offset - kv_offset
    if not bidirectional:
        model_mask.padding = padding  # says to linear layers which tokens exist
    return model_mask


class _ModelMask(IntervalMask):
    """A mask on its way through a model: `generate` asks it, as a tensor, for its rank and for a contiguous copy."""

    ndim = 4
    padding: torch.Tensor | None
    first_row: int | torch.Tensor | None = None  # which key stands where the first query does; None: the mask is final

    @classmethod
    def of(cls, mask: IntervalMask) -> _ModelMask:
        model_mask = cls.__new__(cls)
        model_mask.__dict__.update(mask.__dict__)
        return model_mask

    def contiguous(self) -> _ModelMask:
        return self


def _plain(
    bidirectional: bool,
    width: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    kv_offset: int,
    device: torch.device | str,
) -> IntervalMask:
    """Full, causal or sliding attention of queries that need not stand at the end of the keys (a preallocated cache)."""
    if bidirectional:
        return IntervalMask.full(q_length, kv_length)
    if not isinstance(q_offset, torch.Tensor) and q_offset + q_length == kv_length + kv_offset:
        return (
            IntervalMask.sink(0, width, q_length, kv_length) if width >= 0 else IntervalMask.causal(q_length, kv_length)
        )
    stop = torch.arange(q_length, device=device) + (q_offset - kv_offset + 1)
    start = stop - width if width >= 0 else torch.zeros_like(stop)
    return IntervalMask.spans(start.clamp_min(0)[None, None, :, None], stop[None, None, :, None], kv_length)


def _recognised(function: Callable[..., Any] | None) -> tuple[bool, int] | None:
    """(both ways, window or -1) of a mask function of transformers; None when it is another one."""
    from transformers import masking_utils

    if function is None or function is masking_utils.causal_mask_function:
        return False, -1
    if function is getattr(masking_utils, "bidirectional_mask_function", None):
        return True, -1
    cells = _closure(function)
    parts = cells.get("mask_functions", ())
    sliding = (
        function.__qualname__.startswith("and_masks.")
        and len(parts) == 2
        and parts[1] is masking_utils.causal_mask_function
        and parts[0].__qualname__.startswith("sliding_window_overlay.")
    )
    return (False, _closure(parts[0])["sliding_window"]) if sliding else None


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    code = getattr(function, "__code__", None)
    cells = getattr(function, "__closure__", None) or ()
    return {} if code is None else {n: c.cell_contents for n, c in zip(code.co_freevars, cells, strict=True)}


def _from_predicate(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    kv_offset: int,
    function: Callable[..., Any] | None,
    padding: torch.Tensor | None,
    device: torch.device | str,
    kwargs: dict[str, Any],
) -> IntervalMask:
    """The mask of any predicate, through transformers' own dense one."""
    from transformers.masking_utils import sdpa_mask

    more = {name: value for name, value in kwargs.items() if name == "use_vmap"}
    dense: Any = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]
        kv_offset=kv_offset,
        mask_function=function,  # type: ignore[arg-type]
        attention_mask=padding,
        allow_is_causal_skip=False,
        device=device,
        **more,
    )
    return _ModelMask.of(IntervalMask.from_dense(dense))


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: IntervalMask | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function.

    Args:
        module: the attention layer.
        query: [B, Hq, Tq, D]; key and value [B, Hkv, Tk, D], as many heads as the model has.
        attention_mask: what `attention_mask` made, or a mask [B|1, H|1, Tq, Tk] that the user gave: bool, or float of 0 and very
            negative numbers. None: causal where the layer is.
        scaling: of the scores.
        dropout: 0, or the model is not training.
        is_causal: where there is no mask; None for `module.is_causal`.
        sliding_window: keys up to the row's own that it sees.
        s_aux: [Hq] sink logits (gpt-oss), with gradients.
        kwargs: what other models pass; those that would change the result are refused.

    Returns:
        (out [B, Tq, Hq, D], None).

    Raises:
        ValueError: dropout in training, one of `UNSUPPORTED`, or a float mask with biases: what this attention does not have.
    """
    if dropout and module.training:
        raise ValueError(
            f"dropout: expected 0 in training with attn_implementation={NAME!r}, got {dropout}; set it in the config"
        )
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"{name}: attn_implementation={NAME!r} has no such thing; use 'eager' for this model")
    tq, tk = query.shape[2], key.shape[2]
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        attention_mask = IntervalMask.causal(tq, tk) if causal else IntervalMask.full(tq, tk)
    elif isinstance(attention_mask, torch.Tensor):
        attention_mask = _from_tensor(attention_mask, tk)
    if sliding_window is not None:
        attention_mask = _windowed(attention_mask, sliding_window, tq, tk, query.device)
    out = interval_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attention_mask,
        scale=scaling,
        sink_logits=s_aux,
    )
    assert isinstance(out, torch.Tensor)
    return out, None


def _windowed(mask: IntervalMask, window: int, tq: int, tk: int, device: torch.device) -> IntervalMask:
    """The mask with a sliding window, if it has none. A predicate of transformers has, and may show more than the window."""
    first_row: int | torch.Tensor | None = mask.first_row if isinstance(mask, _ModelMask) else tk - tq
    if mask.window == window or first_row is None:
        return mask
    return mask & _plain(False, window, tq, tk, first_row, 0, device).materialize(device=device)


def _from_tensor(mask: torch.Tensor, tk: int) -> IntervalMask:
    """A mask in four dimensions, bool or additive."""
    if mask.dim() != 4 or mask.shape[-1] < tk:
        raise ValueError(f"attention_mask: expected [B, H, Tq, {tk}] or [B, T], got {list(mask.shape)}")
    mask = mask[..., :tk]
    if mask.dtype is torch.bool:
        return IntervalMask.from_dense(mask)
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if not bool(((mask == 0) | hidden).all()):
        raise ValueError(
            "attention_mask: expected bool, or 0 and very negative numbers, got other biases; use 'eager' for this model"
        )
    return IntervalMask.from_dense(~hidden)


__all__ = [
    "CatsConfig",
    "ConversionReport",
    "LawcatConfig",
    "attention_forward",
    "attention_mask",
    "convert",
    "dense_state_dict",
    "register",
    "revert",
]
