"""The cache of a stream over several ranks: every R-th token on each, parts of a softmax merged by their log-sum-exp."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from .. import _checks
from ..cache import _sink_moves as moves
from ..cache._share import Share
from ..cache._sink_prefill import attend
from ..cache.sink import SinkKVCache
from ..nn.sink_attention import SinkAttention
from ..ops import _call
from ..ops._sink_checks import check_states, check_tokens, count_of
from ..ops.sink_attention_step import sink_attention_step
from ..rope import RopeSpec
from . import _collectives
from ._collectives import Group
from .agreement import checked


class ShardedSinkKVCache(SinkKVCache):
    """A `SinkKVCache` whose keys and values lie on the ranks of a group: token n of a sequence, sinks too, on rank n mod R.

    Every rank is given the same queries, keys and values of all heads, and gets the same results: it attends to the keys that it
    has, all ranks exchange their part of the softmax, 4 B T Hq (Dv + 1) bytes from each in one all-gather, and add the parts up
    in the order of ranks, in float32. `append` and all that forgets change every rank by itself. `nn.SinkAttention` takes one
    as its cache. Of a group of one it is the plain cache.

    Args:
        batch, num_kv_heads, head_dim: as in `SinkKVCache`, of the whole.
        group: a process group, a one-dimensional DeviceMesh, or None for the default group.
        options: of `SinkKVCache`: `sink_tokens`, `window` and `slack` of the whole; the ring of a rank has their R-th part of
            places, rounded up as there.

    Attributes:
        sink_k, sink_v, ring_k, ring_v, k_scale, v_scale: of this rank's tokens. `gather` and `state_dict` give these, too.
        seen, written, first: of the whole, equal on all ranks.
        rank, size: of the group.

    Raises:
        TypeError, ValueError: as `SinkKVCache`; a group without this rank; ranks that are given different options, or later
            tokens of different shapes: on all of them.
        RuntimeError: there is no process group.

    Example:
        >>> cache = subquad.distributed.ShardedSinkKVCache(1, 2, 8, sink_tokens=2, window=6)  # doctest: +SKIP
        >>> out, lse = cache.step(q, k, v)  # on every rank  # doctest: +SKIP
    """

    counters = (*SinkKVCache.counters, "sink_tokens", "rank", "size")

    def __init__(self, batch: int, num_kv_heads: int, head_dim: int, *, group: Group = None, **options: Any) -> None:
        self.group = _collectives.group_of(group)
        self.rank, self.size = _collectives.rank_and_size(self.group)
        self.share = Share(self.rank, self.size)
        self.agreed: set[str] = set()  # signatures of calls that all ranks agreed on
        facts = {name: _described(x) for name, x in options.items() if name != "device"}
        checked(
            self,
            lambda: {"batch": batch, "num_kv_heads": num_kv_heads, "head_dim": head_dim, **facts},
            lambda: SinkKVCache.__init__(self, batch, num_kv_heads, head_dim, **options),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedSinkKVCache:
        twin: ShardedSinkKVCache = type(self).__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update({n: x if n == "group" else deepcopy(x, memo) for n, x in vars(self).items()})
        return twin

    def evict(self, lo: int | torch.Tensor, hi: int | torch.Tensor) -> None:
        """As `SinkKVCache.evict`, of a group of one.

        Raises:
            ValueError: a larger group, on whose ranks tokens would have to change places.
        """
        if self.size > 1:
            raise ValueError(
                f"evict: expected a cache of one rank, for tokens would change theirs, got {self.size} ranks"
            )
        super().evict(lo, hi)

    # --- attention ----------------------------------------

    def _few(self, q: torch.Tensor, k: torch.Tensor) -> bool:
        return self.size == 1 and super()._few(q, k)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        m: torch.Tensor | None,
        together: bool,
        scale: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.size == 1:
            return super()._attend(q, k, v, m, together, scale)
        part: list[torch.Tensor] = []

        def local() -> None:  # before the ranks agree, so that what it raises on one is raised on all
            _checks.flag("together", together)
            part.extend(attend(self, q, k, v, m, together, scale, None))
            _check_sinks(self.sink_logits, q)

        def signature() -> dict[str, Any]:
            shapes = {name: (list(x.shape), x.dtype) for name, x in (("q", q), ("k", k), ("v", v))}
            given = m is not None, together, scale, self.sink_logits is not None
            return {"op": "ShardedSinkKVCache.step", "options": given, **shapes}

        checked(self, signature, local)
        out, lse = merged(part[0], part[1], self.sink_logits, self.group)
        if m is not None:  # what is no token sees no sink logit either
            column = torch.arange(q.shape[1], device=q.device)
            lse = lse.masked_fill((column >= m[:, None])[..., None], -torch.inf)
        return out, lse

    def _enter(
        self,
        q: torch.Tensor | None,
        k: torch.Tensor,
        v: torch.Tensor,
        m: torch.Tensor | None,
        *,
        together: bool = False,
        commit: bool = True,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes this rank's tokens among new ones; queries come here only where there are none to attend."""
        if self.size == 1:
            return super()._enter(q, k, v, m, together=together, commit=commit, scale=scale)
        q, k, v = _call.autocast(q, k, v, to=self.sink_k)
        check_tokens(q, k, v)
        check_states(k, v, self.sink_k, self.sink_v, self.ring_k, self.ring_v, self.k_scale, self.v_scale)
        _checks.flag("commit", commit)
        count = torch.full_like(self.seen, k.shape[1]) if m is None else count_of(m, k).clamp(0, k.shape[1])
        share, after = self.share, self.seen + count
        held, own = share.count(self.seen), share.columns(self.seen[:, None], k.shape[1])
        keys, values = moves.columns(k, own), moves.columns(v, own)
        write(self, keys, values, self.seen[:, None] + own, held, share.count(after) - held)
        self.written.copy_(torch.maximum(self.written, after))
        if commit:
            self.seen.copy_(after)
        heads, wide = 0 if q is None else q.shape[2], torch.promote_types(k.dtype, torch.float32)
        return v.new_zeros((*v.shape[:2], heads, v.shape[3])), k.new_zeros((*k.shape[:2], heads), dtype=wide)


