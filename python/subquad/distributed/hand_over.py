"""From a prompt under context parallelism to decoding: what caches keep of it changes its ranks once."""

from __future__ import annotations

from typing import Any

import torch

from .. import _checks
from ..cache._share import Share
from ..cache.sink import SinkKVCache
from ..ops import _sink_checks
from . import _collectives
from .agreement import checked
from .exchange import check_layout, check_tokens
from .layout import SequenceLayout
from .sink_cache import write

State = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def hand_over(cache: SinkKVCache, k: torch.Tensor, v: torch.Tensor, *, layout: SequenceLayout) -> None:
    """Tokens of a sequence, of which every rank has a shard, enter an empty cache, as `append` of all of them would.

    One message brings every rank what its cache keeps, and no more: the first tokens and as many of the last as the ring has
    places for. Of a `SinkKVCache` every rank gets all of these, of a `ShardedSinkKVCache` its R-th part.

    Args:
        cache: one that is empty, equal on all ranks; a sharded one on the ranks of the layout, in their order.
        k, v: [B, T of this rank, Hkv, D] and [B, T of this rank, Hkv, Dv] of the cache's dtype, without rotation where it has a
            `rope`.
        layout: where the tokens are.

    Raises:
        TypeError, ValueError: as `SinkKVCache.append`; a cache that holds tokens or is on other ranks, packed sequences, numbers
            of tokens that are not the layout's, tensors that require a gradient, ranks that differ. On all ranks.
    """
    check_layout(layout)

    def check() -> None:
        if not isinstance(cache, SinkKVCache):
            raise TypeError(f"cache: expected a subquad.SinkKVCache, got {type(cache).__name__}")
        if layout.packed:
            raise ValueError("layout: expected one sequence, as a row of a cache is, got packed ones")
        for name, x in (("k", k), ("v", v)):
            check_tokens(name, x, layout)
            _checks.no_gradient(name, x if torch.is_grad_enabled() else None, "none flows through a cache")
        _sink_checks.check_tokens(None, k, v)
        held = cache.sink_k, cache.sink_v, cache.ring_k, cache.ring_v, cache.k_scale, cache.v_scale
        _sink_checks.check_states(k, v, *held)
        if cache.share.size > 1 and cache.share != Share(layout.rank, layout.size):
            got = f"{cache.share.rank} of {cache.share.size}"
            raise ValueError(f"cache: expected one of rank {layout.rank} of {layout.size} as the layout has, got {got}")
        if _checks.readable(cache.seen) and bool(cache.written.any()):
            raise ValueError(f"cache: expected an empty one, got {_checks.shown(cache.written.tolist())} tokens")

    def signature() -> dict[str, Any]:
        shapes = {name: (x.shape[0], *x.shape[2:], x.dtype) for name, x in (("k", k), ("v", v))}
        kept = cache.share.size, cache.sink_tokens, cache.places
        return {"op": "hand_over", "cache": kept, **shapes}

    checked(layout, signature, check)
    sinks, tokens, share = cache.sink_tokens, layout.tokens, cache.share
    oldest = max(sinks, tokens - cache.places)

    def wanted(rank: int, position: torch.Tensor) -> torch.Tensor:
        here = position % share.size == (rank if share.size > 1 else 0)
        return position[here & ((position < sinks) | (position >= oldest))]

    ranks, own = range(layout.size), layout.positions()
    sent = [torch.searchsorted(own, wanted(rank, own)) for rank in ranks]
    arriving = [wanted(layout.rank, layout.positions(rank)) for rank in ranks]
    both = torch.cat([k, v], -1).transpose(0, 1)
    rows, lengths = torch.cat(sent).to(k.device), [len(part) for part in arriving]
    given = both[rows]
    if layout.size > 1:
        given = _collectives.all_to_all(given, lengths, [len(part) for part in sent], layout.group)
    position, order = torch.cat(arriving).sort()
    keys, values = given[order.to(k.device)].transpose(0, 1).split([k.shape[3], v.shape[3]], -1)
    begin = int((position < sinks).sum())
    for part, first in ((slice(0, begin), 0), (slice(begin, None), oldest)):
        at = position[part].to(k.device)
        number, count = (torch.full_like(cache.seen, n) for n in (share.count(first), len(at)))
        write(cache, keys[:, part], values[:, part], at, number, count)
    for counter in (cache.seen, cache.written):
        counter.fill_(tokens)


def final_state(state: State, *, layout: SequenceLayout) -> State:
    """The state after the last token of a sequence, on every rank: that of the rank which has it. Not differentiable.

    Args:
        state: as `subquad.distributed.gated_linear_attention` returns it, after this rank's last token; or a pair (s, z).
        layout: where the tokens are.

    Returns:
        New tensors, which `subquad.gated_linear_attention_step` goes on with.

    Raises:
        TypeError: no tensors.
        ValueError: packed sequences, which have states on several ranks; ranks that differ.
    """
    check_layout(layout)
    parts = state if isinstance(state, (tuple, list)) else (state,)

    def check() -> None:
        for x in parts:
            _checks.tensor("state", x)
        if layout.packed:
            raise ValueError("layout: expected one sequence, got packed ones")

    checked(layout, lambda: {"op": "final_state", "state": [(list(x.shape), x.dtype) for x in parts]}, check)
    owner = next((run.owner for run in layout.runs if run.low < run.high == layout.tokens), 0)
    found = [x.detach().clone(memory_format=torch.contiguous_format) for x in parts]
    if layout.size > 1:
        for x in found:
            _collectives.broadcast(x, owner, layout.group)
    return (found[0], found[1]) if isinstance(state, (tuple, list)) else found[0]
