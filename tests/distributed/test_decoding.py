"""Caches of streams over several ranks, which are threads, beside one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import subquad
import subquad.distributed as sd
from subquad import RopeSpec, SinkKVCache, SuperlinearConfig, SuperlinearKVCache
from subquad.distributed import _collectives
from subquad.nn import SinkAttention

from .programs.common import LIMIT
from .threads import caught, on_ranks

B, HQ, HKV, D, DV = 3, 4, 2, 8, 5
ROPE = RopeSpec(1.0 / 30.0 ** (torch.arange(3) / 3), 6, attention_scaling=1.2)
LOGITS = torch.tensor([8.0, -8.0, 0.0, 3.0])  # far from 0, so that one that is dropped or counted twice shows
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"rope": None, "sink_logits": None},
    "pre": {},
    "post": {"key_rope": "post"},
    "absolute": {"positions": "absolute"},
    "post, absolute": {"key_rope": "post", "positions": "absolute"},
    "no window": {"window": 0},
    "no sinks": {"sink_tokens": 0},
    "int8": {"kv_dtype": torch.int8},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
}
DEFAULTS = {"v_head_dim": DV, "sink_tokens": 3, "window": 7, "slack": 0, "rope": ROPE, "sink_logits": LOGITS}
LIMITS = {torch.float32: LIMIT, torch.bfloat16: 3e-2, torch.float64: 1e-12}


def drawn(width: int, seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q, k, v [B, width, H, D]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, width, h, d, generator=generator).to(dtype) for h, d in ((HQ, D), (HKV, D), (HKV, DV))]


def life(cache: SinkKVCache, steps: int = 8) -> list[tuple[torch.Tensor, ...]]:
    """What comes out of a cache that is asked for everything."""
    found: list[tuple[torch.Tensor, ...]] = []
    dtype = cache.sink_k.dtype

    def step(width: int, m: list[int] | None = None, **options: Any) -> None:
        x = drawn(width, len(found), dtype)
        for row, n in enumerate(m or []):
            for part in x:
                part[row, n:] = torch.nan
        out, lse = cache.step(*x, None if m is None else torch.tensor(m), **options)
        found.append((out, lse, cache.seen.clone()))

    step(1)
    step(5, [5, 0, 3])
    step(0)
    for _ in range(steps):  # the window slides over every rank's border
        step(1)
    out, lse = cache.prefill(*drawn(40, 90, dtype), torch.tensor([0, 38, 4]))  # longer than the ring
    found.append((out, lse, cache.seen.clone()))
    step(2, [1, 0, 2])
    cache.rollback(torch.tensor([1, 0, 0]))
    step(2)
    step(4, together=True, commit=False)
    step(4, together=True)
    cache.keep(9)
    step(9)
    cache.rollback(9)
    step(1, [0, 1, 1])
    cache.reorder(torch.tensor([2, 2, 0]))
    step(3)
    cache.reset(torch.tensor([False, True, False]))
    cache.append(*drawn(2, 91, dtype)[1:])
    step(1)
    if cache.window:
        cache.evict_for_space(5)
    step(5)
    return found


def narrow(cache: SinkKVCache) -> SinkKVCache:
    """With as few places as the window and a token more need, not whole tiles: older ones are overwritten."""
    for name in ("ring_k", "ring_v", "k_scale", "v_scale"):
        if (x := getattr(cache, name)) is not None:
            cache.put(name, x[:, :, : max(1, cache.share.most(cache.window + 1))].clone())
    return cache


def close(found: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    assert found.dtype is expected.dtype
    largest = expected[expected.isfinite()].abs().max() if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=limit * float(largest))


@pytest.mark.parametrize(("name", "size"), [*((name, 3) for name in OPTIONS), ("pre", 2), ("plain", 5)])
def test_equal_to_one_process(name: str, size: int) -> None:
    """And all ranks have the same bits; with five, some have no key at the start."""
    options = DEFAULTS | OPTIONS[name]
    limit = LIMITS[options.get("dtype", torch.float32)]
    expected = life(narrow(SinkKVCache(B, HKV, D, **options)))
    every = on_ranks(size, lambda _: life(narrow(sd.ShardedSinkKVCache(B, HKV, D, **options))))
    for found in every:
        for (out, lse, seen), (out1, lse1, seen1), (out0, lse0, _) in zip(found, expected, every[0], strict=True):
            assert torch.equal(seen, seen1)
            close(out, out1, limit)
            close(lse, lse1, limit)
            assert torch.equal(out, out0) and torch.equal(lse, lse0)


def test_tokens_are_dealt_out() -> None:
    """Token n is on rank n mod R, once; and what is not a token of a row reaches none."""
    options = DEFAULTS | {"rope": None, "slack": 3}
    _, k, v = drawn(20, 1)
    whole = SinkKVCache(B, HKV, D, **options)
    whole.append(k, v)

    def body(rank: int) -> Any:
        cache = sd.ShardedSinkKVCache(B, HKV, D, **options)
        cache.append(k, v)
        return cache.sink_k.shape[2], cache.ring_k.shape[2], cache.gather()

    found = on_ranks(3, body)
    assert [sinks for sinks, *_ in found] == [1, 1, 1] and {places for _, places, _ in found} == {64}
    assert whole.ring_k.shape[2] == 64  # whole tiles
    tokens = whole.gather()[2]
    for rank, (_, _, (keys, values, token, count)) in enumerate(found):
        own = [n for n in tokens[0].tolist() if n % 3 == rank]
        assert token[0].tolist() == own + [-1] * (len(token[0]) - len(own)) and count.tolist() == [len(own)] * B
        assert torch.equal(keys[:, :, : len(own)].transpose(1, 2), k[:, own])
        assert torch.equal(values[:, :, : len(own)].transpose(1, 2), v[:, own])


def test_a_group_of_one_is_the_plain_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bits, and nothing is sent."""
    for name in ("all_gather", "all_to_all"):
        monkeypatch.setattr(_collectives, name, None)
    expected = life(narrow(SinkKVCache(B, HKV, D, **DEFAULTS)))
    (found,) = on_ranks(1, lambda _: life(narrow(sd.ShardedSinkKVCache(B, HKV, D, **DEFAULTS))))
    assert all(torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))

    def handed_over_and_evicted(rank: int) -> None:
        layout = sd.SequenceLayout.contiguous(9)
        pair = SinkKVCache(B, HKV, D, **DEFAULTS), sd.ShardedSinkKVCache(B, HKV, D, **DEFAULTS)
        for cache in pair:
            sd.hand_over(cache, *drawn(9, 1)[1:], layout=layout)
            assert cache.seen.tolist() == [9] * B
            cache.evict(2, 5)
        assert all(torch.equal(a, b) for a, b in zip(*(cache.gather() for cache in pair), strict=True))

    on_ranks(1, handed_over_and_evicted)


