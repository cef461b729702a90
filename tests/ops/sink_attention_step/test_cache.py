"""`SinkKVCache` against lists: any order of chunks, prompts, rollbacks, evictions, resets and exchanged rows."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch

import subquad
from subquad import SinkKVCache
from subquad.cache import sink as module

from .streams import DIM, HEADS, INTERLEAVED, KV_HEADS, ROPE, Stream, drawn, streams_of

CLOSE = {"atol": 1e-9, "rtol": 1e-9}


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def cache_of(batch: int = 3, ring: int | None = None, **options: Any) -> SinkKVCache:
    """A cache in float64; `ring` places instead of whole tiles."""
    options = {"sink_tokens": 3, "window": 7, "rope": ROPE, "dtype": torch.float64} | options
    cache = SinkKVCache(batch, KV_HEADS, DIM, **options)
    if ring is not None:
        for name in ("ring_k", "ring_v", "k_scale", "v_scale"):
            x = getattr(cache, name)
            if x is not None:
                cache.put(name, x[:, :, :ring].clone())
    return cache


def fed(cache: SinkKVCache, streams: list[Stream], width: int, m: list[int] | None = None, **options: Any) -> None:
    """One call of all rows, compared; what is no token is NaN and comes out as 0 and -inf."""
    q, k, v = drawn(len(streams), width)
    count = [width] * len(streams) if m is None else m
    for row, n in enumerate(count):
        for x in (q, k, v):
            x[row, n:] = torch.nan
    out, lse = cache.step(q, k, v, None if m is None else torch.tensor(m), **options)
    for row, (stream, n) in enumerate(zip(streams, count, strict=True)):
        found = stream.step(q[row, :n], k[row, :n], v[row, :n], options.get("together", False))
        torch.testing.assert_close((out[row, :n], lse[row, :n]), found, **CLOSE)
        assert (out[row, n:] == 0).all() and (lse[row, n:] == -torch.inf).all()
        assert cache.seen[row] == len(stream.tokens)


def prompted(cache: SinkKVCache, streams: list[Stream], width: int, pad: list[int]) -> None:
    """A prompt padded on the left, compared."""
    q, k, v = drawn(len(streams), width)
    for row, n in enumerate(pad):
        for x in (q, k, v):
            x[row, :n] = torch.nan
    out, lse = cache.prefill(q, k, v, torch.tensor(pad))
    for row, (stream, n) in enumerate(zip(streams, pad, strict=True)):
        torch.testing.assert_close(
            (out[row, n:], lse[row, n:]), stream.step(q[row, n:], k[row, n:], v[row, n:]), **CLOSE
        )
        assert (out[row, :n] == 0).all() and (lse[row, :n] == -torch.inf).all()


def gathered(cache: SinkKVCache, streams: list[Stream]) -> None:
    """What is remembered, in order, bit by bit where keys are not rotated."""
    k, v, tokens, count = cache.gather()
    for row, stream in enumerate(streams):
        n = len(stream.tokens)
        window = range(max(stream.sinks, n - stream.window), n)
        seen = [*range(min(stream.sinks, n)), *(j for j in window if not stream.tokens[j].gone)]
        held = int(count[row])
        missing = len(seen) - held  # after a rollback the oldest may be overwritten; the next token does not see it
        assert missing in (0, 1)
        seen = seen[: stream.sinks] + seen[stream.sinks + missing :]
        assert tokens[row].tolist() == seen + [-1] * (tokens.shape[1] - held)
        for x, name in ((k, "k"), (v, "v")):
            assert (x[row, :, held:] == 0).all()
            if seen and (name == "v" or cache.key_rope == "pre" or cache.rope is None):
                assert torch.equal(x[row, :, :held], torch.stack([getattr(stream.tokens[j], name) for j in seen], 1))


def rolled(cache: SinkKVCache, streams: list[Stream], back: list[int]) -> None:
    cache.rollback(torch.tensor(back))
    for stream, n in zip(streams, back, strict=True):
        del stream.tokens[len(stream.tokens) - n :]


CONFIGURATIONS: list[dict[str, Any]] = [
    {},
    {"key_rope": "post"},
    {"positions": "absolute"},
    {"key_rope": "post", "positions": "absolute", "rope": INTERLEAVED},
    {"rope": INTERLEAVED, "window": 20},
    {"rope": None, "sink_tokens": 0},
    {"sink_logits": torch.linspace(-10, 10, HEADS).double(), "ring": 7},
    {"sink_logits": torch.linspace(-1.0, 2.0, HEADS, dtype=torch.float64), "ring": 9, "sink_tokens": 5},
    {"window": 0, "sink_tokens": 4},
    {"window": 1, "sink_tokens": 0, "sink_logits": torch.zeros(HEADS)},
    {"window": 1, "ring": 1},
    {"sink_tokens": 8, "window": 40},
]
ACTIONS = ("step",) * 6 + ("ragged",) * 4 + ("back",) * 3 + ("prompt", "space", "evict", "rows", "reset")


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_random_streams(options: dict[str, Any], seed: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    cache = cache_of(**options)
    streams, ring = streams_of(cache), cache.ring_k.shape[2]
    widths = [0, 1, 1, 2, 6, 7, 8, 33, 40, ring, ring + 1]
    for _ in range(40):
        action = chance.choice(
            ["step"] * 6 + ["ragged"] * 4 + ["prompt", "back", "back", "back", "space", "evict", "rows", "reset"]
        )
        batch = len(streams)
        if action == "step":
            fed(cache, streams, chance.choice(widths), together=chance.random() < 0.2)
        elif action == "ragged":
            width = chance.choice(widths)
            fed(cache, streams, width, [chance.randint(0, width) for _ in range(batch)])
        elif action == "prompt":
            prompted(cache, streams, 11, [chance.randint(0, 11) for _ in range(batch)])
        elif action == "back":
            rolled(cache, streams, [chance.randint(0, int(n)) for n in cache.seen - cache._floor()])
        elif action == "space":
            m = [chance.randint(0, cache.window) for _ in range(batch)]
            cache.evict_for_space(torch.tensor(m))
            for stream, n in zip(streams, m, strict=True):
                stream.evict_for_space(n)
        elif action == "evict":
            lo = [chance.randint(0, 1 + len(stream.tokens)) for stream in streams]
            hi = [a + chance.choice((0, 1, 2, 9, 60)) for a in lo]
            cache.evict(torch.tensor(lo), torch.tensor(hi))
            for stream, a, b in zip(streams, lo, hi, strict=True):
                stream.evict(a, b)
        elif action == "rows":
            rows = [chance.randrange(batch) for _ in range(3)]
            cache.reorder(torch.tensor(rows))
            streams = [
                Stream(**{**vars(streams[i]), "tokens": [type(t)(**vars(t)) for t in streams[i].tokens]}) for i in rows
            ]
        elif action == "reset":
            cache.reset(torch.tensor([True, False, False]))
            streams[0].tokens = []
        gathered(cache, streams)


@pytest.mark.parametrize("few", [0, 10**9], ids=["intervals", "operator"])
@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_both_ways_of_a_chunk(options: dict[str, Any], few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is taken for how many queries, the result is the same, rows of nothing included."""
    monkeypatch.setattr(module, "FEW_ROWS", few)
    cache = cache_of(**options)
    streams = streams_of(cache)
    for width, m in ((1, None), (2, [2, 0, 1]), (1, None), (9, [9, 3, 0]), (70, None), (5, [5, 5, 1])):
        fed(cache, streams, width, m)
        fed(cache, streams, 4, together=True)
    cache.evict_for_space(min(3, cache.window))
    for stream in streams:
        stream.evict_for_space(min(3, cache.window))
    fed(cache, streams, 3)


