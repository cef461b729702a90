"""What the queries of Superlinear attention may reach, by position: shared by the search, the window and the step."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import _checks
from .._packing import Packed
from ..contract.span_attention import MAX_HEAD_DIM as MAX_HEAD_DIM
from ..masks import IntervalMask
from ..superlinear import SuperlinearConfig, span_lengths

_NEVER = torch.iinfo(torch.int32).max


class Reach(NamedTuple):
    """int32 [B or 1, T] each, of every query.

    Attributes:
        position: its key, the last that it sees.
        first: the first key that it sees.
        last: the last key that a span may have, before the window.
        back, ahead: keys that a span reaches back from its anchor, and ahead.
    """

    position: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    back: torch.Tensor
    ahead: torch.Tensor


def check_heads(
    name: str, x: object, of: torch.Tensor | None = None, of_name: str = "", limit: int = MAX_HEAD_DIM
) -> None:
    """`x` is [B, T, H, D], of the dtype and device of `of`, D in 1..limit."""
    _checks.tensor(name, x)
    assert isinstance(x, torch.Tensor)
    if x.dim() != 4 or x.shape[2] < 1 or not 1 <= x.shape[3] <= limit:
        raise ValueError(f"{name}: expected shape [B, T, H, D] with D in 1..{limit}, got {list(x.shape)}")
    if of is not None:
        _checks.like(name, x, None, of, of_name)


def check_keys(
    name: str,
    k: object,
    q: torch.Tensor,
    q_name: str,
    block_table: torch.Tensor | None = None,
    limit: int = MAX_HEAD_DIM,
) -> int:
    """`k` is keys [B, N, Hkv, D] that fit `q`, or pages [P, page, Hkv, D] with a `block_table`; N."""
    check_heads(name, k, q, q_name, limit)
    assert isinstance(k, torch.Tensor)
    batch, _, heads, dim = q.shape
    if k.shape[3] != dim:
        raise ValueError(f"{name}: expected a head dimension of {dim} as {q_name} has, got {list(k.shape)}")
    if heads % k.shape[2]:
        raise ValueError(f"{name}: expected a number of heads that divides the {heads} of {q_name}, got {k.shape[2]}")
    if block_table is not None:
        table = _checks.integers("block_table", block_table, 2, (torch.int32,))
        _checks.same_device("block_table", table, q.device, q_name)
        if table.shape[0] != batch:
            raise ValueError(f"block_table: expected shape [{batch}, pages], got {list(table.shape)}")
        if not k.shape[0] or not k.shape[1]:
            raise ValueError(
                f"{name}: expected pages [P, page, H, D] with P and page of at least 1, got {list(k.shape)}"
            )
        if k.shape[1] & (k.shape[1] - 1):
            raise ValueError(f"{name}: expected a page that is a power of two, got {k.shape[1]}")
        return table.shape[1] * k.shape[1]
    if k.shape[0] != batch:
        raise ValueError(f"{name}: expected a batch of {batch} as {q_name} has, got {list(k.shape)}")
    return k.shape[1]  # which `int` would fix for good in an exported program


def key_mask(mask: object, batch: int, keys: int, device: torch.device) -> torch.Tensor | None:
    """bool [B, N] of an `attention_mask` [B, >= N], True for tokens."""
    if mask is None:
        return None
    _checks.booleans("attention_mask", mask)
    assert isinstance(mask, torch.Tensor)
    _checks.same_device("attention_mask", mask, device)
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < keys:
        raise ValueError(f"attention_mask: expected shape [{batch}, at least {keys}], got {list(mask.shape)}")
    return mask[:, :keys]


def reach(
    config: SuperlinearConfig,
    batch: int,
    tokens: int,
    keys: int,
    device: torch.device,
    cache_position: object = None,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | Packed | None = None,
    like: torch.Tensor | None = None,
    first: torch.Tensor | None = None,
) -> Reach:
    """Of T queries and N keys. `mask` as `key_mask` returns it, `like` a tensor [B, T, ...] for `cu_seqlens`.

    `first`: int32 [B or 1, T], the first key of each query's sequence; None: the first key that `mask` shows.

    Raises:
        TypeError: positions that are no integers.
        ValueError: positions of another shape, or that are no keys; `cu_seqlens` with positions or a mask, or with T unlike N.
    """
    if cu_seqlens is not None:
        if cache_position is not None or mask is not None:
            raise ValueError("cu_seqlens: expected neither cache_position nor attention_mask beside it")
        if tokens != keys:
            raise ValueError(f"cu_seqlens: expected as many keys as queries, got {keys} and {tokens}")
        assert like is not None
        packed = Packed.of(cu_seqlens, like)
        position = torch.arange(tokens, dtype=torch.int32, device=device)[None]
        return reach_from(config, position, packed.int32[packed.sequence.long()][None], keys)
    position = _positions(cache_position, batch, tokens, keys, device)
    return reach_from(config, position, first_key(mask, device) if first is None else first, keys)


def first_key(mask: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """int32 [B or 1, 1]: the first token of each row."""
    if mask is None or mask.shape[1] == 0:
        return torch.zeros((1, 1), dtype=torch.int32, device=device)
    return mask.int().argmax(1, keepdim=True).int()


def reach_from(config: SuperlinearConfig, position: torch.Tensor, first: torch.Tensor, keys: int) -> Reach:
    """Of queries at int32 positions [B or 1, T], -1 for one that sees nothing, whose sequences begin at `first`."""
    position, first = torch.broadcast_tensors(position, first)
    seen = (position + 1 - first).clamp(min=0)
    back, ahead = (torch.minimum(x, seen) for x in span_lengths(seen, config))  # longer ones see no more, and overflow
    last = (position - config.window_len()).clamp(max=keys - 1)
    return Reach(position, first, last, back, ahead)


def _positions(value: object, batch: int, tokens: int, keys: int, device: torch.device) -> torch.Tensor:
    if value is None:
        if tokens > keys:
            raise ValueError(f"cache_position: expected positions where queries, {tokens}, are more than keys, {keys}")
        return torch.arange(keys - tokens, keys, dtype=torch.int32, device=device)[None]
    positions = _checks.integers("cache_position", value)
    _checks.same_device("cache_position", positions, device)
    if positions.shape not in ((tokens,), (batch, tokens)):
        raise ValueError(
            f"cache_position: expected shape [{tokens}] or [{batch}, {tokens}], got {list(positions.shape)}"
        )
    if _checks.readable(positions) and positions.numel():
        low, high = (int(x) for x in positions.aminmax())
        if low < 0 or high >= keys:
            raise ValueError(f"cache_position: expected numbers in 0..{keys - 1}, the keys, got {low}..{high}")
    return torch.atleast_2d(positions.to(torch.int32))


def window_mask(config: SuperlinearConfig, reached: Reach, keys: int, mask: torch.Tensor | None) -> IntervalMask | None:
    """The window of every query: keys max(first, position - W + 1)..position; None where W is 0."""
    if not config.window_len():
        return None
    ends = reached.position + 1
    starts = torch.maximum(ends - config.window_len(), reached.first)
    starts, ends = starts.clamp(0, keys), torch.maximum(ends, starts).clamp(0, keys)
    window = IntervalMask._raw(starts[:, None, :, None].contiguous(), ends[:, None, :, None].contiguous(), keys)
    if mask is None:
        return window
    stop = torch.full_like(mask, _NEVER, dtype=torch.int32)[:, None]
    return window.with_key_lifetime(stop.masked_fill(mask[:, None], 0), stop)
