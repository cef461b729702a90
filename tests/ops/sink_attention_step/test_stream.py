"""Streams that wrap around their ring several times, step by step, against attention over the whole sequence in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import subquad
from subquad import RopeSpec
from subquad.testing import Sampler, backend_params
from subquad.testing.compare import assert_close, assert_same_bits
from subquad.testing.specs.sink_attention_step import QUANTISED, rotation

STEM = "sink_attention_step"
BOTH = ("native", "reference")
S, W, R = 3, 7, 10


class Stream:
    """A cache as its owner holds it: tensors of constant size, at first of NaN, for nobody may read what nobody wrote."""

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        d: int,
        dv: int,
        *,
        sinks: int = S,
        window: int = W,
        ring: int = R,
        kind: str = "",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        held = QUANTISED.get(kind, dtype)

        def places(n: int, width: int, dtype: torch.dtype) -> torch.Tensor:
            poison = 77 if dtype is torch.int8 else float("nan")
            return torch.full((batch, kv_heads, n, width), poison, dtype=dtype)

        self.states = {
            "sink_k": places(sinks, d, dtype),
            "sink_v": places(sinks, dv, dtype),
            "ring_k": places(ring, d, held),
            "ring_v": places(ring, dv, held),
            "seen": torch.zeros(batch, dtype=torch.int64),
            "written": torch.zeros(batch, dtype=torch.int64),
            "first": torch.zeros(batch, dtype=torch.int64),
        }
        if kind:
            scales = (batch, kv_heads, ring)
            self.states |= {name: torch.full(scales, float("nan")) for name in ("k_scale", "v_scale")}
        self.options = {"window": window, **options}

    def step(self, *qkv: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return subquad.sink_attention_step(*qkv, **self.states, **self.options, **options)  # type: ignore[misc]

    def run(self, qkv: list[torch.Tensor], chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All tokens, `chunk` at a time."""
        parts = [self.step(*(x[:, t : t + chunk] for x in qkv)) for t in range(0, qkv[0].shape[1], chunk)]
        return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 1)


def tokens(batch: int, n: int, heads: tuple[int, int], d: int, dv: int, seed: int = 0) -> list[torch.Tensor]:
    sampler = Sampler(seed=seed)
    shapes = ((heads[0], d), (heads[1], d), (heads[1], dv))
    return [sampler.normal(batch, n, h, width) for h, width in shapes]