@pytest.mark.parametrize("chunks", [[23], [1] * 23, [5, 6, 12], [9, 14], [22, 1]], ids=str)
@pytest.mark.parametrize("key_rope", ["pre", "post"])
@pytest.mark.parametrize("positions", ["cache", "absolute"])
def test_chunks_are_one_sequence(chunks: list[int], key_rope: str, positions: str) -> None:
    """`sink_attention` of the whole sequence, whose keys its caller has rotated, says the same."""
    q, k, v = drawn(2, 23)
    places = torch.arange(23)[:, None]
    whole = subquad.sink_attention(
        ROPE.rotate(q, places), ROPE.rotate(k, places), v, sink_tokens=3, window=7, return_lse=True, scale=0.4,
        q_shift=ROPE if positions == "cache" else None,
    )  # fmt: skip
    plain = subquad.RopeSpec(ROPE.inv_freq, 6)
    cache = cache_of(2, key_rope=key_rope, positions=positions, rope=plain)
    parts = zip(*(x.split(chunks, 1) for x in (q, k, v)), strict=True)
    found = [torch.cat(x, 1) for x in zip(*(cache.step(*part, scale=0.4) for part in parts), strict=True)]
    torch.testing.assert_close(tuple(found), whole, **CLOSE)


# --- taking tokens back ----------------------------------------


