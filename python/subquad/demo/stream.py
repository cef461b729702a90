"""A long text through three caches: sinks and a window, everything, and windows computed anew."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..integrations.transformers import SinkConfig, convert
from .model import cache_name

SINKS = 4
STRIDE = 4  # of so many chunks one is also computed anew: each costs a whole window

Tick = Callable[[], None]


def steps(tokens: int, chunk: int) -> int:
    """How often `streams` ticks."""
    chunks = tokens // chunk
    return 2 * chunks + len(range(0, chunks, STRIDE))


@torch.no_grad()
def streams(
    model: nn.Module, ids: torch.Tensor, window: int, chunk: int, tick: Tick, first: int | None = None
) -> dict[str, Any]:
    """Read `ids` [1, T] chunk by chunk, which for a streaming cache means the same as token by token.

    Args:
        model: a stock model, which is left alone.
        window: capacity of the streaming cache, its sinks included.
        chunk: tokens of a call.
        first: token that texts begin with, as `ids` does; windows computed anew do, too.

    Returns:
        "chunk", "window", and in "rows" by name of the cache, "sinks + window", "all tokens" or "windows anew": "loss", nats per
        token of each chunk, None where it was not computed, and "seconds" and "bytes" of each chunk.
    """
    streaming = copy.deepcopy(model)
    convert(streaming, attention=SinkConfig(sink_tokens=SINKS, window=window - SINKS))
    parts = list(ids[:, : ids.shape[1] // chunk * chunk].split(chunk, 1))
    rows = {"sinks + window": _read(streaming, parts, tick), "all tokens": _read(model, parts, tick)}
    anew: dict[str, list[Any]] = {"loss": [None] * len(parts), "seconds": [], "bytes": []}
    for i in range(0, len(parts), STRIDE):
        end = (i + 1) * chunk
        begin = max(0, end - window)
        part = ids[:, begin:end]
        if begin and first is not None:
            part = torch.cat([torch.full_like(part[:, :1], first), part[:, 1:]], 1)
        logits = model(input_ids=part, use_cache=False, logits_to_keep=chunk + 1).logits[0]
        anew["loss"][i] = _loss(logits[-chunk - 1 : -1] if begin < end - chunk else logits[:-1], ids[0, :end])
        tick()
    return {"chunk": chunk, "window": window, "rows": rows | {"windows anew": anew}}


def _read(model: nn.Module, parts: list[torch.Tensor], tick: Tick) -> dict[str, list[Any]]:
    """Every chunk is predicted from what came before it; the first token of a text is not."""
    found: dict[str, list[Any]] = {"loss": [], "seconds": [], "bytes": []}
    name, cache, before = cache_name(model), None, None
    for part in parts:
        start = time.perf_counter()
        out = model(input_ids=part, use_cache=True, **{name: cache})
        found["seconds"].append(time.perf_counter() - start)
        cache, logits = out[name], out.logits[0]
        predicted = logits[:-1] if before is None else torch.cat([before, logits[:-1]])
        before = logits[-1:]
        found["loss"].append(_loss(predicted, part[0]))
        found["bytes"].append(held(cache))
        tick()
    return found


def _loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Nats per token of the last tokens of `ids`."""
    return F.cross_entropy(logits.float(), ids[-logits.shape[0] :]).item()


def held(cache: Any) -> int:
    """Memory of a cache's tensors."""
    total = 0
    for layer in cache.layers:
        state = getattr(layer, "state", None)
        if state is not None:
            total += state.nbytes
        elif layer.keys is not None:
            total += sum(x.numel() * x.element_size() for x in (layer.keys, layer.values))
    return total


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Of `streams`: tokens, bytes, time and perplexity after the window has filled, for the report."""
    chunk, first = found["chunk"], -(-found["window"] // found["chunk"])  # chunks until the window is full
    about = max(1, 1000 // chunk)  # chunks of about a thousand tokens
    rows = found["rows"]
    told: dict[str, Any] = {"tokens": chunk * len(rows["sinks + window"]["loss"]), "window": found["window"]}
    for name, row in rows.items():
        late = [x for x in row["loss"][first:] if x is not None]
        told[name] = {"perplexity": math.exp(sum(late) / len(late))}
        if row["bytes"]:
            early, last = row["seconds"][first : first + about], row["seconds"][-about:]
            told[name] |= {
                "bytes_when_full": row["bytes"][first],
                "bytes_at_the_end": row["bytes"][-1],
                "seconds_per_token_when_full": sum(early) / (len(early) * chunk),
                "seconds_per_token_at_the_end": sum(last) / (len(last) * chunk),
            }
    return told


def check(found: dict[str, Any]) -> dict[str, Any]:
    """Whether the streaming cache keeps its size to the byte once it is full, and the text stays likely."""
    told = summary(found)["sinks + window"]
    grown = told["bytes_at_the_end"] - told["bytes_when_full"]
    return {"bytes_grown": grown, "passed": grown == 0 and math.isfinite(told["perplexity"])}