def whole(
    qkv: list[torch.Tensor],
    rope: RopeSpec | None = None,
    sinks: int = S,
    window: int = W,
    absolute: bool = False,
    sink_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the sequence in float64, with positions as a cache has them."""
    q, k, v = (x.double() for x in qkv)
    if rope is not None:
        position = torch.arange(q.shape[1])[:, None]
        q, k = rope.rotate(q, position), rope.rotate(k, position)
    return subquad.sink_attention(
        q, k, v, sink_tokens=sinks, window=window, q_shift=None if absolute else rope, return_lse=True, backend="reference",
        sink_logits=None if sink_logits is None else sink_logits.double(),
    )  # type: ignore[return-value]  # fmt: skip


def assert_stream(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    for what, a, b in zip(("out", "lse"), found, expected, strict=True):
        assert_close(a, b, 5e-6, what)


@backend_params(STEM, *BOTH)
@pytest.mark.parametrize("key_rope", ["pre", "post"])
@pytest.mark.parametrize("chunk", [1, 2, 6, 7, R, R + 1, 3 * R + 5])
def test_chunks_of_any_size(backend: str, chunk: int, key_rope: str) -> None:
    """Before the first wrap, across it, several times around, and several times in one call."""
    qkv, rope = tokens(2, 6 * R + 3, (4, 2), 8, 12), rotation(8)
    stream = Stream(2, 2, 8, 12, rope=rope, key_rope=key_rope, backend=backend)
    assert_stream(stream.run(qkv, chunk), whole(qkv, rope))
    assert stream.states["seen"].tolist() == stream.states["written"].tolist() == [6 * R + 3] * 2


@backend_params(STEM, *BOTH)
@pytest.mark.parametrize(
    "rope",
    [rotation(8), rotation(32), rotation(6, interleaved=True), rotation(40, interleaved=True), None],
    ids=["part", "vectors", "pairs", "all-pairs", "none"],
)
@pytest.mark.parametrize("positions", ["cache", "absolute"])
@pytest.mark.parametrize("key_rope", ["pre", "post"])
def test_every_rotation(backend: str, rope: RopeSpec | None, positions: str, key_rope: str) -> None:
    qkv = tokens(1, 45, (3, 1), 40, 16)
    stream = Stream(1, 1, 40, 16, rope=rope, key_rope=key_rope, positions=positions, backend=backend)
    assert_stream(stream.run(qkv, 4), whole(qkv, rope, absolute=positions == "absolute"))


@backend_params(STEM, *BOTH)
@pytest.mark.parametrize("sinks, window", [(8, 5), (0, 6), (4, 0), (0, 1), (1, 9), (70, 12)])
def test_few_tokens_no_sinks_no_window(backend: str, sinks: int, window: int) -> None:
    """Fewer tokens than sinks; rows that see sinks and not themselves; sinks of several tiles."""
    qkv, rope = tokens(2, 31 + sinks, (2, 2), 16, 8), rotation(16)
    for chunk in (1, 3):
        stream = Stream(2, 2, 16, 8, sinks=sinks, window=window, ring=max(1, window), rope=rope, backend=backend)
        assert_stream(stream.run(qkv, chunk), whole(qkv, rope, sinks, window))


@backend_params(STEM, *BOTH)
def test_nothing_to_see(backend: str) -> None:
    """Without sinks and window a row sees nothing: 0, and the sink logit alone or -inf."""
    qkv = tokens(1, 4, (2, 1), 8, 8)
    for logits in (None, torch.tensor([-3.0, 2.0])):
        stream = Stream(1, 1, 8, 8, sinks=0, window=0, ring=1, sink_logits=logits, backend=backend)
        out, lse = stream.step(*qkv)
        assert not out.count_nonzero()
        expected = torch.full((2,), -torch.inf) if logits is None else logits
        torch.testing.assert_close(lse, expected.expand(1, 4, 2))


@backend_params(STEM, *BOTH)
@pytest.mark.parametrize("group, kv_heads", [(1, 2), (3, 1), (5, 2), (6, 1), (7, 1), (12, 1), (14, 2), (71, 1)])
def test_shared_heads(backend: str, group: int, kv_heads: int) -> None:
    qkv, rope = tokens(1, 26, (group * kv_heads, kv_heads), 16, 24), rotation(16)
    for chunk in (1, 4):
        stream = Stream(1, kv_heads, 16, 24, rope=rope, backend=backend)
        assert_stream(stream.run(qkv, chunk), whole(qkv, rope))


@backend_params(STEM, *BOTH)
@pytest.mark.parametrize("d, dv", [(40, 40), (72, 72), (80, 80), (96, 96), (112, 112), (192, 128), (256, 256), (2, 1)])
def test_head_dims(backend: str, d: int, dv: int) -> None:
    qkv, rope = tokens(1, 90, (4, 2), d, dv), rotation(max(2, d // 4 * 2))
    stream = Stream(1, 2, d, dv, window=70, ring=75, rope=rope, backend=backend)
    assert_stream(stream.run(qkv, 15), whole(qkv, rope, window=70))


@backend_params(STEM, *BOTH)
@pytest.mark.parametrize("logits", [[0.0, 0.0], [10.0, -10.0], [1e4, -1e4], [float("-inf"), 3.0]])
@pytest.mark.parametrize("window", [7, 1100])
def test_sink_logits_count_once(backend: str, logits: list[float], window: int) -> None:
    """Over one range of keys and over several."""
    qkv, rope, sink = tokens(1, 1150, (2, 1), 8, 8), rotation(8), torch.tensor(logits)
    stream = Stream(1, 1, 8, 8, window=window, ring=window + 2, rope=rope, sink_logits=sink, backend=backend)
    stream.run([x[:, :1148] for x in qkv], 1148)
    found = stream.run([x[:, 1148:] for x in qkv], 1)
    expected = tuple(x[:, 1148:] for x in whole(qkv, rope, window=window, sink_logits=sink))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 5e-6)


@backend_params(STEM, *BOTH)
def test_largest_logits_give_no_nan(backend: str) -> None:
    most = torch.finfo(torch.float32).max
    qkv = tokens(1, 6, (2, 1), 8, 8)
    out, lse = Stream(1, 1, 8, 8, sink_logits=torch.tensor([most, -most]), backend=backend).step(*qkv)
    assert bool(out.isfinite().all()) and bool(lse.isfinite().all())
    assert not out[:, :, 0].count_nonzero() and bool(out[:, :, 1].count_nonzero())


@backend_params(STEM, *BOTH)
def test_ragged_rows_are_streams_of_their_own(backend: str) -> None:
    """Rows get different numbers of tokens in a call, some none; each has the bits that it has alone, in kernels."""

    def assert_same(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
        assert_same_bits(a, b, what) if backend != "reference" else assert_close(a, b, 1e-6, what)

    qkv, rope, counts = (
        tokens(3, 60, (4, 2), 8, 8),
        rotation(8),
        ([3, 0, 5], [5, 5, 0], [0, 1, 4], [5, 2, 3], [1, 5, 5]),
    )
    together = Stream(3, 2, 8, 8, rope=rope, backend=backend)
    alone = [Stream(1, 2, 8, 8, rope=rope, backend=backend) for _ in range(3)]
    done = [0, 0, 0]
    for m in counts * 3:
        chunk = [torch.stack([x[b, done[b] : done[b] + 5] for b in range(3)]) for x in qkv]
        for x in chunk:
            for b, n in enumerate(m):
                x[b, n:] = float("nan")  # columns that are no tokens
        out, lse = together.step(*chunk, m=torch.tensor(m))
        for b, n in enumerate(m):
            single = alone[b].step(*(x[b : b + 1, :n] for x in chunk))
            assert_same(out[b, :n], single[0][0], f"row {b}")
            assert_same(lse[b, :n], single[1][0], f"row {b}")
            assert not out[b, n:].count_nonzero() and bool((lse[b, n:] == -torch.inf).all())
            done[b] += n
    for b, stream in enumerate(alone):
        for name, state in stream.states.items():
            assert_same(together.states[name][b], state[0], f"{name} of row {b}")


@backend_params(STEM, *BOTH)
@pytest.mark.parametrize("kind", ["", "int8", "fp8"])
def test_only_visible_places_are_read(backend: str, kind: str) -> None:
    """NaN in every place that no new token sees, in the middle of a stream with a ring wider than its window."""
    qkv, rope = tokens(1, 90, (4, 2), 16, 16), rotation(16)
    clean, poisoned = (Stream(1, 2, 16, 16, window=7, ring=13, kind=kind, rope=rope, backend=backend) for _ in "ab")
    for t in range(0, 90, 3):
        chunk = [x[:, t : t + 3] for x in qkv]
        places = torch.arange(13)
        last = t - 1 - S
        token = torch.where(places > last, -1, S + last - (last - places) % 13)
        hidden = token < max(S, t + 1 - 7)
        for name, state in poisoned.states.items():
            state.copy_(clean.states[name])
            if name in ("k_scale", "v_scale") or (name.startswith("ring") and not kind):
                state[:, :, hidden] = float("nan")
            elif name.startswith("sink"):
                state[:, :, t:] = float("nan")
        for a, b in zip(poisoned.step(*chunk), clean.step(*chunk), strict=True):
            assert_same_bits(a, b, f"token {t}")


@backend_params(STEM, *BOTH)
@pytest.mark.parametrize("kind, limit", [("int8", 3e-2), ("fp8", 8e-2)])
@pytest.mark.parametrize("key_rope", ["pre", "post"])
def test_quantised_rings(backend: str, kind: str, limit: float, key_rope: str) -> None:
    """Near the exact result; and the very result of a cache of floats that holds the numbers times their scales."""
    qkv, rope = tokens(2, 70, (4, 2), 32, 32), rotation(32)
    stream = Stream(2, 2, 32, 32, window=40, ring=44, kind=kind, rope=rope, key_rope=key_rope, backend=backend)
    out, _ = stream.run(qkv, 1)
    exact = whole(qkv, rope, window=40)
    assert_close(out[:, 50:], exact[0][:, 50:], limit)
    plain = Stream(
        2, 2, 32, 32, window=40, ring=44, rope=rope, key_rope=key_rope, backend="reference", dtype=torch.float64
    )
    for name, state in plain.states.items():
        scale = stream.states.get(name.replace("ring_", "") + "_scale") if name.startswith("ring") else None
        held = stream.states[name]
        state.copy_(held if scale is None else held.double() * scale.double()[..., None])
    more = tokens(2, 3, (4, 2), 32, 32, seed=1)
    expected = plain.step(*(x.double() for x in more))
    for a, b in zip(stream.step(*more), expected, strict=True):
        assert_close(a, b, 2e-6)


@backend_params(STEM, *BOTH)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_rows_of_zeros_nan_and_tiny_numbers(backend: str, kind: str) -> None:
    """A row of zeros has the scale 1, and a number that is none makes a row NaN through its scale."""
    stream = Stream(1, 1, 8, 8, sinks=0, kind=kind, backend=backend)
    k = torch.ones(1, 4, 1, 8)
    k[0, 0] = 0.0
    k[0, 1, 0, 3] = float("nan")
    k[0, 2, 0, 5] = float("-inf")
    k[0, 3] *= 1e-40
    stream.step(None, k, torch.ones_like(k))
    row = stream.states["ring_k"][0, 0].float() * stream.states["k_scale"][0, 0, :, None]
    assert stream.states["k_scale"][0, 0, 0] == 1.0 and not row[0].count_nonzero()
    assert bool(row[1].isnan().all()) and bool(row[2].isnan().all()) and bool(row[3].isfinite().all())


@backend_params(STEM, *BOTH)
def test_large_fp16_numbers(backend: str) -> None:
    """Scores of millions, values at the end of the range."""
    sampler = Sampler(torch.float16, seed=3)
    q, k, v = (sampler.normal(1, 40, h, 64) for h in (4, 2, 2))
    q, k = (x / x.float().norm(dim=-1, keepdim=True).to(x.dtype) * 1600 for x in (q, k))
    v = v.sign() * 6e4
    stream = Stream(
        1, 2, 64, 64, window=20, ring=24, rope=rotation(64), dtype=torch.float16, scale=1.0, backend=backend
    )
    out, lse = stream.run([q, k, v], 1)
    assert bool(out.isfinite().all()) and bool(lse.isfinite().all()) and float(lse.max()) > 1e6


@backend_params(STEM, *BOTH)
@pytest.mark.parametrize("start", [4_000_000, 2**31 + 5, 2**40 + 12])
def test_far_positions_are_distances(backend: str, start: int) -> None:
    """A full cache with its tokens moved by whole rings gives the same: the phases are exact at any position."""
    qkv, rope = tokens(1, 40, (4, 2), 16, 16), rotation(16)
    near, far = (Stream(1, 2, 16, 16, rope=rope, backend=backend) for _ in "ab")
    near.run([x[:, :30] for x in qkv], 30)
    for name, state in far.states.items():
        state.copy_(near.states[name])
    far.states["seen"] += start // R * R
    for t in range(30, 40):
        chunk = [x[:, t : t + 1] for x in qkv]
        for a, b in zip(far.step(*chunk), near.step(*chunk), strict=True):
            assert_close(a, b, 2e-6)


@backend_params(STEM, *BOTH)
@pytest.mark.parametrize("key_rope", ["pre", "post"])
def test_writing_alone(backend: str, key_rope: str) -> None:
    """Without queries the cache becomes what it becomes with them, to the bit, also where tokens overwrite each other."""
    qkv, rope = tokens(2, 63, (4, 2), 8, 8), rotation(8)
    silent, loud = (Stream(2, 2, 8, 8, rope=rope, key_rope=key_rope, backend=backend) for _ in "ab")
    for begin, end in ((0, 2), (2, 9), (9, 40), (40, 63)):
        loud.step(*(x[:, begin:end] for x in qkv))
        out, lse = silent.step(None, *(x[:, begin:end] for x in qkv[1:]))
        assert out.shape == (2, end - begin, 0, 8) and lse.shape == (2, end - begin, 0)
        for name, state in loud.states.items():
            assert_same_bits(silent.states[name], state, name)


@backend_params(STEM, *BOTH)
def test_provisional_tokens_may_come_again(backend: str) -> None:
    """Without `commit` the tokens stand in the cache, but do not count: what comes next takes their places."""
    qkv, rope = tokens(1, 60, (4, 2), 8, 8), rotation(8)
    stream, other = (Stream(1, 2, 8, 8, ring=W + 4, rope=rope, backend=backend) for _ in "ab")
    for t in range(0, 60, 4):
        chunk = [x[:, t : t + 4] for x in qkv]
        stream.step(*(x + 1 for x in chunk), commit=False)
        assert stream.states["seen"].item() == t and stream.states["written"].item() == t + 4
        for a, b in zip(stream.step(*chunk), other.step(*chunk), strict=True):
            assert_same_bits(a, b, f"token {t}")


@backend_params(STEM, *BOTH)
def test_blocks_see_each_other(backend: str) -> None:
    """`together`: every new token has the window of the last one, and its own position."""
    qkv, rope = tokens(1, 48, (4, 2), 8, 8), rotation(8)
    stream = Stream(1, 2, 8, 8, ring=16, window=9, rope=rope, together=True, positions="absolute", backend=backend)
    found = stream.run(qkv, 4)
    q, k, v = (x.double() for x in qkv)
    position = torch.arange(48)[:, None]
    expected = subquad.sink_attention(
        rope.rotate(q, position), rope.rotate(k, position), v, sink_tokens=S, window=9, block=4, return_lse=True,
        backend="reference",
    )  # fmt: skip
    assert_stream(found, expected)  # type: ignore[arg-type]


@backend_params(STEM, *BOTH)
@pytest.mark.parametrize("chunk", [1, 9])
def test_threads_and_batch_do_not_show(backend: str, chunk: int) -> None:
    """The same bits for any number of threads, in any row of a batch."""
    rope, kinds = rotation(32), ("", "int8")
    qkv = [x.expand(5, -1, -1, -1) for x in tokens(1, chunk, (8, 4), 64, 64)]
    for kind in kinds:
        stream = Stream(5, 4, 64, 64, sinks=4, window=1500, ring=1600, kind=kind, rope=rope, backend=backend)
        past = [x.expand(5, -1, -1, -1) for x in tokens(1, 2000, (8, 4), 64, 64, seed=1)]
        stream.step(None, *past[1:])
        before, results = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                results.append(stream.step(*qkv, commit=False))
        finally:
            torch.set_num_threads(before)
        for result in results:
            for a, b in zip(result, results[0], strict=True):
                assert_same_bits(a, b)
                for row in a:
                    assert_same_bits(row, b[0])


@backend_params(STEM, *BOTH)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantising_rounds_halves_to_even(backend: str, kind: str) -> None:
    """All numbers of the type and what lies in the middle between two, in rows whose scale is 1."""
    dtype, most = QUANTISED[kind], 127.0 if kind == "int8" else 448.0
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    every = every[every.isfinite() & (every.abs() <= most)].sort().values
    x = torch.cat([every, (every[1:] + every[:-1]) / 2])
    rows = torch.cat([x, x.new_zeros(-len(x) % 15)]).view(-1, 15)
    k = torch.cat([rows, torch.full((len(rows), 1), most)], 1)[None, :, None]
    stream = Stream(1, 1, 16, 16, sinks=0, ring=k.shape[1], kind=kind, backend=backend)
    stream.step(None, k, k)
    expected = k[0, :, 0].round() if kind == "int8" else k[0, :, 0]
    for side in ("k", "v"):
        assert_same_bits(stream.states[f"{side}_scale"], torch.ones(1, 1, k.shape[1]))
        assert torch.equal(stream.states[f"ring_{side}"][0, 0].float(), expected.to(dtype).float())


@backend_params(STEM, *BOTH)
def test_rolled_back(backend: str) -> None:
    """The counter goes back and the tokens come again; what was written farthest stays known."""
    qkv, rope = tokens(1, 40, (4, 2), 8, 8), rotation(8)
    stream = Stream(1, 2, 8, 8, ring=W + 5, rope=rope, backend=backend)
    stream.run([x[:, :30] for x in qkv], 5)
    stream.states["seen"] -= 5
    found = stream.run([x[:, 25:27] for x in qkv], 1)
    assert (stream.states["seen"].item(), stream.states["written"].item()) == (27, 30)
    assert_stream(found, tuple(x[:, 25:27] for x in whole(qkv, rope)))  # type: ignore[arg-type]
