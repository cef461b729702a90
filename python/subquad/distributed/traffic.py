"""Bytes that a layer brings into one rank: counted for groups that need not exist, beside formulas, and these for a real model.

`subquad bench distributed` prints both tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..masks import IntervalMask
from ..nn.lawcat import LawcatAttention
from . import _collectives
from .causal_conv1d import causal_conv1d
from .gated_linear_attention import gated_linear_attention
from .interval_attention import interval_attention
from .lawcat import lawcat
from .layout import SequenceLayout
from .sink_cache import ShardedSinkKVCache

RANKS = (2, 4, 16, 64, 256, 1024)
_TOKENS = 8  # a rank, where bytes are counted


@dataclass(frozen=True)
class Sizes:
    """Of a layer: heads HQ and HKV of D, taps W of convolutions, a window and sinks, bytes of an element."""

    heads: int
    kv_heads: int
    width: int
    taps: int
    window: int
    sinks: int
    element: int

    @property
    def state(self) -> int:
        """Numbers in one column of all states."""
        return self.heads * self.width

    @property
    def key(self) -> int:
        """Bytes of a token's keys and values."""
        return 2 * self.kv_heads * self.width * self.element


SMALL = Sizes(heads=2, kv_heads=2, width=8, taps=4, window=5, sinks=2, element=4)
LARGE = Sizes(heads=32, kv_heads=8, width=128, taps=4, window=1024, sinks=4, element=2)


def _gathered(s: Sizes, ranks: int, columns: int) -> int:
    return (ranks - 1) * 4 * s.state * (columns + 2)


