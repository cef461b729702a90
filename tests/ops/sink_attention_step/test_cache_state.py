"""`SinkKVCache` as a state: copies, rows, files, dtypes, far counters, compiled steps, bad input."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

from subquad import RopeSpec, SinkKVCache
from subquad.cache import State
from subquad.cache import sink as module
from subquad.testing import backend_params

from .streams import DIM, HEADS, INTERLEAVED, KV_HEADS, ROPE, drawn, streams_of

CLOSE = {"atol": 1e-9, "rtol": 1e-9}


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def cache_of(batch: int = 2, **options: Any) -> SinkKVCache:
    options = {"sink_tokens": 3, "window": 7, "slack": 5, "rope": ROPE, "dtype": torch.float64} | options
    return SinkKVCache(batch, KV_HEADS, DIM, **options)


def filled(batch: int = 2, width: int = 90, **options: Any) -> SinkKVCache:
    cache = cache_of(batch, **options)
    _, k, v = drawn(batch, width, cache.sink_k.dtype)
    cache.append(k, v, torch.tensor([width - 4 * row for row in range(batch)]))
    return cache


def same(a: SinkKVCache, b: SinkKVCache) -> bool:
    one, other = a.tensors(), b.tensors()
    return one.keys() == other.keys() and all(
        x.dtype is other[n].dtype and torch.equal(x.float(), other[n].float()) for n, x in one.items()
    )


# --- the protocol ----------------------------------------


@pytest.mark.parametrize("kv_dtype", [None, torch.int8, torch.float8_e4m3fn])
def test_copies_and_files(kv_dtype: torch.dtype | None) -> None:
    """Whatever a cache is carried by, it goes on bit by bit, and by itself."""
    cache = filled(kv_dtype=kv_dtype, sink_logits=torch.randn(HEADS), dtype=torch.float32, backend="reference")
    assert isinstance(cache, State)
    cache.rollback(3)
    loaded = cache_of(5, kv_dtype=kv_dtype, sink_logits=cache.sink_logits, dtype=torch.float32, backend="reference")
    file = io.BytesIO()
    torch.save(cache.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    carried = [copy.deepcopy(cache), loaded]
    if kv_dtype is not torch.float8_e4m3fn:  # tensors of which torch cannot load from a pickle
        carried.append(pickle.loads(pickle.dumps(cache)))
    x = drawn(2, 3, torch.float32)
    expected = cache.step(*x)
    for other in carried:
        assert all(torch.equal(a, b) for a, b in zip(other.step(*x), expected, strict=True))
        assert same(other, cache)
        other.reset()
    assert cache.seen.tolist() == [90, 86]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 8}, "window: expected 8 as this cache has, got 7"),
        ({"sink_tokens": 4}, r"sink_k: expected shape \[2, 2, 4, 8\], got \[2, 2, 3, 8\]"),
        ({"key_rope": "post"}, "key_rope: expected 'post' as this cache has, got 'pre'"),
        ({"positions": "absolute"}, "positions: expected 'absolute' as this cache has, got 'cache'"),
        ({"rope": None}, "rope: expected None as this cache has"),
        ({"rope": INTERLEAVED}, "rope: expected those of this cache"),
        ({"rope": RopeSpec(ROPE.inv_freq, 6)}, "attention_scaling: expected 1.0 as this cache has, got 1.2"),
        ({"sink_logits": torch.zeros(4)}, "sink_logits: expected tensor"),
        ({"kv_dtype": torch.int8}, "state: expected 'k_scale'"),
        ({"dtype": torch.float32}, "sink_k: expected torch.float32, got torch.float64"),
        ({"v_head_dim": 9}, r"sink_v: expected shape \[2, 2, 3, 9\]"),
    ],
)
def test_a_state_of_another_cache_is_refused(options: dict[str, Any], message: str) -> None:
    cache, other = filled(), cache_of(**options)
    before = copy.deepcopy(other)
    with pytest.raises(ValueError, match="^" + message):
        other.load_state_dict(cache.state_dict())
    assert same(before, other)
    with pytest.raises(ValueError, match=r"^state: expected names of this SinkKVCache"):
        cache.load_state_dict(cache.state_dict() | {"more": 1})


def test_rows_and_resets() -> None:
    cache = filled(3)
    x, places = drawn(3, 2), {n: t.data_ptr() for n, t in cache.tensors().items()}
    alone = [copy.deepcopy(cache) for _ in range(3)]
    for row, one in enumerate(alone):
        one.select(torch.tensor([row]))
    expected = [one.step(*(t[row : row + 1] for t in x)) for row, one in enumerate(alone)]
    for a, b in zip(cache.step(*x), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(a, torch.cat(b), **CLOSE)
    cache.reorder(torch.tensor([2, 2, 0]))
    assert cache.seen.tolist() == [84, 84, 92]
    cache.reset(torch.tensor([True, False, False]))
    assert cache.seen.tolist() == cache.written.tolist() == [0, 84, 92] and cache.kept == 0
    cache.to("cpu")
    assert places == {n: t.data_ptr() for n, t in cache.tensors().items()}
    cache.select(torch.tensor([1, 1, 1, 2]))
    assert cache.seen.tolist() == [84, 84, 84, 92]
    cache.reset()
    assert cache.seen.tolist() == [0] * 4
    assert cache.gather()[3].tolist() == [0] * 4
    empty = cache_of(0)
    assert empty.step(*drawn(0, 3))[0].shape == (0, 3, HEADS, DIM) and empty.kept == 0
    assert cache.step(*drawn(4, 0))[1].shape == (4, 0, HEADS)


@backend_params("sink_attention_step", "native", "reference")
@pytest.mark.parametrize("kv_dtype", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("key_rope", ["pre", "post"])
def test_stale_and_unused_places_do_not_count(kv_dtype: torch.dtype | None, key_rope: str, backend: str) -> None:
    """NaN wherever no token is: in the ring before the first round, behind a rollback, in what was forgotten."""
    dtype = torch.float32
    options: dict[str, Any] = {"kv_dtype": kv_dtype, "key_rope": key_rope, "dtype": dtype, "backend": backend}
    for width, back in ((1, 0), (6, 0), (30, 4), (90, 4)):
        clean = filled(1, width, **options)
        clean.rollback(back)
        dirty = copy.deepcopy(clean)
        held = set(dirty.gather()[2][0].tolist())
        for place in range(dirty.ring_k.shape[2]):
            if not any(t >= 3 and (t - 3) % dirty.ring_k.shape[2] == place for t in held):
                for name in ("k", "v"):
                    wrong = getattr(dirty, f"{name}_scale") if kv_dtype is not None else getattr(dirty, f"ring_{name}")
                    wrong[:, :, place] = torch.nan
        for slot in range(3):
            if slot not in held:
                dirty.sink_k[:, :, slot], dirty.sink_v[:, :, slot] = torch.nan, torch.nan
        for new in (1, 80):
            x = drawn(1, new, dtype)
            one, other = copy.deepcopy(clean), copy.deepcopy(dirty)
            for a, b in zip(one.step(*x), other.step(*x), strict=True):
                assert torch.equal(a, b)
        one, other = copy.deepcopy(clean), copy.deepcopy(dirty)
        for cache in (one, other):
            cache.evict(1, 5)
        assert all(torch.equal(a, b) for a, b in zip(one.gather(), other.gather(), strict=True))


# --- numbers ----------------------------------------


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "tolerance"),
    [
        (torch.float32, None, 2e-6),
        (torch.bfloat16, None, 1.5e-2),
        (torch.float16, None, 2e-3),
        (torch.float32, torch.int8, 3e-2),
        (torch.bfloat16, torch.int8, 3e-2),
        (torch.float32, torch.float8_e4m3fn, 8e-2),
    ],
)
@backend_params("sink_attention_step", "native", "reference")
@pytest.mark.parametrize("few", [0, 10**9], ids=["intervals", "operator"])
def test_errors(
    dtype: torch.dtype, kv_dtype: torch.dtype | None, tolerance: float, few: int, backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of every dtype against float64 on the same rounded tokens; a sink logit that is lost or doubled would be larger."""
    monkeypatch.setattr(module, "FEW_ROWS", few)
    logits = torch.randn(HEADS)
    cache = cache_of(dtype=dtype, kv_dtype=kv_dtype, sink_logits=logits, backend=backend, window=40)
    exact = cache_of(sink_logits=logits, window=40)
    for width in (50, 30, 1, 7):
        x = drawn(2, width, torch.float32)
        rounded = [t.to(dtype) for t in x]
        (out, lse), (wanted, wanted_lse) = cache.step(*rounded), exact.step(*(t.double() for t in rounded))
        assert (out.double() - wanted).abs().max() < tolerance
        assert (lse.double() - wanted_lse).abs().max() < tolerance


