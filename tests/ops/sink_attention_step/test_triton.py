"""What the Triton kernels of the step make special: blocks and splits of keys, tiles of rows, bytes that are float8, offsets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import subquad
from subquad.reference.sink_attention_step import quantised
from subquad.testing import Sampler, backend_params
from subquad.testing.compare import assert_close
from subquad.testing.specs.sink_attention_step import CHANGED, QUANTISED, draw, oracle

LIMIT = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.int8: 5e-3, torch.float8_e4m3fn: 3e-2, torch.int64: 0.0}


def both(backend: str, args: dict[str, Any], options: dict[str, Any], what: str) -> dict[str, Any]:
    """The call on both backends, compared with everything that it changes; the arguments after it."""
    after = {n: x.clone() if n in CHANGED and x is not None else x for n, x in args.items()}
    got = subquad.sink_attention_step(**after, **options, backend=backend)
    wide = ("q", "k", "v", "sink_k", "sink_v", *(("ring_k", "ring_v") if args["k_scale"] is None else ()))
    exact = {n: x.double() if n in wide and x is not None else x for n, x in args.items()}
    expected = oracle(**exact, **options)
    changed = [n for n in CHANGED if args[n] is not None]
    results, states = expected[0], expected[1:]
    assert isinstance(results, tuple)
    named = dict(zip(("out", "lse"), zip(got, results, strict=True), strict=True))
    named |= {n: (after[n], state) for n, state in zip(changed, states, strict=True)}
    for name, (actual, right) in named.items():
        assert_close(actual, right, LIMIT[actual.dtype], f"{what}: {name}")
    return after


@backend_params("sink_attention_step", "triton")
@pytest.mark.parametrize(
    ("ring", "options"),
    [
        pytest.param("", {}, marks=pytest.mark.quick, id="plain"),
        pytest.param("", {"key_rope": "post", "interleaved": True}, id="post"),
        pytest.param("int8", {}, id="int8"),
        pytest.param("fp8", {"positions": "absolute"}, id="fp8"),
    ],
)
def test_a_stream_from_nothing_over_wraps(ring: str, options: dict[str, Any], backend: str) -> None:
    """Calls of one token and of several, of rows that go on at their own pace; every state is compared after every call."""
    sizes: dict[str, Any] = dict(sinks=3, window=5, slack=2, ring=ring, rotary=6)
    args: dict[str, Any] = dict(draw(Sampler(), "stream", seen=(0, 0), **sizes, **options).args)
    for step, width in enumerate((1, 2, 1, 9, 1, 4, 1, 1, 3)):
        counts = (width, max(0, width - step % 3))
        sample = draw(Sampler(seed=step), "step", tokens=width, seen=(0, 0), m=counts, logits=1.0, **sizes, **options)
        args |= {n: sample.args[n] for n in ("q", "k", "v")}
        args = both(backend, args, dict(sample.kwargs), f"step {step}")


@backend_params("sink_attention_step", "triton")
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("ring", ["", "int8", "fp8"])
def test_splits(tokens: int, together: bool, ring: str, backend: str) -> None:
    """Rows with many keys and few, whose splits are empty but for one; the sink logit counts once."""
    sample = draw(
        Sampler(), "splits", (4, 1), 16, tokens=tokens, window=300, slack=20, seen=(1000, 2, 301, 0), rotary=16,
        logits=10.0, together=together, ring=ring,
    )  # fmt: skip
    both(backend, dict(sample.args), dict(sample.kwargs), "splits")


@backend_params("sink_attention_step", "triton")
def test_splits_follow_from_shapes(backend: str) -> None:
    """Nothing that a captured graph fixes depends on what the counters say."""
    from subquad.kernels import sink_attention_step as kernels

    assert kernels._splits(1, 100) == 1
    assert kernels._splits(1, 10**6) == kernels.MAX_SPLITS
    assert all(1 <= kernels._splits(tiles, 5000) * tiles <= max(tiles, kernels.MAX_SPLITS) for tiles in range(1, 200))


@backend_params("sink_attention_step", "triton")
def test_tiles_of_rows(backend: str) -> None:
    """A prompt longer than the ring whose tiles begin within the queries of a token, some behind the last token."""
    sample = draw(
        Sampler(), "tiles", (10, 2), 8, tokens=40, window=33, slack=0, seen=(50, 0), m=(40, 13), rotary=8, logits=-1.0
    )
    both(backend, dict(sample.args), dict(sample.kwargs), "tiles")


@backend_params("sink_attention_step", "triton")
@pytest.mark.parametrize("seen", [(4_000_000, 2**31 + 5), (2**40 + 3, 31)])
@pytest.mark.parametrize("key_rope", ["pre", "post"])
def test_far_positions(seen: tuple[int, ...], key_rope: str, backend: str) -> None:
    first = tuple(n - 4 for n in seen)
    for forgotten in (None, first):
        sample = draw(Sampler(), "far", tokens=2, seen=seen, first=forgotten, rotary=8, key_rope=key_rope, logits=-1.0)
        both(backend, dict(sample.args), dict(sample.kwargs), "far")


@backend_params("sink_attention_step", "triton")
@pytest.mark.parametrize("width", [1, 4])
def test_nan_where_nobody_looks(width: int, backend: str) -> None:
    """In places that hold no token, tokens behind the window and columns that are none: no result and no other state has it."""
    sample = draw(Sampler(), "nan", tokens=width, window=5, slack=40, seen=(20, 1), m=(1, width), rotary=8)
    clean = subquad.sink_attention_step(
        **dict[str, Any]({**sample.args, **copies(sample.args)}), **sample.kwargs, backend=backend
    )
    args: dict[str, Any] = {n: None if x is None else x.clone() for n, x in sample.args.items()}
    for b, n in enumerate((20, 1)):
        held = {(j - 2) % 45 for j in range(max(2, n + width - 5 - width), n)}
        free = [p for p in range(45) if p not in held]
        for name in ("ring_k", "ring_v"):
            args[name][b, :, free] = float("nan")
        for name in ("sink_k", "sink_v"):
            args[name][b, :, min(2, n) :] = float("inf")
    for name in ("q", "k", "v"):
        args[name][0, 1:] = float("nan")
    got = subquad.sink_attention_step(**args, **sample.kwargs, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(got, clean, strict=True))
    assert not args["sink_k"][0].isnan().any()


@backend_params("sink_attention_step", "triton")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value: float, backend: str) -> None:
    """Of a new token, within a tile of rows before and behind it: seen from that token on alone."""
    sample = draw(Sampler(), "value", tokens=4, seen=(20,), rotary=8)
    v = sample["v"].clone()
    v[0, 2] = value
    out = subquad.sink_attention_step(**dict[str, Any]({**sample.args, "v": v}), **sample.kwargs, backend=backend)[0]
    assert out[0, :2].isfinite().all()
    assert torch.equal(out[0, 2:].nan_to_num(-1.0, 1.0), torch.full_like(out[0, 2:], 1.0 if value == value else -1.0))


def copies(args: Any) -> dict[str, torch.Tensor]:
    return {n: args[n].clone() for n in CHANGED if args[n] is not None}


@backend_params("sink_attention_step", "triton")
@pytest.mark.parametrize("ring", ["int8", "fp8"])
def test_codes_are_torchs(ring: str, backend: str) -> None:
    """Every float8, ties, subnormals, rows of zeros, of NaN and of infinity: the bits of torch's own conversions."""
    rows = torch.zeros(1, 256, 1, 8)
    x = torch.arange(-128, 128, dtype=torch.int8).view(torch.float8_e4m3fn).float().nan_to_num(448.0)
    rows[0, :, 0, 0], rows[0, :, 0, 1] = 448.0, x  # the scale is 1 but where the last columns are larger
    rows[0, :, 0, 2] = (x + x.roll(-1)) / 2  # ties
    rows[0, :, 0, 3:] = torch.randn(256, 5, generator=torch.Generator().manual_seed(3)) * x[:, None] * 1.01
    rows[0, 9], rows[0, 10, 0, 3], rows[0, 11, 0, 4], rows[0, 12] = 0.0, float("nan"), float("-inf"), 1e-42
    sample = draw(Sampler(), "codes", (1, 1), tokens=256, sinks=0, window=200, slack=100, seen=(0,), ring=ring)
    args: dict[str, Any] = {**sample.args, "q": None, "k": rows, "v": rows.flip(1).contiguous()}
    subquad.sink_attention_step(**args, **sample.kwargs, backend=backend)
    for name in ("k", "v"):
        code, scale = quantised(args[name][0, :, 0], QUANTISED[ring])
        assert torch.equal(args[f"ring_{name}"][0, 0, :256].view(torch.int8), code.view(torch.int8))
        assert torch.equal(args[f"{name}_scale"][0, 0, :256].nan_to_num(-1.0), scale.nan_to_num(-1.0))