def _scanned(s: Sizes, ranks: int, columns: int) -> int:
    return (ranks - 1) * 4 * -(-s.state // ranks) * (2 * columns + 3)


def _lawcat(s: Sizes, tokens: int, ranks: int, late: bool) -> int:
    """A whole layer with gates of every channel, rope="linear" and a window; of the latter comes a column of the state."""
    convolved = (s.taps - 1) * (s.heads + s.kv_heads) * s.width * s.element
    rows, gates = (s.window + s.taps - 1, 4 * s.kv_heads * s.width) if late else (s.window - 1, 0)
    near = min(rows, tokens - tokens // ranks) * (s.key + gates)
    return convolved + near + (_gathered if ranks <= 4 else _scanned)(s, ranks, s.width + 1)


# Bytes into the last rank of `ranks`, forward, of a sequence of `tokens` in equal parts; of one token where they are decoded.
FORMULAS: dict[str, Callable[[Sizes, int, int], int]] = {
    "linear, all_gather": lambda s, tokens, ranks: _gathered(s, ranks, s.width),
    "linear, scan": lambda s, tokens, ranks: _scanned(s, ranks, s.width),
    "convolution": lambda s, tokens, ranks: (s.taps - 1) * s.heads * s.width * s.element,
    "window and sinks": lambda s, tokens, ranks: min(s.window - 1 + s.sinks, tokens - tokens // ranks) * s.key,
    "causal": lambda s, tokens, ranks: (tokens - tokens // ranks) * s.key,
    "decoding step": lambda s, tokens, ranks: (ranks - 1) * 4 * s.heads * (s.width + 1),
    "LAWCAT, window": lambda s, tokens, ranks: _lawcat(s, tokens, ranks, late=False),
    "LAWCAT, before it": lambda s, tokens, ranks: _lawcat(s, tokens, ranks, late=True),
}
FORMULAS["causal, ring"] = FORMULAS["causal"]
# Of attention that does not know what its mask shows: all keys of others come by once, in hops or at once.
OTHERS = ("ring attention", "all-gather of keys")
FORMULAS |= dict.fromkeys(OTHERS, FORMULAS["causal"])


@contextmanager
def played(rank: int, size: int) -> Iterator[list[int]]:
    """This process as one rank of a group of which there is no other: nothing is sent, and what would come is counted.

    Yields:
        The bytes of every message into this rank, in order. Numbers that depend on other ranks are wrong.

    Raises:
        RuntimeError: there is a process group.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("group: expected no process group, got one")
    came: list[int] = []

    def all_to_all(given: torch.Tensor, receive: list[int], send: list[int], group: Any) -> torch.Tensor:
        got = given.new_zeros((sum(receive), *given.shape[1:]))
        came.append((len(got) - receive[rank]) * given.shape[1:].numel() * given.element_size())
        return got

    def all_gather(given: torch.Tensor, group: Any) -> torch.Tensor:
        came.append((size - 1) * given.nbytes)
        return torch.cat([given] * size)

    def swap(given: Any, coming: Any, group: Any) -> Callable[[], None]:
        for _, x in coming:
            came.append(x.zero_().nbytes)
        return lambda: None

    real = _collectives.all_to_all, _collectives.all_gather, _collectives.swap
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        _collectives.all_to_all, _collectives.all_gather, _collectives.swap = all_to_all, all_gather, swap
        yield came
    finally:
        _collectives.all_to_all, _collectives.all_gather, _collectives.swap = real
        dist.destroy_process_group()


def counted(name: str, ranks: int) -> int:
    """Bytes into the last rank, forward, of a layer of `SMALL` sizes."""
    s = SMALL
    q, k, v = (torch.ones(1, _TOKENS, heads, s.width) for heads in (s.heads, s.kv_heads, s.kv_heads))

    def attend(layout: SequenceLayout, covers: bool) -> None:
        layer = LawcatAttention(
            s.heads * s.width, s.heads, s.kv_heads, conv_size=s.taps, rope="linear", window_size=s.window,
            linear_covers_window=covers,
        )  # fmt: skip
        lawcat(layer, q.flatten(2), (k[:, :, 0], v[:, :, 0]), layout)

    calls: dict[str, Callable[[SequenceLayout], Any]] = {
        "linear, all_gather": lambda layout: gated_linear_attention(q, k, v, layout=layout, method="all_gather"),
        "linear, scan": lambda layout: gated_linear_attention(q, k, v, layout=layout, method="scan"),
        "convolution": lambda layout: causal_conv1d(q.flatten(2), torch.ones(s.heads * s.width, s.taps), layout=layout),
        "window and sinks": lambda layout: interval_attention(
            q, k, v, IntervalMask.sink(s.sinks, s.window), layout=layout
        ),
        "causal": lambda layout: interval_attention(q, k, v, IntervalMask.causal(), layout=layout),
        "causal, ring": lambda layout: interval_attention(q, k, v, IntervalMask.causal(), layout=layout, method="ring"),
        "decoding step": lambda layout: cache.step(q[:, :1], k[:, :1], v[:, :1]),
        "LAWCAT, window": lambda layout: attend(layout, covers=True),
        "LAWCAT, before it": lambda layout: attend(layout, covers=False),
    }
    with played(ranks - 1, ranks) as came:
        cache = ShardedSinkKVCache(1, s.kv_heads, s.width, sink_tokens=s.sinks, window=s.window)
        layout = SequenceLayout.contiguous(_TOKENS * ranks)
        calls[name](layout)  # which agrees
        came.clear()
        calls[name](layout)
        return sum(came)


def main() -> int:
    """Print both tables. Returns 1 if a count is not what its formula says, else 0."""
    names = [name for name in FORMULAS if name not in OTHERS]
    wrong = 0
    print(f"Bytes into the last rank, forward, counted: {SMALL}, {_TOKENS} tokens a rank")
    print("ranks".rjust(6), *(name.rjust(20) for name in names))
    for ranks in RANKS:
        cells = []
        for name in names:
            found, expected = counted(name, ranks), FORMULAS[name](SMALL, _TOKENS * ranks, ranks)
            wrong += found != expected
            cells.append(f"{found} {'=' if found == expected else f'!= {expected}'}".rjust(20))
        print(f"{ranks:>6}", *cells)
    print(f"\nMiB into the last rank and layer, forward, by the formulas: {LARGE}")
    print("tokens".rjust(9), "ranks".rjust(6), *(name.rjust(20) for name in FORMULAS))
    for tokens in (2**15, 2**17, 2**20):
        for ranks in (8, 64, 1024):
            sizes = [formula(LARGE, tokens, ranks) / 2**20 for formula in FORMULAS.values()]
            print(f"{tokens:>9} {ranks:>6}", *((f"{x:.3g}" if x < 1000 else f"{x:.0f}").rjust(20) for x in sizes))
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
