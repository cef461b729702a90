"""New tokens of a stream: they attend to sinks, a window and each other, and enter a cache of constant size."""

from __future__ import annotations

from typing import Any

import torch

from .. import _checks
from ..reference import sink_attention_step as reference
from ..rope import RopeSpec, check_rope
from . import _call
from ._sink_checks import check_counter, check_states, check_tokens, count_of

KEY_ROPES = ("pre", "post")
POSITIONS = ("cache", "absolute")


def sink_attention_step(
    q: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    sink_k: torch.Tensor,
    sink_v: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    seen: torch.Tensor,
    written: torch.Tensor,
    first: torch.Tensor,
    *,
    window: int,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    m: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
    rope: RopeSpec | None = None,
    key_rope: str = "pre",
    positions: str = "cache",
    together: bool = False,
    commit: bool = True,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Tokens attend to the first S tokens, to a window and to each other, then enter the cache (StreamingLLM, arXiv 2309.17453).

    The cache is updated in place: the first S tokens of a sequence stay in `sink_k` and `sink_v`, token j >= S lies in place
    (j - S) mod R of the rings. Token i sees j <= i if j < S, or i - j < window and j >= first. Any number of tokens may come at
    once: all attend before any is written. Not differentiable. `SinkKVCache` owns these tensors and knows when they may go back.

    Args:
        q: queries [B, T, Hq, D], float32, bfloat16, float16 (float64 on the reference backend), not rotated where `rope` is
            given; None to write only.
        k, v: new keys [B, T, Hkv, D] and values [B, T, Hkv, Dv], Hkv divides Hq, D and Dv in 1..256.
        sink_k, sink_v: [B, Hkv, S, D] and [B, Hkv, S, Dv] in k's dtype. Under autocast q, k and v are converted to it.
        ring_k, ring_v: [B, Hkv, R, D] and [B, Hkv, R, Dv], R >= window, in k's dtype, int8 or float8_e4m3fn.
        seen: int64 [B], tokens in the cache before this call; advanced. Negative counts as 0.
        written: int64 [B], the largest `seen` + tokens that was ever written; advanced.
        first: int64 [B], tokens of S..first-1 are forgotten, however wide the window is.
        window: W, tokens up to the query's own, which counts; 0 for none.
        k_scale, v_scale: float32 [B, Hkv, R], of rings of int8 or float8: what a token's row is multiplied by.
        m: int32 or int64 [B], how many of the T columns are tokens, from the left; None for all. On a GPU numbers outside 0..T
            count as the nearest of them.
        sink_logits: [Hq], one more term exp(sink_logits[h]) of the softmax denominator.
        rope: rotation of queries and keys, or None for none. Its `attention_scaling` is applied.
        key_rope: "pre": keys in the cache are not rotated, but where they are read; "post": they are rotated where they enter.
        positions: "cache": positions in the cache as it is at that token, without gaps, below S + window; "absolute": those in
            the sequence.
        together: whether the new tokens all see each other, and the window ends at the last of them (blocks of frames).
        commit: whether `seen` is advanced; if not, the same tokens may come again.
        scale: factor of the scores; None for D ** -0.5.
        backend: "native", "triton", "reference", or None to choose.

    Returns:
        (out [B, T, Hq, Dv] in q's dtype, lse [B, T, Hq] float32, the log-sum-exp of the scores, sink logit included). Columns
        that are no tokens are 0 and -inf.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: shapes or devices that do not fit, a window wider than the ring, numbers out of range, states that share
            memory, a tensor that requires a gradient while gradients are enabled, a backend that cannot run.

    Example:
        >>> import torch, subquad
        >>> kv = lambda n: torch.zeros(1, 2, n, 8)
        >>> n = lambda: torch.zeros(1, dtype=torch.int64)
        >>> q, k, v = torch.randn(1, 3, 4, 8), torch.randn(1, 3, 2, 8), torch.randn(1, 3, 2, 8)
        >>> cache = (kv(2), kv(2), kv(8), kv(8), n(), n(), n())
        >>> out, lse = subquad.sink_attention_step(q, k, v, *cache, window=6)
        >>> out.shape, cache[4].item()
        (torch.Size([1, 3, 4, 8]), 3)
    """
    at_once: tuple[torch.Tensor, torch.Tensor] | None = _call.at_once(
        "sink_attention_step_", backend, _arguments,
        k, v, q, sink_k, sink_v, ring_k, ring_v, k_scale, v_scale, seen, written, first, m, sink_logits,
        rope, window, scale, key_rope, positions, together, commit,
    )  # fmt: skip
    if at_once is not None:
        return at_once
    q, k, v = _call.autocast(q, k, v, to=sink_k)
    check_tokens(q, k, v)
    check_states(k, v, sink_k, sink_v, ring_k, ring_v, k_scale, v_scale)
    for name, counter in (("seen", seen), ("written", written), ("first", first)):
        check_counter(name, _checks.integers(name, counter, 1, (torch.int64,)), k)
    _checks.size("window", window)
    if window > ring_k.shape[2]:
        raise ValueError(f"window: expected at most the {ring_k.shape[2]} places of ring_k, got {window}")
    if m is not None:
        m = count_of(m, k)
    for name, flag in (("together", together), ("commit", commit)):
        _checks.flag(name, flag)
    rotated = _checks.choice("key_rope", key_rope, KEY_ROPES) == 1
    absolute = _checks.choice("positions", positions, POSITIONS) == 1
    check_rope("rope", rope)
    if rope is not None and rope.rotary_dim > k.shape[3]:
        raise ValueError(f"rope: expected at most {k.shape[3]} rotated elements of a head, got {rope.rotary_dim}")
    if sink_logits is not None:
        _checks.tensor("sink_logits", sink_logits)
        _checks.same_device("sink_logits", sink_logits, k.device, "k")
        heads = 0 if q is None else q.shape[2]
        if q is not None and sink_logits.shape != (heads,):
            raise ValueError(f"sink_logits: expected shape [{heads}], got {list(sink_logits.shape)}")
        _checks.no_gradient("sink_logits", sink_logits if torch.is_grad_enabled() else None, _HINT)
        sink_logits = sink_logits.to(torch.promote_types(k.dtype, torch.float32))
    scale = k.shape[3] ** -0.5 if scale is None else _checks.number("scale", scale)
    arguments = (
        k, v, q, sink_k, sink_v, ring_k, ring_v, k_scale, v_scale, seen, written, first, m, sink_logits,
        *_rotation(rope, k, window, scale), rotated, absolute, together, commit,
    )  # fmt: skip
    define = reference.sink_attention_step
    result: tuple[torch.Tensor, torch.Tensor] = _call.step(
        "sink_attention_step_", backend, arguments, define, hint=_HINT
    )
    return result


def _arguments(
    k: torch.Tensor, v: Any, q: Any, sink_k: Any, sink_v: Any, ring_k: Any, ring_v: Any, k_scale: Any, v_scale: Any,
    seen: Any, written: Any, first: Any, m: Any, sink_logits: Any,
    rope: Any, window: Any, scale: Any, key_rope: Any, positions: Any, together: Any, commit: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """Those of the operator, unchecked but for names, the rotation and the numbers of `m`."""
    if m is not None:
        m = count_of(m, k)
    if rope is not None:
        check_rope("rope", rope)
    if sink_logits is not None and sink_logits.dtype in (torch.bfloat16, torch.float16):
        sink_logits = sink_logits.float()
    rotated = _checks.choice("key_rope", key_rope, KEY_ROPES) == 1
    absolute = _checks.choice("positions", positions, POSITIONS) == 1
    scale = k.shape[3] ** -0.5 if scale is None else scale
    return (
        k, v, q, sink_k, sink_v, ring_k, ring_v, k_scale, v_scale, seen, written, first, m, sink_logits,
        *_rotation(rope, k, window, scale), rotated, absolute, together, commit,
    )  # fmt: skip


def _rotation(rope: RopeSpec | None, k: torch.Tensor, window: int, scale: float) -> tuple[Any, ...]:
    """`turns` to `interleaved` of the operator, with `window` and `scale` in between."""
    if rope is None:
        return None, window, scale, 1.0, False
    return rope.turns(k.device), window, scale, rope.attention_scaling**2, rope.interleaved


_HINT = "call it under torch.no_grad(), or train with sink_attention"
