"""What a call gives an attention layer: masks in any form that transformers' own attention takes, and packed sequences."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from ... import _checks
from ..._derived import Derived
from ..._packing import Packed, bounds
from ...masks import IntervalMask, builders
from ...masks.additive import shown
from ...masks.model_mask import ModelMask
from ...nn._tokens import columns_of, restarts
from .masks import plain
from .predicates import run_starts, run_stops

_FORMS = "a mask [B|1, H|1, Tq|1, Tk], bool, or float of 0 and numbers below -1000"
_LOG = logging.getLogger(__name__)
_DENSE, _APART = Derived(), Derived()
_BEHIND = 1 << 30  # no sequence: keys that are not there yet; a constant, for a graph of all lengths


def mask_of(
    given: Any, query: torch.Tensor, key: torch.Tensor, causal: bool, window: int | None, arguments: dict[str, Any]
) -> IntervalMask:
    """The mask of an attention call.

    Args:
        given: its `attention_mask`.
        query, key: [B, Hq, Tq, D] and [B, Hkv, Tk, D].
        causal: whether the layer is, where no mask is given.
        window: of the layer. It counts where there is no mask, and where transformers made a causal one without a window; a mask
            that a user gives says all by itself.
        arguments: the other arguments of the call, which may say where packed sequences begin.

    Raises:
        TypeError, ValueError: a mask, or bounds of sequences, that are none of these, by the caller's name.
    """
    tq, tk = query.shape[2], key.shape[2]
    if given is None:
        # The last query stands at the last key. Both ways, a window is as wide to each side.
        width = -1 if window is None else window if causal else window - 1
        mask: IntervalMask = ModelMask.of(
            plain(causal, width, tq, tk, tk - tq, query.device),
            padded_causal=causal, autoregressive=causal, sliding_window=width, first_row=tk - tq,
        )  # fmt: skip
    elif isinstance(given, torch.Tensor):
        _check(given, query, tk)
        mask = _DENSE.get(given, (tq, tk), lambda: from_tensor(given, tq, tk))
    elif isinstance(given, IntervalMask):
        mask = _by_positions(given, tq, tk, arguments.get("position_ids"))
        if window is not None and isinstance(mask, ModelMask) and mask.padded_causal and mask.sliding_window < 0:
            assert mask.first_row is not None
            mask = mask & plain(True, window, tq, tk, mask.first_row, query.device)
    else:
        raise TypeError(f"attention_mask: expected {_FORMS}, got {type(given).__name__}")
    return _apart(mask, query, tk, arguments)


def _check(mask: torch.Tensor, query: torch.Tensor, tk: int) -> None:
    batch, heads, tq = query.shape[:3]
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise TypeError(f"attention_mask: expected {_FORMS}, got {mask.dtype}")
    fits = (
        mask.dim() == 4
        and mask.shape[0] in (1, batch)
        and mask.shape[1] in (1, heads)
        and mask.shape[2] in (1, tq)
        and (mask.shape[3] == 1 or mask.shape[3] >= tk)
    )
    if not fits:
        shape = f"[{batch} or 1, {heads} or 1, {tq} or 1, {tk} or more]"
        raise ValueError(f"attention_mask: expected a shape {shape} here, got {list(mask.shape)}")
    if mask.device != query.device:
        raise ValueError(f"attention_mask: expected device {query.device} as the query has, got {mask.device}")
    if mask.requires_grad:
        raise ValueError("attention_mask: expected a mask without requires_grad, for it would get no gradient")


def from_tensor(mask: torch.Tensor, tq: int, tk: int) -> IntervalMask:
    """A mask in four dimensions, bool or additive, of which a size of 1 counts for all; keys beyond `tk` are not there yet."""
    if mask.shape[2] > 1 and not torch.compiler.is_compiling():
        _LOG.debug("dense mask %s: given in four dimensions", list(mask.shape))
    if mask.shape[3] == 1 and tk != 1:
        mask = mask.expand(-1, -1, -1, tk)
    mask = mask[..., :tk]
    if mask.dtype is not torch.bool:
        mask = shown(mask, "; use 'eager' for this model")
    dense = IntervalMask.from_dense(mask)
    if mask.shape[2] == tq:
        return dense
    assert dense.starts is not None and dense.ends is not None
    starts, ends = (x.expand(-1, -1, tq, -1) for x in (dense.starts, dense.ends))
    return IntervalMask._raw(starts, ends, tk)


# --- packed sequences ----------------------------------------


def _by_positions(mask: IntervalMask, tq: int, tk: int, positions: Any) -> IntervalMask:
    """The mask within sequences whose positions begin at 0 again, which transformers asks only without a mask and a cache.

    `restarts` has the rule, which the layers of this package follow too. Masks of encoders and final ones stay as they are.
    """
    if not isinstance(mask, ModelMask) or not mask.autoregressive or mask.sequence_ids is not None:
        return mask
    if not isinstance(positions, torch.Tensor) or positions.is_floating_point():
        return mask
    compiling = torch.compiler.is_compiling()
    if _checks.traced(positions) and not compiling:
        return mask

    def make() -> IntervalMask:
        first: Any = 0 if mask.first_row is None else mask.first_row if compiling else int(mask.first_row)
        real = None if mask.padding is None else mask.padding[:, columns_of(first, tq, tk, mask.padding.device)]
        ids = restarts(positions, real, tq, anywhere=False)
        if ids is None:
            return mask
        if mask.chunked:
            _checks.hold(
                ~ids.any(),
                "position_ids: expected numbers that go on beside a mask of chunks, got some that begin at 0 again; "
                "packed sequences need use_cache=False and no attention_mask here",
            )
            return mask
        if isinstance(first, torch.Tensor) or first:
            _checks.hold(
                ~ids.any() | (first == 0) if isinstance(first, torch.Tensor) else ~ids.any(),
                "position_ids: expected numbers that go on behind cached tokens, got some that begin at 0 again",
            )
        attributes = {
            name: getattr(mask, name)
            for name in ("padded_causal", "autoregressive", "padding", "sliding_window", "first_row")
        }
        return ModelMask.of(
            mask & _of_sequences(ids, tk, first),
            sequence_ids=nn.functional.pad(ids, (0, tk - tq), value=_BEHIND),
            **attributes,
        )

    return _APART.get(positions, (mask, tk), make)


def _of_sequences(ids: torch.Tensor, tk: int, past: int | torch.Tensor = 0) -> IntervalMask:
    """Rows that see the tokens of their own sequence, ids [B, T]; of keys behind, which are not there yet, the last one's.

    `past`: keys before the tokens, where all of these are one sequence.
    """
    start, stop = run_starts(ids == ids.roll(1, -1)), run_stops(ids == ids.roll(-1, -1))
    return IntervalMask.spans(start[:, None, :, None], (stop + past)[:, None, :, None], tk)


def _apart(mask: IntervalMask, query: torch.Tensor, tk: int, arguments: dict[str, Any]) -> IntervalMask:
    """The mask within each packed sequence, if the call says where they begin: as flash attention is told, as fla or as Mamba."""
    rows, keys = arguments.get("cu_seq_lens_q"), arguments.get("cu_seq_lens_k")
    first = mask.first_row if isinstance(mask, ModelMask) else None
    if keys is not None and rows is None:
        raise ValueError("cu_seq_lens_q: expected together with cu_seq_lens_k, got None")
    if rows is not None:
        mask = _within(
            mask, first, query, tk, ("cu_seq_lens_q", rows), ("cu_seq_lens_k", rows if keys is None else keys)
        )
    rows = arguments.get("cu_seqlens")
    if rows is not None:
        rows = rows.int64 if isinstance(rows, Packed) else rows
        mask = _within(mask, first, query, tk, ("cu_seqlens", rows), ("cu_seqlens", rows))
    ids = arguments.get("seq_idx")
    return mask if ids is None else mask & _of_ids(ids, first, query, tk)


def _within(
    mask: IntervalMask,
    first: int | torch.Tensor | None,
    query: torch.Tensor,
    tk: int,
    q: tuple[str, torch.Tensor],
    k: tuple[str, torch.Tensor],
) -> IntervalMask:
    """The mask within the sequences of these bounds, (name, int [N + 1]); each row of a causal one up to its own key.

    `first`: which key stands where the first query does; None: not known.
    """
    (name_q, cu_q), (name_k, cu_k) = q, k
    tq = query.shape[2]
    for name, cu in (q, k):
        _checks.integers(name, cu)
        _checks.same_device(name, cu, query.device)
    if query.shape[0] != 1:
        raise ValueError(f"{name_q}: expected a batch of 1 with packed sequences, got {query.shape[0]}")

    def make() -> IntervalMask:
        last: int | None = tk
        if isinstance(first, torch.Tensor) and not _checks.readable(first):
            last = None
        elif first is not None:  # a preallocated cache has room for later keys
            last = int(first) + tq
        bounds(name_q, cu_q, tq)
        bounds(name_k, cu_k, last)
        if cu_k.shape != cu_q.shape:
            raise ValueError(f"{name_k}: expected shape {list(cu_q.shape)} as {name_q} has, got {list(cu_k.shape)}")
        if not isinstance(mask, ModelMask) or not mask.padded_causal or mask.sequence_ids is not None:
            return mask & IntervalMask._of(builders.packed(cu_q, cu_k, tq, causal=False), tk)
        causal = IntervalMask._of(builders.packed(cu_q, cu_k, tq, causal=True, window=mask.sliding_window), tk)
        return causal if mask.padding is None else causal.with_live_keys(mask.padding)

    writable = not _checks.traced(cu_k) and not cu_k.is_inference()
    return _APART.get(cu_q, (mask, cu_k, cu_k._version), make) if writable else make()


def _of_ids(ids: torch.Tensor, first: int | torch.Tensor | None, query: torch.Tensor, tk: int) -> IntervalMask:
    """What tokens of one sequence see of each other, by the number of each one's, [B, T]; nothing may stand before them."""
    _checks.integers("seq_idx", ids)
    batch, tq = query.shape[0], query.shape[2]
    starts = tq == tk or (isinstance(first, int) and first == 0)
    if not starts or ids.shape not in ((batch, tq), (1, tq)):
        raise ValueError(f"seq_idx: expected shape [{batch}, {tq}] and no keys before, got {list(ids.shape)}")
    return _of_sequences(ids, tk)
