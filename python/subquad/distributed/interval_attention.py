"""Interval attention on shards: the mask says which keys a rank needs, one message brings them, the local operator runs.

All keys of a row meet in one call: sink logits enter once, and no partial results are merged. Around a ring (ring.py) they come
rank by rank instead.
"""

from __future__ import annotations

import hashlib
from typing import Any, cast

import torch

from .. import _checks
from ..masks import IntervalMask
from ..masks.parts import keys_seen, part
from ..ops import _call
from ..ops.interval_attention import _check_lead, _check_tensors, _scale, _sink_logits, _softcap
from ..ops.interval_attention import interval_attention as _interval_attention
from ..rope import RopeSpec
from .agreement import checked
from .exchange import Plan, check_layout, check_tokens, fetch, union, with_own
from .heads import by_heads
from .layout import SequenceLayout
from .ring import Blocks, Options, ring_attention

METHODS = ("keys", "ring", "heads")


def interval_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: IntervalMask,
    *,
    layout: SequenceLayout,
    method: str = "keys",
    scale: float | None = None,
    sink_logits: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    softcap: float = 0.0,
    q_shift: RopeSpec | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`subquad.interval_attention` of this rank's queries and keys.

    "keys" fetches exactly the keys that this rank's rows see and does not own: a halo for windows, the first keys for sinks,
    everything before it for causal masks, nothing for packed sequences that end at the border. Gradients go home the same way.
    "ring" brings the same keys from one rank after the other, the next while one is worked on, and joins what the blocks give in
    float32: memory for the keys of two other ranks, whatever their number. Gradients of keys go home in float32.
    "heads" exchanges tokens for heads instead, see `by_heads`; it needs no `key_bias` and no log-sum-exp.

    Args:
        q, k, v: [B, T of this rank, H, D].
        mask: of the whole sequence, equal on all ranks; of any size, or of as many rows and keys as the layout has tokens.
        layout: where the tokens are; packed sequences are the mask's business (`IntervalMask.packed`).
        method: "keys", "ring" (which has kernels only, and no `q_shift`) or "heads".
        sink_logits: [Hq], equal on all ranks; its gradient is this rank's part of a sum.
        key_bias: of this rank's keys, [B, T of this rank].
        scale, softcap, q_shift, return_lse, backend: as in `subquad.interval_attention`.

    Returns:
        out [B, T of this rank, Hq, Dv] in q's dtype; with `return_lse`, (out, lse [B, T of this rank, Hq]).

    Raises:
        TypeError, ValueError: as `subquad.interval_attention`; numbers of tokens that are not the layout's; ranks that differ.
    """
    check_layout(layout)
    options: list[Options] = []  # of a ring
    if method == "ring":
        q, k, v = _call.autocast(q, k, v)

    def check() -> None:
        if not isinstance(mask, IntervalMask):
            raise TypeError(f"mask: expected a subquad.IntervalMask, got {type(mask).__name__}")
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_tokens(name, x, layout)
            if x.dim() != 4:
                raise ValueError(f"{name}: expected shape [B, T, H, D], got {list(x.shape)}")
        if mask.tq is not None and (mask.tq, mask.tk) != (layout.tokens, layout.tokens):
            raise ValueError(
                f"mask: expected {layout.tokens} rows and keys as the layout has tokens, got {mask.tq} and {mask.tk}"
            )
        if key_bias is not None and key_bias.shape != k.shape[:2]:
            raise ValueError(
                f"key_bias: expected shape {list(k.shape[:2])}, of this rank's keys, got {list(key_bias.shape)}"
            )
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(map(repr, METHODS))}, got {method!r}")
        if method == "heads" and (key_bias is not None or return_lse or sink_logits is not None):
            raise ValueError("method: expected 'keys' with key_bias, sink_logits or return_lse, got 'heads'")
        if method == "ring":
            if q_shift is not None or mask.shift is not None:
                raise ValueError("method: expected 'keys' with q_shift, got 'ring'")
            for x in _tensors(mask):
                _check_lead(x, q)
            options.append(_ring_options(q, k, v, scale, softcap, sink_logits, backend))

    def signature() -> dict[str, Any]:
        shapes = {name: (x.shape[0], *x.shape[2:], x.dtype) for name, x in (("q", q), ("k", k), ("v", v))}
        given = (scale, softcap, sink_logits is not None, key_bias is not None, q_shift is not None, return_lse)
        return {"op": "interval_attention", "method": method, "options": given, "mask": _digest(mask, layout), **shapes}

    checked(layout, signature, check)
    if method == "heads":

        def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            found = _interval_attention(q, k, v, mask, scale=scale, softcap=softcap, q_shift=q_shift, backend=backend)
            return cast("torch.Tensor", found)

        return by_heads(whole, q, k, v, layout=layout)
    plan = _plan(mask, layout)
    if method == "ring" and not plan.idle:
        around = _made(mask, layout, "ring", q.device)
        wide = None if key_bias is None else key_bias.float()
        found = ring_attention(q, k, v, _sink_logits(sink_logits, q), wide, around, options[0])
        return found if return_lse else found[0]
    local = _made(mask, layout, "keys", q.device)
    bias = [] if key_bias is None else [key_bias.float()]
    fetched = fetch(plan, k, v, *bias)
    k, v, *bias = (with_own(plan, own, other) for own, other in zip((k, v, *bias), fetched, strict=True))
    return _interval_attention(
        q, k, v, local, scale=scale, sink_logits=sink_logits, key_bias=bias[0] if bias else None,
        softcap=softcap, q_shift=q_shift, return_lse=return_lse, backend=backend,
    )  # fmt: skip


def _ring_options(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    softcap: float,
    sink_logits: torch.Tensor | None,
    backend: str | None,
) -> Options:
    """After the checks of the operator, which meets a block only when others already send."""
    _check_tensors(q, k, v)
    _sink_logits(sink_logits, q)
    used = _call.choose("interval_attention", q.device.type, backend, dtype=q.dtype)
    if used == "reference":
        raise ValueError("backend: expected 'native' or 'triton' with method 'ring', got 'reference'")
    _checks.not_double("q", q, used)
    return Options(_scale(scale, q.shape[3]), _softcap(softcap), used)


def _tensors(mask: IntervalMask) -> list[torch.Tensor]:
    return [x for x in (mask.starts, mask.ends, mask.key_start, mask.key_stop, mask.shift) if x is not None]


def _digest(mask: IntervalMask, layout: SequenceLayout) -> str:
    """What ranks compare of a mask: all of it, once for all layers, and again when it was written to."""
    tensors = _tensors(mask)
    versions = tuple(x._version for x in tensors)
    known = layout.digests.get(mask)
    if known is None or known[0] != versions:
        content = hashlib.blake2b(digest_size=8)
        for x in tensors:
            content.update(repr((x.shape, x.dtype)).encode() + x.cpu().contiguous().numpy().tobytes())
        known = versions, f"{mask!r} {content.hexdigest()}"
        layout.digests[mask] = known
        layout.masks.pop(mask, None)
    found: str = known[1]
    return found


def _plan(mask: IntervalMask, layout: SequenceLayout) -> Plan:
    """What a mask makes of a layout: once for all layers."""
    known = layout.masks.setdefault(mask, {})
    if "plan" not in known:
        tokens = layout.tokens
        known["plan"] = Plan(layout, [union(keys_seen(mask, rows, tokens, tokens)) for rows in layout.owned])
    found: Plan = known["plan"]
    return found


def _made(mask: IntervalMask, layout: SequenceLayout, method: str, device: torch.device) -> Any:
    """The mask of this rank's rows and what comes: of all keys ("keys") or by rank ("ring", `Blocks`). Once for all layers."""
    plan, known = _plan(mask, layout), layout.masks[mask]
    if (method, device) not in known:
        tokens = layout.tokens
        if method == "ring":
            known[method, device] = Blocks(mask, plan, device)
        else:
            known[method, device] = part(mask, layout.positions(), plan.positions, tokens, tokens).to(device)
    return known[method, device]