def test_nan_is_forgotten_with_its_token() -> None:
    """And reaches the channel of the value that it is in alone."""

    def steps(cache: SinkKVCache) -> torch.Tensor:
        found = []
        for t in range(16):
            q, k, v = drawn(1, t)
            if t == 5:
                v[0, :, :, 2] = torch.nan
                k[1] = torch.nan
            found.append(cache.step(q, k, v)[0])
        return torch.cat(found, 1)

    expected = steps(SinkKVCache(B, HKV, D, **DEFAULTS)).isnan()
    assert expected.any() and not expected[:, -1].any()
    for found in on_ranks(3, lambda _: steps(sd.ShardedSinkKVCache(B, HKV, D, **DEFAULTS))):
        assert torch.equal(found.isnan(), expected)


def test_copies_and_states() -> None:
    def body(rank: int) -> None:
        cache, other = (sd.ShardedSinkKVCache(B, HKV, D, **DEFAULTS) for _ in range(2))
        cache.append(*drawn(11, 1)[1:])
        twin = copy.deepcopy(cache)
        other.load_state_dict(cache.state_dict())
        for step in range(3):
            results = [each.step(*drawn(2, step)) for each in (cache, twin, other)]
            assert all(torch.equal(a, b) for x in results[1:] for a, b in zip(x, results[0], strict=True))
        state = cache.state_dict()
        assert caught(lambda: cache.load_state_dict(state | {"rank": 5})) == (
            f"ValueError: rank: expected {rank} as this cache has, got 5"
        )

    on_ranks(2, body)