@pytest.mark.parametrize("few", [0, 10**9], ids=["intervals", "operator"])
@pytest.mark.parametrize("key_rope", ["pre", "post"])
@pytest.mark.parametrize("positions", ["cache", "absolute"])
@pytest.mark.parametrize("start", [4_000_000, 2**31 + 5, 2**40 + 3])
def test_far_out(start: int, positions: str, key_rope: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that has been going for long: what is in the window is at the same distance as at the beginning."""
    monkeypatch.setattr(module, "FEW_ROWS", few)
    options: dict[str, Any] = {"key_rope": key_rope, "positions": positions, "slack": 57}  # a ring of 64 places
    near, far = cache_of(**options), cache_of(**options)
    sinks = 0 if positions == "absolute" else 3  # whose distance grows there
    for cache, n in ((near, 64 * 5), (far, start // 64 * 64)):
        cache.seen.fill_(n + 3)
        cache.written.fill_(n + 3)
        cache.first.fill_(n + 3)
    if positions == "cache":
        for x, y in ((near.sink_k, far.sink_k), (near.sink_v, far.sink_v)):
            y.copy_(x.normal_())
    else:
        near, far = (SinkKVCache(2, KV_HEADS, DIM, sink_tokens=sinks, window=7, slack=57, rope=ROPE, dtype=torch.float64,
                                 key_rope=key_rope, positions=positions) for _ in range(2))  # fmt: skip
        far.seen.fill_(start), far.written.fill_(start), far.first.fill_(start)
    for width in (1, 5, 80, 1, 3):
        x = drawn(2, width)
        for a, b in zip(near.step(*x), far.step(*x), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    near.evict(int(near.seen[0]) - 4, int(near.seen[0]) - 2)
    far.evict(int(far.seen[0]) - 4, int(far.seen[0]) - 2)
    x = drawn(2, 2)
    torch.testing.assert_close(near.step(*x), far.step(*x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
def test_moved_keys_are_turned_once(kv_dtype: torch.dtype | None) -> None:
    """Rotated keys, when tokens before them are forgotten, against a cache that rotates where it reads."""
    options: dict[str, Any] = {"dtype": torch.float32, "kv_dtype": kv_dtype, "backend": "reference"}
    pre, post = cache_of(**options), cache_of(key_rope="post", **options)
    _, k, v = drawn(2, 40, torch.float32)
    for cache in (pre, post):
        cache.append(k, v)
        cache.evict(torch.tensor([36, 0]), torch.tensor([38, 2]))
    x = drawn(2, 2, torch.float32)
    error = (pre.step(*x)[0] - post.step(*x)[0]).abs().max()
    assert error < (1e-5 if kv_dtype is None else 4e-2)


def test_int8_takes_a_quarter() -> None:
    sizes: dict[str, Any] = {"sink_tokens": 4, "window": 1020, "dtype": torch.float32}
    full, small = SinkKVCache(1, 8, 128, **sizes), SinkKVCache(1, 8, 128, kv_dtype=torch.int8, **sizes)
    assert full.nbytes >= 8 * 1024 * 256 * 4 and small.nbytes <= 0.30 * full.nbytes


@pytest.mark.slow
@pytest.mark.backend("sink_attention_step", "native")
@pytest.mark.parametrize("key_rope", ["pre", "post"])
def test_a_hundred_thousand_tokens(key_rope: str) -> None:
    """Memory does not grow, nor does the error, at one token a step."""
    cache = cache_of(1, window=28, slack=4, key_rope=key_rope, dtype=torch.float32, backend="native")
    (stream,), bytes_before = streams_of(cache), cache.nbytes
    k, v = (torch.randn(1, 100_000, KV_HEADS, DIM) for _ in range(2))
    queries = torch.randn(100, 1, 1, HEADS, DIM)
    places = {name: x.data_ptr() for name, x in cache.tensors().items()}
    errors = []
    for step in range(100_000):
        q = queries[step % 100]
        out, _ = cache.step(q, k[:, step : step + 1], v[:, step : step + 1])
        if step in (99, 999, 9999, 99_999):
            stream.tokens.clear()
            shown = [*range(3), *range(step - 27, step + 1)]
            wanted, _ = stream.step(q[0].expand(31, -1, -1).double(), k[0, shown].double(), v[0, shown].double())
            errors.append(float((out[0, 0].double() - wanted[-1]).abs().max()))
    assert max(errors) < 5e-6, errors
    assert cache.nbytes == bytes_before and cache.seen.tolist() == [100_000]
    assert places == {name: x.data_ptr() for name, x in cache.tensors().items()}


# --- compiled ----------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize(
    "backend", ["reference", pytest.param("native", marks=pytest.mark.backend("sink_attention_step", "native"))]
)
def test_compiled_steps(backend: str) -> None:
    """Three hundred steps, a rollback among them, in one graph that is compiled once; the cache stays where it is."""
    from torch._dynamo.testing import CompileCounter  # which imports much

    cache = filled(2, 6, sink_logits=torch.randn(HEADS), dtype=torch.float32, backend=backend)
    eager = copy.deepcopy(cache)
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        out, _ = cache.step(q, k, v)
        cache.rollback(back)
        return out

    places = {name: x.data_ptr() for name, x in cache.tensors().items()}
    for i in range(300):
        q, k, v = drawn(2, 2, torch.float32)
        back = torch.tensor([i % 2, 1 - i % 3 // 2])
        wanted = eager.step(q, k, v)[0]
        eager.rollback(back)
        assert torch.equal(step(q, k, v, back), wanted)
    assert counter.frame_count == 1
    assert same(cache, eager) and places == {name: x.data_ptr() for name, x in cache.tensors().items()}


@pytest.mark.heavy
def test_compiled_prompts() -> None:
    cache = filled(2, 30)
    eager = copy.deepcopy(cache)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def prompt(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
        out, _ = cache.prefill(q, k, v, pad)
        cache.evict(30, 33)
        return out

    for pad in (torch.tensor([0, 30]), torch.tensor([40, 2])):
        x = drawn(2, 40)
        wanted = eager.prefill(*x, pad)[0]
        eager.evict(30, 33)
        torch.testing.assert_close(prompt(*x, pad), wanted, **CLOSE)
    assert same(cache, eager)


# --- bad input ----------------------------------------


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"batch": -1}, "batch: expected at least 0, got -1"),
        (ValueError, {"num_kv_heads": 0}, "num_kv_heads: expected at least 1"),
        (ValueError, {"head_dim": 257}, "head_dim: expected at most 256"),
        (ValueError, {"v_head_dim": 0}, "v_head_dim: expected at least 1"),
        (ValueError, {"sink_tokens": -1}, "sink_tokens: expected at least 0"),
        (ValueError, {"window": -1}, "window: expected at least 0"),
        (TypeError, {"window": None}, "window: expected an int, got NoneType"),
        (ValueError, {"slack": -1}, "slack: expected at least 0"),
        (ValueError, {"sink_tokens": 0, "window": 0}, "window: expected at least 1 without sinks"),
        *(
            (ValueError, {name: 2**62}, f"{name}: expected sizes of a tensor below 2.60 elements, got {2**62}")
            for name in ("batch", "num_kv_heads", "sink_tokens", "window", "slack")
        ),
        (ValueError, {"device": "nope"}, "device: expected a torch.device or the name of one, got 'nope'"),
        (TypeError, {"dtype": torch.int8}, "dtype: expected float32"),
        (TypeError, {"kv_dtype": torch.bfloat16}, "kv_dtype: expected torch.float32 as dtype, int8 or float8_e4m3fn"),
        (TypeError, {"kv_dtype": torch.uint8}, "kv_dtype: expected"),
        (ValueError, {"key_rope": "before"}, "key_rope: expected one of 'pre', 'post'"),
        (ValueError, {"positions": "relative"}, "positions: expected one of 'cache', 'absolute'"),
        (TypeError, {"rope": 10000.0}, "rope: expected a subquad.RopeSpec or None, got float"),
        (ValueError, {"head_dim": 4, "rope": ROPE}, "rope: expected at most 4 rotated elements"),
        (
            ValueError,
            {"sink_logits": torch.zeros(3)},
            r"sink_logits: expected shape \[Hq\] with Hq a multiple of the 2",
        ),
        (TypeError, {"sink_logits": [0.0] * 4}, "sink_logits: expected a torch.Tensor"),
        (ValueError, {"backend": "fast"}, "backend: expected one of"),
    ],
)
def test_bad_options(error: type[Exception], options: dict[str, Any], message: str) -> None:
    sizes: dict[str, Any] = {"batch": 2, "num_kv_heads": 2, "head_dim": 8, "dtype": torch.float32}
    with pytest.raises(error, match="^" + message):
        SinkKVCache(**(sizes | options))


def test_bad_calls_change_nothing() -> None:
    cache = filled(2, 90)
    cache.rollback(2)
    before = copy.deepcopy(cache)
    q, k, v = drawn(2, 3)
    wide = drawn(2, 60)
    rows = torch.tensor
    calls: list[tuple[type[Exception], str, Any]] = [
        (ValueError, "q: expected a multiple of the 2 heads", lambda: cache.step(q[:, :, :3], k, v)),
        (TypeError, "q: expected torch.float64", lambda: cache.step(q.float(), k, v)),
        (TypeError, "sink_k: expected torch.float32 as k has", lambda: cache.step(*(x.float() for x in wide))),
        (ValueError, "sink_k: expected shape|k: expected", lambda: cache.step(q[..., :4], k[..., :4], v)),
        (ValueError, r"m: expected numbers in 0\.\.3", lambda: cache.step(q, k, v, rows([4, 0]))),
        (ValueError, "q: expected a multiple of the 2 heads", lambda: cache.step(wide[0][:, :, :3], *wide[1:])),
        (ValueError, "q: expected shape", lambda: cache.step(wide[0][:, 1:], *wide[1:])),
        (ValueError, "v: expected shape", lambda: cache.step(*wide[:2], wide[2][:, :, :1])),
        (ValueError, "v: expected shape", lambda: cache.step(*wide[:2], wide[2][:, 1:])),
        (ValueError, "sink_k: expected shape", lambda: cache.step(*(x[:1] for x in wide))),
        (ValueError, r"q: expected shape \[2, 3, H, D\]", lambda: cache.prefill(q[:, 1:], k, v, rows([1, 0]))),
        (ValueError, r"k: expected shape \[2, T, H, D\]", lambda: cache.prefill(q, k[0], v, rows([1, 0]))),
        (ValueError, r"m: expected numbers in 0\.\.60", lambda: cache.step(*wide, rows([61, 0]))),
        (ValueError, "m: expected shape", lambda: cache.step(*wide, rows([3]))),
        (TypeError, "m: expected", lambda: cache.step(*wide, rows([0.5, 1.0]))),
        (TypeError, "scale: expected a float", lambda: cache.step(*wide, scale="1")),
        (ValueError, "commit: expected True for more than 58 tokens", lambda: cache.step(*wide, commit=False)),
        (TypeError, r"q: expected a torch\.Tensor, got None", lambda: cache.step(None, k, v)),  # type: ignore[arg-type]
        (TypeError, r"q: expected a torch\.Tensor, got None", lambda: cache.prefill(None, k, v)),  # type: ignore[arg-type]
        (TypeError, r"pad: expected a torch\.Tensor, got int", lambda: cache.prefill(q, k, v, 3)),  # type: ignore[arg-type]
        (TypeError, "state: expected a mapping of names, got NoneType", lambda: cache.load_state_dict(None)),  # type: ignore[arg-type]
        (ValueError, r"pad: expected numbers in 0\.\.3", lambda: cache.prefill(q, k, v, rows([4, 0]))),
        (ValueError, r"pad: expected shape \[2\]", lambda: cache.prefill(q, k, v, rows([1]))),
        (
            ValueError,
            "tokens: expected at most the 56 that are kept for a rollback, got 57",
            lambda: cache.rollback(57),
        ),
        (ValueError, r"tokens: expected at most the 56 .*\[57, 0\]", lambda: cache.rollback(rows([57, 0]))),
        (ValueError, r"tokens: expected at most the 56 .*\[-1, 0\]", lambda: cache.rollback(rows([-1, 0]))),
        (ValueError, "tokens: expected at least 0", lambda: cache.rollback(-1)),
        (TypeError, "tokens: expected an int", lambda: cache.rollback(1.5)),  # type: ignore[arg-type]
        (ValueError, "tokens: expected at least 0", lambda: cache.keep(-1)),
        (ValueError, "m: expected 0 to 7 tokens, as the window holds", lambda: cache.evict_for_space(8)),
        (ValueError, "m: expected 0 to 7 tokens", lambda: cache.evict_for_space(rows([0, -1]))),
        (ValueError, "lo, hi: expected 0 <= lo <= hi", lambda: cache.evict(5, 4)),
        (ValueError, "lo, hi: expected 0 <= lo <= hi", lambda: cache.evict(rows([-1, 0]), 3)),
        (TypeError, "hi: expected an int or a tensor", lambda: cache.evict(0, None)),  # type: ignore[arg-type]
        (TypeError, "mask: expected a bool tensor", lambda: cache.reset(rows([1, 0]))),
        (ValueError, r"mask: expected shape \[2\]", lambda: cache.reset(rows([True]))),
        (ValueError, "rows: expected the 2 sequences", lambda: cache.reorder(rows([0]))),
        (ValueError, r"rows: expected numbers in 0\.\.1, got \[0, 2\]", lambda: cache.reorder(rows([0, 2]))),
        (ValueError, r"rows: expected numbers in 0\.\.1", lambda: cache.select(rows([-1, 0]))),
        (ValueError, "rows: expected 1 dimensions", lambda: cache.select(rows(1))),
        (TypeError, "rows: expected int32 or int64", lambda: cache.select(rows([True, False]))),
        (TypeError, r"rows: expected a torch\.Tensor", lambda: cache.select([0, 1])),  # type: ignore[arg-type]
        (ValueError, "q: expected device cpu", lambda: cache.prefill(q.to("meta"), k, v, rows([1, 0]))),
        (ValueError, "k: expected device cpu", lambda: cache.prefill(q, k.to("meta"), v, rows([1, 0]))),
        (ValueError, "state: expected names of a SinkKVCache, got 'keys'", lambda: cache.put("keys", q)),
    ]
    for error, message, call in calls:
        with pytest.raises(error, match=f"^({message})"):
            call()
        assert same(cache, before), message


def test_gradients_are_refused() -> None:
    cache = filled(2, 9)
    before = copy.deepcopy(cache)
    with torch.enable_grad():
        for width in (1, 60):
            for i, name in enumerate("qkv"):
                x = drawn(2, width)
                x[i].requires_grad_()
                with pytest.raises(ValueError, match=f"^{name}: expected a tensor without requires_grad"):
                    cache.step(*x)
    assert same(cache, before)


def test_rotated_keys_of_others_do_not_move() -> None:
    cache = filled(2, 30, rope=None, key_rope="post")
    with pytest.raises(ValueError, match=r"^key_rope: expected 'pre', or a rope"):
        cache.evict(5, 7)
    assert cache.seen.tolist() == [30, 26]