@backend_params("sink_attention_step", "triton")
def test_every_float8_is_read(backend: str) -> None:
    """As value of a single key: the result is it, NaN included."""
    places = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    sample = draw(Sampler(), "read", (1, 1), 8, 256, sinks=0, window=2, slack=0, seen=(1,), ring="fp8", logits=None)
    args: dict[str, Any] = {n: None if x is None else x.clone() for n, x in sample.args.items()}
    args["ring_v"][0, 0, 0] = places
    args["v_scale"].fill_(1.0)
    args["k_scale"].fill_(0.0)
    args["q"].zero_()
    args["v"].zero_()  # the new token, of the same weight
    out = subquad.sink_attention_step(**args, **sample.kwargs, backend=backend)[0]
    assert torch.equal((2.0 * out[0, 0, 0]).nan_to_num(-1.0), places.float().nan_to_num(-1.0))


@backend_params("sink_attention_step", "triton")
def test_offsets_beyond_32_bits(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring whose last head begins beyond element 2^31; only touched pages take memory."""
    from triton.runtime.interpreter import GridExecutor

    from subquad.kernels.sink_attention_step import sink_attention_step_

    torch.use_deterministic_algorithms(False)  # poisoning would touch it
    # The interpreter copies whole storages to the host and back; these are on the host, and too large to copy.
    monkeypatch.setattr(GridExecutor, "_init_args_hst", lambda self, args, kwargs: (args, kwargs))
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
    places, heads, d = 2**23 + 3, 3, 128
    x = Sampler(torch.bfloat16).normal(1, 2, heads, d)
    sinks = torch.zeros(1, heads, 0, d, dtype=torch.bfloat16)
    ring = torch.empty(1, heads, places, d, dtype=torch.int8)
    scale = torch.ones(1, heads, places)
    seen, written, first = (torch.full((1,), n, dtype=torch.int64) for n in (places - 1, 0, 0))
    for _ in range(2):  # the first call fills the last place and the first, the second reads them
        out, _ = sink_attention_step_(
            x, x, x, sinks, sinks, ring, ring, scale, scale, seen, written, first, None, None, None, 1, 0.1, 1.0, False,
            False, False, False, True,
        )  # fmt: skip
        assert torch.equal(out, x)  # a window of one
    assert seen.item() == places + 3
    code, _ = quantised(x[0].float(), torch.int8)
    for token in range(places - 1, places + 3):
        assert torch.equal(ring[0, :, token % places], code[(token - places + 1) % 2])