def test_layer() -> None:
    """`nn.SinkAttention` with learned sinks, as it is."""
    layer = SinkAttention(24, HQ, HKV, sink_tokens=3, window=6, rope=ROPE, learned_sink=True, qk_norm=True)
    assert layer.sinks is not None
    layer.sinks.data.copy_(LOGITS)
    x = torch.randn(B, 24, 24, generator=torch.Generator().manual_seed(0))
    pad = torch.tensor([0, 5, 2])

    def steps(cache: SinkKVCache) -> torch.Tensor:
        parts = [layer(x[:, :10], cache=cache, pad=pad)[0]]
        parts += [layer(part, cache=cache)[0] for part in x[:, 10:].split([1] * 9 + [3, 2], 1)]
        return torch.cat(parts, 1)

    with torch.no_grad():
        expected = steps(layer.new_cache(B))

    def body(rank: int) -> torch.Tensor:
        with torch.no_grad():
            return steps(sd.ShardedSinkKVCache(B, HKV, 6, sink_tokens=3, window=6, rope=ROPE))

    for found in on_ranks(3, body):
        close(found, expected, LIMIT)


def refused(rank: int) -> dict[str, tuple[Callable[[], Any], str]]:
    """What is called, and the message on every rank."""
    q, k, v = drawn(2, 1)
    cache = sd.ShardedSinkKVCache(B, HKV, D, **DEFAULTS)
    plain = {"sink_tokens": 3, "window": 7}
    return {
        "evict": (lambda: cache.evict(1, 2), "evict: expected a cache of one rank, for tokens would change theirs, got 2 ranks"),
        "options": (
            lambda: sd.ShardedSinkKVCache(B, HKV, D, sink_tokens=3, window=7 + rank),
            "window: expected the same on all ranks of the group, got 7 on rank 0, 8 on rank 1",
        ),
        "an option of one rank": (
            lambda: sd.ShardedSinkKVCache(B, HKV, D, **plain, key_rope="mid" if rank else "pre"), "key_rope: expected one of"
        ),
        "rotations": (
            lambda: sd.ShardedSinkKVCache(B, HKV, D, **plain, rope=RopeSpec(torch.ones(2) / (1 + rank), 4)),
            "rope: expected the same",
        ),
        "shapes": (
            lambda: cache.step(q[:, : 1 + rank], k[:, : 1 + rank], v[:, : 1 + rank]),
            "q: expected the same on all ranks of the group, got ([3, 1, 4, 8]",
        ),
        "heads of one rank": (
            lambda: cache.step(q[:, :, : 4 - rank], k, v), "q: expected a multiple of the 2 heads of k, got 3"
        ),
        "sink logits": (
            lambda: cache.step(q[:, :, :2], k, v), "sink_logits: expected shape [2], got [4]"
        ),
        "queries": (lambda: cache.step(q[0], k, v), "q: expected shape [B, T, H, D], got [2, 4, 8]"),
        "tokens": (lambda: cache.append(k[:2], v[:2]), "sink_k: expected shape"),
        "rollback": (lambda: cache.rollback(9), "tokens: expected at most the 0 that are kept"),
        "without commit": (
            lambda: cache.step(*drawn(200, 1), commit=False), "commit: expected True for more than 122 tokens"
        ),
    }  # fmt: skip


def test_refused() -> None:
    """On all ranks, before anything has changed, and the group goes on."""

    def body(rank: int) -> Any:
        found = {}
        for name, (call, message) in refused(rank).items():
            found[name] = caught(call), message
            sd.agree(fine=True)
        return found

    for found in on_ranks(2, body):
        for name, (text, message) in found.items():
            assert message in text, name


# --- by heads ----------------------------------------