@pytest.mark.parametrize(("s", "w", "ring"), [(3, 7, 7), (3, 7, 12), (0, 5, 9), (2, 2, 4), (9, 6, 8)])
@pytest.mark.parametrize("seed", range(4))
def test_what_may_go_is_what_was_not_overwritten(s: int, w: int, ring: int, seed: int) -> None:
    """A ring of numbered tokens, written down: going back is legal if the window before the next token is still there."""
    chance, cache = random.Random(seed), cache_of(1, sink_tokens=s, window=w, ring=ring)
    held: dict[int, int] = {}  # the token in every place, by the number of its writing
    numbers: list[int] = []  # of the tokens of the sequence
    written = 0
    for _ in range(50):
        new = chance.choice((0, 1, 1, 2, 5, ring, 2 * ring))
        cache.append(*drawn(1, new)[1:])
        for _ in range(new):
            if len(numbers) >= s:
                held[(len(numbers) - s) % ring] = written
            numbers.append(written)
            written += 1
        n = len(numbers)
        legal = [
            left == n or all(held.get((j - s) % ring) == numbers[j] for j in range(max(s, left - w + 1), left))
            for left in range(n + 1)
        ]
        for left in range(n + 1):
            trial = copy.deepcopy(cache)
            if legal[left]:
                trial.rollback(n - left)
            else:
                with pytest.raises(ValueError, match=r"^tokens: expected at most the \d+ that are kept"):
                    trial.rollback(n - left)
            assert trial.seen.tolist() == [left if legal[left] else n]
        assert cache.kept == next((r for r in range(n) if not legal[n - r - 1]), n)
        left = chance.choice([left for left in range(n + 1) if legal[left]])
        cache.rollback(n - left)
        del numbers[left:]


@pytest.mark.parametrize("key_rope", ["pre", "post"])
def test_back_to_the_sinks(key_rope: str) -> None:
    """To what is no more than sinks, also behind tokens of the ring that were forgotten; what comes then is not."""
    torch.manual_seed(0)
    cache = cache_of(key_rope=key_rope)
    sinks = cache.sink_tokens
    for left in (sinks, sinks - 1, 0):
        for forget in (lambda: cache.evict(20, 22), lambda: cache.evict_for_space(cache.window)):
            cache.reset()
            streams = streams_of(cache)
            fed(cache, streams, 30)
            forget()
            cache.rollback(cache.seen - left)
            for stream in streams:
                del stream.tokens[left:]
            fed(cache, streams, 3)
            fed(cache, streams, 12)
            gathered(cache, streams)


@pytest.mark.parametrize("key_rope", ["pre", "post"])
def test_drafts(key_rope: str) -> None:
    """Two hundred drafts of five tokens, of which every row accepts some: as if the accepted ones had come alone."""
    torch.manual_seed(1)
    chance = random.Random(1)
    cache = cache_of(key_rope=key_rope, ring=11)
    streams = streams_of(cache)
    fed(cache, streams, 23)
    for _ in range(200):
        fed(cache, streams, 5)
        rolled(cache, streams, [chance.randint(0, 5) for _ in streams])
    assert min(len(stream.tokens) for stream in streams) > 30 * 11
    gathered(cache, streams)


@pytest.mark.parametrize("kv_dtype", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("fed_before", [0, 2, 9, 40])
def test_room_for_longer_drafts(fed_before: int, kv_dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    cache = cache_of(2, kv_dtype=kv_dtype, ring=8)
    streams = streams_of(cache)
    q, k, v = drawn(2, fed_before)
    cache.append(k, v)
    cache.rollback(min(2, cache.kept))
    before, kept = cache.gather(), cache.kept
    room = 8 - cache.window + 1
    cache.keep(room)
    assert cache.ring_k.shape[2] == 8
    cache.keep(room + 1)
    assert cache.ring_k.shape[2] == 64
    cache.keep(100)
    assert cache.ring_k.shape[2] == 128
    assert all(torch.equal(x, y) for x, y in zip(cache.gather(), before, strict=True))
    assert cache.kept == kept
    if kv_dtype is not None:
        return
    for row, stream in enumerate(streams):
        n = int(cache.seen[row])
        stream.step(q[row, :n], k[row, :n], v[row, :n])
    for back in (100, 100, 3, 0, 100):
        fed(cache, streams, 100)
        rolled(cache, streams, [back, 7])
    fed(cache, streams, 3)


def test_a_rotation_keeps_its_numbers_when_a_fake_device_asks() -> None:
    spec = subquad.RopeSpec(ROPE.inv_freq, 6)
    numbers = spec.turns().clone()
    assert spec.turns("meta").is_meta
    assert torch.equal(spec.turns("cpu"), numbers)
