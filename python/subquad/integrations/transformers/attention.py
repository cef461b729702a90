"""`attn_implementation="subquad"`: the attention function, and what makes it known to the library."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...masks import IntervalMask
from ...masks.model_mask import ModelMask
from ...ops.interval_attention import interval_attention
from .given import mask_of
from .masks import attention_mask as mask_function

NAME = "subquad"  # the value of attn_implementation
# Arguments that models give to their attention functions and that change the result: refused where they are given.
UNSUPPORTED = (
    "head_mask", "position_bias", "cache", "output_attentions", "sinks", "indices", "block_indices",
)  # fmt: skip


def register() -> None:
    """Make `attn_implementation="subquad"` known to transformers: its models then run `subquad.interval_attention`.

    Causal, sliding, chunked, padded and packed attention, and blocks of images, with or without a cache, compiled and exported,
    need no [T, T] mask; masks given in four dimensions and predicates of a user's are exact too, through their dense mask,
    of which the loggers of this package speak at level DEBUG.

    May be called any number of times.

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
    AttentionMaskInterface.register(NAME, mask_function)


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
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function.

    Args:
        module: the attention layer.
        query: [B, Hq, Tq, D]; key and value [B, Hkv, Tk, D], as many heads as the model has.
        attention_mask: what `attention_mask` made, or a mask [B|1, Hq|1, Tq|1, >= Tk] that the user gave: bool, or float of 0 and
            numbers below -1000. Such a mask says all: neither causality nor a window is added to it. None:
            causal where the layer is, the last query at the last key.
        scaling: of the scores.
        dropout: 0, or the model is not training.
        is_causal: where there is no mask; None for `module.is_causal`.
        sliding_window: keys up to the row's own that it sees, where there is no mask, or a causal one that transformers made
            without a window.
        s_aux: [Hq] sink logits (gpt-oss), with gradients.
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2).
        alibi_slopes: [Hq] or [B, Hq], see `subquad.interval_attention`; no model of transformers gives them.
        kwargs: what other models pass; those that would change the result are refused. Packed sequences of a batch of one stay
            apart by `cu_seq_lens_q` and `cu_seq_lens_k` (int [N + 1], as flash attention takes them; the latter may be left out),
            `cu_seqlens` (a tensor or a `subquad.Packed`) or `seq_idx` (int [B, T], the sequence of each token); of any batch by
            `position_ids` [B, T] that begin at 0 again, without padding, and beside a mask that transformers made.

    Returns:
        (out [B, Tq, Hq, D], None).

    Raises:
        TypeError: a mask that is no tensor, such as a BlockMask, or of integers.
        ValueError: dropout in training, one of `UNSUPPORTED`, a mask with biases, with a gradient or of another shape, bounds of
            sequences that are none.
    """
    if dropout and module.training:
        raise ValueError(
            f"dropout: expected 0 in training with attn_implementation={NAME!r}, got {dropout}; set it in the config"
        )
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"{name}: attn_implementation={NAME!r} has no such thing; use 'eager' for this model")
    if isinstance(attention_mask, ModelMask) and attention_mask.attend is not None:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if alibi_slopes is not None:
            raise ValueError("alibi_slopes: expected none under context_parallel, got some")
        return attention_mask.attend(q, k, v, scaling, s_aux, softcap or 0.0), None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = mask_of(attention_mask, query, key, causal, sliding_window, kwargs)
    out = interval_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        mask,
        scale=scaling,
        sink_logits=s_aux,
        softcap=softcap or 0.0,
        alibi_slopes=alibi_slopes,
    )
    assert isinstance(out, torch.Tensor)
    return out, None