def shard_caches(model: nn.Module, group: Group = None) -> list[str]:
    """From now on the `SinkAttention` layers of a model make caches that are sharded over a group, each a `ShardedSinkKVCache`.

    Every rank then runs the model on the same tokens: `forward` with a cache, `generate`. Layers may be split by heads, too, over
    another dimension of a mesh.

    Args:
        model: with weights that are equal on all ranks of the group.
        group: a process group, a one-dimensional DeviceMesh, or None for the default group.

    Returns:
        Names of the layers.

    Raises:
        ValueError: there are none; a group without this rank.
        RuntimeError: there is no process group.
    """
    made = _OnRanks(_collectives.group_of(group))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SinkAttention)}
    if not layers:
        raise ValueError(f"model: expected layers of SinkAttention, got none in {type(model).__name__}")
    for layer in layers.values():
        layer.cache_kind = made
    return list(layers)


class _OnRanks:
    """Makes sharded caches. Of a copied layer it is the same, for groups cannot be copied."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def __call__(self, batch: int, **options: Any) -> ShardedSinkKVCache:
        return ShardedSinkKVCache(batch, group=self.group, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> _OnRanks:
        return self


def write(
    cache: SinkKVCache, k: torch.Tensor, v: torch.Tensor, position: torch.Tensor, number: torch.Tensor, m: torch.Tensor
) -> None:
    """Tokens [B, N] of a cache's share, of which the first `m` [B] are some, take their places; no counter changes.

    Args:
        position: [B, N] or [N], in the sequence.
        number: int64 [B], of the first of them in the share.
    """
    rope = cache.rope
    if rope is not None and cache.key_rope == "post" and cache.share.size > 1:
        k, rope = rope.rotate(k, position[..., None]), None  # the operator takes numbers for positions
    sink_attention_step(
        None, k, v, cache.sink_k, cache.sink_v, cache.ring_k, cache.ring_v, number.clone(), number.clone(),
        torch.zeros_like(number), window=0, k_scale=cache.k_scale, v_scale=cache.v_scale, m=m, rope=rope,
        key_rope=cache.key_rope, backend=cache.backend,
    )  # fmt: skip


def merged(
    out: torch.Tensor, lse: torch.Tensor, sink_logits: torch.Tensor | None, group: Group
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the keys of all ranks.

    Args:
        out, lse: of this rank's keys, [..., Hq, Dv] and [..., Hq]; 0 and -inf where it has none.
        sink_logits: [Hq], one more term exp(sink_logits[h]) of the denominator, once; equal on all ranks.

    Returns:
        (out in its dtype, lse), the same bits on all ranks.
    """
    wide = torch.promote_types(out.dtype, torch.float32)
    if not out.numel():
        return out, lse
    message = torch.cat([out.to(wide), lse.to(wide)[..., None]], -1)
    _, size = _collectives.rank_and_size(group)
    every = _collectives.all_gather(message, group).view(size, *message.shape)
    parts, terms = every[..., :-1], every[..., -1]
    if sink_logits is not None:
        terms = torch.cat([terms, sink_logits.to(wide).expand(1, *lse.shape)])
    total = terms.logsumexp(0)
    weights = (every[..., -1] - total.masked_fill(total == -torch.inf, 0.0)).exp()
    whole = torch.zeros_like(parts[0])
    for weight, part in zip(weights, parts, strict=True):  # in the order of ranks
        whole += weight[..., None] * part
    return whole.to(out.dtype), total.to(lse.dtype)


def _check_sinks(sink_logits: torch.Tensor | None, q: torch.Tensor) -> None:
    if sink_logits is not None and sink_logits.shape != q.shape[2:3]:
        raise ValueError(f"sink_logits: expected shape {list(q.shape[2:3])}, got {list(sink_logits.shape)}")


def _described(value: Any) -> Any:
    """What ranks compare of an option."""
    if isinstance(value, RopeSpec):
        return repr(value), value.turns().tolist()
    return value.tolist() if isinstance(value, torch.Tensor) else value
