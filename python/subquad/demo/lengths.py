"""Decoding after contexts of many lengths: caches are made that long, for reading so much text would take an hour."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .model import cache_name
from .stream import held
from .variants import Variant

FAMILIES = ("dense", "lawcat")


@torch.no_grad()
def by_length(
    variants: Sequence[Variant], prompt: torch.Tensor, lengths: Sequence[int], steps: int, tick: Callable[[], None]
) -> list[dict[str, Any]]:
    """Time of a decoding step, and what the cache holds.

    Args:
        variants: what to time.
        prompt: [1, T], read for each. Keys and values of softmax are then repeated to the length; states of linear attention,
            which have one size, are told that they have seen so many tokens.
        lengths: in tokens.
        steps: of which the median is taken.

    Returns:
        A row for each variant and length: "name", "tokens", "seconds", "bytes".
    """
    rows = []
    for variant in variants:
        for length in lengths:
            variant.activate()
            name = cache_name(variant.model)
            cache = variant.model(input_ids=prompt, use_cache=True, logits_to_keep=1)[name]
            for layer in cache.layers:
                _lengthen(layer, length)
            token, seconds = prompt[:, -1:], []
            for _ in range(1 + steps):
                start = time.perf_counter()
                cache = variant.model(input_ids=token, use_cache=True, **{name: cache})[name]
                seconds.append(time.perf_counter() - start)
            rows.append(
                {
                    "name": variant.name,
                    "tokens": length,
                    "seconds": statistics.median(seconds[1:]),
                    "bytes": held(cache),
                }
            )
            tick()
    return rows


def _lengthen(layer: Any, length: int) -> None:
    state = getattr(layer, "state", None)
    if state is not None:
        state.seen = length
        return
    times = -(-length // layer.keys.shape[-2])
    layer.keys, layer.values = (x.repeat(1, 1, times, 1)[:, :, :length] for x in (layer.keys, layer.values))