def test_caches_of_some_heads_are_those_of_all() -> None:
    """To the bit, and without a message: nothing of video or of a search is shared by heads of keys."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, search = (torch.randn(B, 48, heads, D, generator=generator) for heads in (8, 4, 4, 8))

    def video(own: slice, queries: slice) -> list[torch.Tensor]:
        sizes = {"frame_tokens": 4, "sink_frames": 1, "local_frames": 4, "block_frames": 2}
        cache = subquad.FrameSinkCache(1, B, k[:, :, own].shape[2], D, rope=ROPE, kv_dtype=torch.int8, **sizes)
        found = []
        for at in range(0, 48, 8):
            given = (q[:, at : at + 8, queries], k[:, at : at + 8, own], v[:, at : at + 8, own])
            found.append(cache.attend(0, *(x.contiguous() for x in given)))
            cache.commit()
        return found

    def spans(own: slice, queries: slice, route: str) -> list[torch.Tensor]:
        config = SuperlinearConfig(sw_index=1, num_spans=2, backward_factor=2.0, route_per=route)
        cache = SuperlinearKVCache(B, k[:, :, own].shape[2], 48, D, page_size=16)
        found = []
        for low, high in ((0, 40), (40, 41), (41, 48)):
            cache.append(k[:, low:high, own].contiguous(), v[:, low:high, own].contiguous())
            at = torch.full((B,), low)
            given = search[:, low:high, queries].contiguous(), q[:, low:high, queries].contiguous()
            found.append(subquad.superlinear_attention_step(*given, cache, at, config=config))
        return found

    kinds: list[Callable[..., list[torch.Tensor]]] = [video]
    kinds += [lambda own, queries, r=route: spans(own, queries, r) for route in ("head", "group")]
    with torch.no_grad():
        for kind in kinds:
            expected = kind(slice(None), slice(None))
            for rank in range(2):
                own, queries = slice(2 * rank, 2 * rank + 2), slice(4 * rank, 4 * rank + 4)
                for a, b in zip(kind(own, queries), expected, strict=True):
                    assert torch.equal(a, b[:, :, queries])


# --- from a prompt under context parallelism ----------------------------------------


@pytest.mark.parametrize(("name", "sharded"), [("pre", True), ("post", False), ("post", True), ("int8", True)])
def test_a_prompt_is_handed_over(name: str, sharded: bool) -> None:
    """The very bits that a cache has which was given all tokens, and what a rollback needs."""
    options = DEFAULTS | OPTIONS[name]

    def made(group: bool) -> SinkKVCache:
        return narrow(sd.ShardedSinkKVCache(B, HKV, D, **options) if group else SinkKVCache(B, HKV, D, **options))

    def steps(cache: SinkKVCache) -> list[torch.Tensor]:
        cache.rollback(cache.kept)
        found = [x for step in range(3) for x in cache.step(*drawn(2, step))]
        return [*found, *cache.gather(), cache.seen, cache.written]

    def body(rank: int) -> None:
        for tokens in (2, 4, 31):  # none but sinks, a ring that is not full, one that has wrapped
            _, k, v = drawn(tokens, 9)
            for layout in (
                sd.SequenceLayout.zigzag(tokens),
                sd.SequenceLayout.contiguous(tokens, lengths=[0, tokens, 0]),
            ):
                cache, other = made(sharded), made(sharded)
                other.append(k, v)
                sd.hand_over(cache, layout.shard(k), layout.shard(v), layout=layout)
                assert all(torch.equal(a, b) for a, b in zip(steps(cache), steps(other), strict=True))

    on_ranks(3, body)


def test_a_state_is_handed_over() -> None:
    q, k, v = (torch.rand(B, 13, h, 4, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 1))
    last = subquad.gated_linear_attention(q, k, v, output_final_state=True)[1]
    assert isinstance(last, torch.Tensor)

    def body(rank: int) -> None:
        for layout in (sd.SequenceLayout.zigzag(13), sd.SequenceLayout.contiguous(13, lengths=[5, 8, 0])):
            shards = (layout.shard(x) for x in (q, k, v))
            _, own = sd.gated_linear_attention(*shards, layout=layout, output_final_state=True)
            assert own is not None
            for state in (sd.final_state(own, layout=layout), *sd.final_state((own, own), layout=layout)):
                close(state, last, LIMIT)

    on_ranks(3, body)


def test_handing_over_refused() -> None:
    _, k, v = drawn(6, 1)

    def body(rank: int) -> None:
        layout = sd.SequenceLayout.contiguous(6)
        packed = sd.SequenceLayout.contiguous(6, cu_seqlens=[0, 2, 6])
        own = layout.shard(k), layout.shard(v)
        full = SinkKVCache(B, HKV, D, **DEFAULTS)
        full.append(k, v)
        one = dist.new_group([rank], use_local_synchronization=True)
        for call, message in (
            (lambda: sd.hand_over(full, *own, layout=layout), "cache: expected an empty one, got [6, 6, 6] tokens"),
            (lambda: sd.hand_over(SinkKVCache(B, HKV, D, **DEFAULTS), k, v, layout=layout), "k: expected 3 tokens"),
            (lambda: sd.hand_over(SinkKVCache(B, HKV, 7), *own, layout=layout), "sink_k: expected shape"),
            (lambda: sd.hand_over(SinkKVCache(B, HKV, D), *own, layout=packed), "layout: expected one sequence"),
            (lambda: sd.hand_over(None, *own, layout=layout), "cache: expected a subquad.SinkKVCache, got NoneType"),
            (lambda: sd.final_state(own[0], layout=packed), "layout: expected one sequence, got packed ones"),
        ):
            assert message in caught(call)  # type: ignore[arg-type]
            sd.agree(fine=True)
        cache = sd.ShardedSinkKVCache(B, HKV, D, group=dist.group.WORLD, **DEFAULTS)
        alone = sd.SequenceLayout.contiguous(6, group=one)
        assert "cache: expected one of rank 0 of 1 as the layout has, got" in caught(
            lambda: sd.hand_over(cache, k, v, layout=alone)
        )

    on_ranks(2, body)


# --- linear states by channels ----------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("gate", ["channel", "head", "none"])
def test_states_by_channels(gate: str, normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One key head on three ranks: outputs, states, and one message of V or V + 1 numbers a head."""
    width, steps = 12, 6
    q, k, v = (torch.rand(B, steps, h, d) for h, d in ((HQ, width), (1, width), (1, DV)))
    g = {"channel": -torch.rand(B, steps, 1, width), "head": -torch.rand(B, steps, 1), "none": None}[gate]
    s0 = torch.rand(B, 1, width, DV + normalize)
    expected, last = subquad.gated_linear_attention(
        q, k, v, g, initial_state=s0, normalize=normalize, output_final_state=True
    )
    assert isinstance(last, torch.Tensor)
    sent: list[Any] = []
    real = _collectives.all_reduce
    monkeypatch.setattr(
        _collectives, "all_reduce", lambda x, group: (sent.append((x.shape, x.dtype)), real(x, group))[1]
    )

    def body(rank: int) -> None:
        own = slice(4 * rank, 4 * rank + 4)
        state = s0[:, :, own].clone()
        for t in range(steps):
            at = None if g is None else g[:, t]
            o = sd.gated_linear_attention_step(q[:, t], k[:, t], v[:, t], at, state, normalize=normalize)
            close(o, expected[:, t], LIMIT)
        close(state, last[:, :, own], LIMIT)

    on_ranks(3, body)
    assert sent == [((B, HQ, DV + normalize), torch.float32)] * 3 * steps


def test_states_by_channels_refused() -> None:
    q, k, v = (torch.rand(B, h, d) for h, d in ((HQ, 6), (1, 6), (1, DV)))

    def body(rank: int) -> None:
        state = torch.zeros(B, 1, 3, DV)
        for call, message in (
            (
                lambda: sd.gated_linear_attention_step(q[..., :5], k[..., :5], v, None, state),
                "q: expected a multiple of 2 channels",
            ),
            (
                lambda: sd.gated_linear_attention_step(q, k, v, None, state, normalize=True),
                f"state: expected shape [3, 1, 3, 6], this rank's channels, got [3, 1, 3, {DV}]",
            ),
            (lambda: sd.gated_linear_attention_step(q, k, v, None, state, scale=1.0 + rank), "options: expected the same"),
            (lambda: sd.gated_linear_attention_step(q, k[: 3 - rank], v, None, state), "k: expected"),
        ):  # fmt: skip
            assert message in caught(call)
            sd.agree(fine=True)
        assert not state.any()

    on_ranks(2, body)
