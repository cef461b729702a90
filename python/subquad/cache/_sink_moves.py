"""Tokens of a `SinkKVCache` on the move: read in order, into a larger ring, closer together. No value is read on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..reference.sink_attention_step import quantised, token_of_place

if TYPE_CHECKING:
    from .sink import SinkKVCache


def rows(cache: SinkKVCache, side: str, token: torch.Tensor) -> torch.Tensor:
    """Keys ("k") or values ("v") of tokens [B, P] that are there, as [B, Hkv, P, D]; zero where `token` is negative.

    Tokens are numbered as the cache's share has them. In the dtype of the sinks, those of a quantised ring in float32.
    """
    sinks, ring, scale = _side(cache, side)
    count, places = sinks.shape[2], ring.shape[2]
    place = torch.where(token < count, token, count + (token - count) % places).clamp_min(0)
    if scale is not None:
        ring = ring.float() * scale[..., None]
    held = torch.cat([sinks.to(ring.dtype), ring], 2)
    return torch.where((token >= 0)[:, None, :, None], _at(held, place), 0.0)


def columns(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [B, T, ...] at columns [B, N], those outside taken from the edge."""
    index = index.clamp(0, x.shape[1] - 1).view(*index.shape, *(1,) * (x.dim() - 2))
    return x.take_along_dim(index, 1) if x.shape[1] else x


def enlarge(cache: SinkKVCache, places: int) -> None:
    """Rings of `places` places, in which every token that was there has its new one."""
    share, before = cache.share, cache.ring_k.shape[2]
    token = token_of_place(share.count(cache.seen), cache.sink_k.shape[2], places)
    source = torch.where(token >= (share.count(cache.written) - before)[:, None], token, -1)
    for side in ("k", "v"):
        ring, scale = _moved(cache, side, source)
        cache.put(f"ring_{side}", ring)
        if scale is not None:
            cache.put(f"{side}_scale", scale)
    # What is not there any more, all below written - places, stays the same.
    cache.written.add_(share.size * (places - before))


def evict(cache: SinkKVCache, lo: torch.Tensor, hi: torch.Tensor) -> None:
    """Without tokens lo <= j < hi of every sequence, int64 [B]; see `SinkKVCache.evict`."""
    seen, sinks, places = cache.seen, cache.sink_tokens, cache.ring_k.shape[2]
    oldest = cache._oldest()
    held = (seen - oldest).clamp_min(0)  # tokens in the ring
    stay = seen.clamp_max(sinks)
    gone, from_sinks, from_ring = (
        hi.clamp(a, b) - lo.clamp(a, b)
        for a, b in ((torch.zeros_like(seen), seen), (torch.zeros_like(seen), stay), (oldest, oldest + held))
    )
    stay, left = stay - from_sinks, held - from_ring
    rise = torch.minimum(sinks - stay, left)  # tokens of the ring that become sinks
    count = torch.where(stay + rise < sinks, stay + rise, seen - gone)
    first = count - (left - rise)

    def survivor(number: torch.Tensor) -> torch.Tensor:
        """The token in the ring that is the `number`-th to stay [B, P]."""
        return oldest[:, None] + number + torch.where(number < (lo - oldest)[:, None], 0, from_ring[:, None])

    slot = torch.arange(sinks, device=seen.device)
    among = torch.where(slot < lo[:, None], slot, slot + from_sinks[:, None])
    number = slot - stay[:, None]
    to_sinks = torch.where(number < 0, among, torch.where(number < rise[:, None], survivor(number), -1))
    token = token_of_place(count, sinks, places)
    to_ring = torch.where(token >= first[:, None], survivor(token - (first - rise)[:, None]), -1)
    touched = gone > 0
    for side in ("k", "v"):
        turned = side == "k" and cache.key_rope == "post"
        sink = rows(cache, side, to_sinks)
        ring, scale = _moved(cache, side, to_ring)
        if turned:
            sink = _turned(cache, sink, slot - to_sinks)
            ring, scale = _turned_ring(cache, ring, scale, token - to_ring)
        for name, value in ((f"sink_{side}", sink), (f"ring_{side}", ring), (f"{side}_scale", scale)):
            if value is not None:
                _overwrite(getattr(cache, name), value, touched)
    for counter, value in ((cache.first, torch.where(count > sinks, first, 0)), (cache.written, count), (seen, count)):
        _overwrite(counter, value, touched)


# --- parts ----------------------------------------


def _side(cache: SinkKVCache, side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return getattr(cache, f"sink_{side}"), getattr(cache, f"ring_{side}"), getattr(cache, f"{side}_scale")


def _at(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """x [B, H, N, ...] at places [B, P]."""
    index = place[:, None] if x.dim() == 3 else place[:, None, :, None]
    return x.gather(2, index.expand(*x.shape[:2], place.shape[1], *x.shape[3:]))


def _bits(x: torch.Tensor) -> torch.Tensor:
    """float8 as int8: it knows neither gather nor where."""
    return x.view(torch.int8) if x.dtype is torch.float8_e4m3fn else x


def _moved(cache: SinkKVCache, side: str, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A ring, and its scales, that has these tokens of the ring [B, P] in its places; zero where `token` is negative."""
    sinks, ring, scale = _side(cache, side)
    place, there = (token - sinks.shape[2]) % ring.shape[2], (token >= 0)[:, None]
    bits = torch.where(there[..., None], _at(_bits(ring), place), 0).view(ring.dtype)
    return bits, None if scale is None else torch.where(there, _at(scale, place), 1.0)


def _turned(cache: SinkKVCache, keys: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    assert cache.rope is not None
    return cache.rope.rotate(keys, by[:, None])


def _turned_ring(
    cache: SinkKVCache, keys: torch.Tensor, scale: torch.Tensor | None, by: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if scale is None:
        return _turned(cache, keys, by), None
    fresh, factor = quantised(_turned(cache, keys.float() * scale[..., None], by), keys.dtype)
    moves = (by != 0)[:, None]  # of the others, not even the last bit changes
    bits = torch.where(moves[..., None], _bits(fresh), _bits(keys)).view(keys.dtype)
    return bits, torch.where(moves, factor, scale)


def _overwrite(x: torch.Tensor, value: torch.Tensor, rows: torch.Tensor) -> None:
    """x [B, ...] becomes `value` in these rows, bool [B]."""
    rows = rows.view(-1, *(1,) * (x.dim() - 1))
    _bits(x).copy_(torch.where(rows, _bits(value.to(x.dtype)), _bits(x)))
