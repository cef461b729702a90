"""A forward that does not know the state before it, and what that adds when it comes, as shards of long sequences do on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from subquad.contract import HANDLES
from subquad.contract.gated_linear_attention import CONTRACT
from subquad.testing import Sampler, assert_close, assert_same_bits, backend_params
from subquad.testing.instruments import guarded_allocations
from subquad.testing.specs.gated_linear_attention import SPEC, draw, oracle

STEM = "gated_linear_attention"
SCALE, EPS = 0.3, 0.4
LOCAL, ENTER, FORWARD = f"{STEM}_local_fwd", f"{STEM}_enter_", f"{STEM}_fwd"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
CALLS: tuple[tuple[str, int, tuple[int, int, int, int], int, int, dict[str, Any]], ...] = (
    ("channel", 150, (2, 2, 2, 2), 64, 64, {"normalize": True}),
    ("sums", 150, (2, 2, 2, 2), 64, 48, {}),
    ("shared", 97, (8, 2, 1, 2), 12, 20, {"normalize": True}),
    ("head", 133, (4, 1, 2, 1), 33, 35, {"gate": "head", "normalize": True}),
    ("no-gate", 70, (5, 1, 1, 1), 16, 7, {"gate": "none", "normalize": True}),
    ("wide", 40, (1, 1, 1, 1), 256, 160, {"gate": "none"}),
    ("soon-forgotten", 300, (6, 3, 3, 3), 16, 16, {"mean": 2.0, "normalize": True}),
    ("some-channels", 300, (2, 2, 2, 2), 20, 16, {"mean": 0.8}),
    ("at-once", 90, (2, 1, 1, 1), 20, 36, {"mean": 40.0, "normalize": True}),
    ("few", 1, (2, 2, 2, 2), 8, 8, {"normalize": True}),
    ("none", 0, (2, 2, 2, 2), 8, 8, {"normalize": True}),
)
EACH = pytest.mark.parametrize("name", [name for name, *_ in CALLS])


def drawn(name: str, dtype: torch.dtype, **changes: Any) -> Any:
    """A call with a state before it."""
    _, tokens, heads, dk, dv, options = next(call for call in CALLS if call[0] == name)
    return draw(Sampler(dtype), name, tokens, heads, dk, dv, state=True, batch=3, **options | changes)


def local(sample: Any, backend: str, bounds: torch.Tensor | None = None, **states: torch.Tensor) -> Any:
    """(o, den, s, z, sums, decay, reach), for a state of zeros."""
    rows = (sample.args.get(n) for n in ("q", "k", "v", "g"))
    return HANDLES[backend][LOCAL](*rows, states.get("s0"), states.get("z0"), bounds, SCALE, EPS, normalised(sample))


def normalised(sample: Any) -> bool:
    return bool(sample.kwargs.get("normalize"))


def enter(sample: Any, found: Any, backend: str) -> tuple[torch.Tensor, ...]:
    """(o, s and, where it is, z), with the state of the sample before the tokens; `found` is changed."""
    o, den, s, z, sums, decay, reach = found
    s0, z0 = sample["s0"], sample.args.get("z0")
    HANDLES[backend][ENTER](o, den, sums, reach, sample["q"], sample.args.get("g"), s0, z0, SCALE, EPS)
    return (o, s + decay.unsqueeze(-1) * s0, *(() if z0 is None else (z + decay * z0,)))


def expected(sample: Any) -> tuple[torch.Tensor, ...]:
    """The definition, in float64, with the state before the first token."""
    wide = sample.to(torch.float64, sample.wide(sample.args))
    return oracle(**wide.args, normalize=normalised(sample), scale=SCALE, eps=EPS)


@pytest.mark.quick
@backend_params(STEM, "native")
@DTYPES
@EACH
def test_what_enters_afterwards_is_what_entered_before(name: str, dtype: torch.dtype, backend: str) -> None:
    sample = drawn(name, dtype)
    found = enter(sample, local(sample, backend), backend)
    for what, one, other in zip(("o", "s", "z"), found, expected(sample), strict=False):
        assert_close(one.double(), other, SPEC.tol.forward[one.dtype], what)


@backend_params(STEM, "native")
@DTYPES
@EACH
def test_the_shapes_are_those_promised(name: str, dtype: torch.dtype, backend: str) -> None:
    sample = drawn(name, dtype)
    rows = [sample.args.get(n) for n in ("q", "k", "v", "g")]
    promised = CONTRACT.operators[LOCAL].fake(*rows, None, None, None, SCALE, EPS, normalised(sample))
    for one, other in zip(local(sample, backend), promised, strict=True):
        assert (one.shape, one.dtype, one.is_contiguous()) == (other.shape, other.dtype, True)


@backend_params(STEM, "native")
@DTYPES
@pytest.mark.parametrize("name", ["soon-forgotten", "at-once", "some-channels"])
def test_beyond_its_reach_nothing_is_left_to_do(name: str, dtype: torch.dtype, backend: str) -> None:
    """As many tokens as the gates allow, and no more; the others have the bits of a forward from nothing."""
    sample = drawn(name, dtype)
    o, *_, reach = local(sample, backend)
    whole = HANDLES[backend][FORWARD](*(sample.args.get(n) for n in ("q", "k", "v", "g")), None, None, None, SCALE, EPS,
                                      normalised(sample))  # fmt: skip
    tokens, each = o.shape[1], o.shape[2] // reach.shape[1]
    fall = sample["g"].double().cumsum(1).amax(3)  # of the channel that forgets last
    assert bool((reach < tokens).any()) and bool((reach % 32 == 0)[reach < tokens].all())
    for row in range(o.shape[0]):
        for state in range(reach.shape[1]):
            last = int(reach[row, state])
            heads = slice(state * each, (state + 1) * each)
            assert_same_bits(o[row, last:, heads], whole[0][row, last:, heads])
            assert last == 0 or fall[row, max(0, last - 64), state] > -104.5
            assert last == tokens or fall[row, last - 1, state] < -86


@backend_params(STEM, "native")
def test_of_packed_sequences_the_first_is_continued(backend: str) -> None:
    for bounds in ((0, 40, 40, 100, 130), (0, 0, 50, 130), (0, 130)):
        sample = drawn("channel", torch.bfloat16, bounds=bounds)
        sample = sample.replace(**{n: sample[n][:, :130] for n in ("q", "k", "v", "g")})
        cu, head = torch.tensor(bounds), slice(0, bounds[1])
        states = {n: sample[n].clone().index_fill_(0, torch.tensor(0), 0) for n in ("s0", "z0")}
        o, den, s, z, sums, decay, reach = local(sample, backend, cu, **states)
        assert reach[1:].eq(0).all()
        q, g = sample["q"][:, head], sample["g"][:, head]
        HANDLES[backend][ENTER](
            o[:, head], den[:, head], sums[:, head], reach[:1], q, g, sample["s0"][:1], sample["z0"][:1], SCALE, EPS
        )
        wide = sample.to(torch.float64, sample.wide(sample.args))
        wanted = oracle(**wide.args, normalize=True, scale=SCALE, eps=EPS, cu_seqlens=cu)
        s[:1] += decay[:1].unsqueeze(-1) * sample["s0"][:1]
        z[:1] += decay[:1] * sample["z0"][:1]
        for one, other in zip((o, s, z), wanted, strict=True):
            assert_close(one.double(), other, SPEC.tol.forward[one.dtype])


@backend_params(STEM, "native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["s0", "z0"])
def test_a_state_that_is_no_number_reaches_everything(
    where: str, value: float, dtype: torch.dtype, backend: str
) -> None:
    """As in one call, where 0 times it is NaN: in the columns and heads of the state that have it."""
    sample = drawn("soon-forgotten", dtype)
    nasty = sample[where].clone()
    nasty[1, 2][(3, 5) if where == "s0" else 3] = value
    sample = sample.replace(**{where: nasty})
    o, *_ = enter(sample, local(sample, backend), backend)
    clean, *_ = expected(sample.replace(**{where: torch.ones_like(nasty)}))
    assert bool(clean.isfinite().all())
    hit = torch.zeros_like(o, dtype=torch.bool)
    hit[1, :, 4:6, 5 if where == "s0" else slice(None)] = True
    if value == torch.inf and where == "z0":  # divided by infinity, until that becomes NaN
        assert not bool(o[1, -1, 4:6].isfinite().any())
        hit[1, :, 4:6] = True
        assert bool(o[~hit].isfinite().all())
    else:
        assert bool((o.isfinite() ^ hit).all())


@backend_params(STEM, "native")
def test_a_nan_among_the_tokens_stays_behind_them(backend: str) -> None:
    sample = drawn("channel", torch.float32)
    clean = enter(sample, local(sample, backend), backend)[0]
    for name, also_later in (("q", False), ("k", True), ("v", True), ("g", True)):
        x = sample[name].clone()
        x[0, 70, 1, 2] = torch.nan
        nasty = sample.replace(**{name: x})
        o = enter(nasty, local(nasty, backend), backend)[0]
        assert_close(o[0, :70], clean[0, :70], 1e-6)
        assert_close(o[:, :, 0], clean[:, :, 0], 1e-6)
        assert bool(o[0, 70, 1].isnan().any())
        assert bool(o[0, 71:, 1].isnan().any(-1).all()) is also_later


@backend_params(STEM, "native")
@DTYPES
def test_writes_nothing_outside(dtype: torch.dtype, backend: str) -> None:
    for name in ("shared", "head", "few", "wide"):
        sample = drawn(name, dtype)
        with guarded_allocations() as guards:
            given = sample.replace(**{n: guards.copy(x, n) for n, x in sample.args.items() if x is not None})
            found = enter(given, local(given, backend), backend)
            guards.check()
        for one, other in zip(found, expected(sample), strict=False):
            assert_close(one.double(), other, SPEC.tol.forward[one.dtype])


@backend_params(STEM, "native")
def test_rows_that_lie_apart(backend: str) -> None:
    """Any strides but along the last dimension."""
    sample = drawn("channel", torch.float32)
    apart = {n: sample[n].transpose(1, 2).contiguous().transpose(1, 2) for n in ("q", "k", "v", "g")}
    for one, other in zip(
        enter(sample.replace(**apart), local(sample.replace(**apart), backend), backend),
        enter(sample, local(sample, backend), backend),
        strict=True,
    ):
        assert_same_bits(one, other)


@backend_params(STEM, "native")
def test_threads_change_no_bit(backend: str) -> None:
    sample = draw(Sampler(), "threads", 700, (6, 3, 3, 3), 64, 48, batch=1, state=True, normalize=True)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            found.append(enter(sample, local(sample, backend), backend))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert_same_bits(two, one)


@backend_params(STEM, "native")
@pytest.mark.parametrize("queries", [0, 1])
def test_decays_near_one_are_not_rounded_to_one_side(queries: int, backend: str) -> None:
    """Of many chunks: what a state keeps of one before them would drift, if two such decays were multiplied first."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.rand(1, 32768, 1, n, generator=generator) for n in (16, 1))
    g = -2e-5 * torch.rand(k.shape, generator=generator)
    *_, decay, _ = HANDLES[backend][LOCAL](k[:, :, :queries], k, v, g, None, None, None, SCALE, EPS, True)
    exact = g.double().sum(1).exp()
    assert float(((decay.double() - exact) / exact).mean().abs()) < 4e-6


BAD: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "o": (lambda x: {"o": x["o"][:, :-1]}, r"o: expected shape \[3, 97, 8, 20\], got \[3, 96, 8, 20\]"),
    "o in another dtype": (lambda x: {"o": x["o"].half()}, "o: expected the dtype of q, float32, got float16"),
    "den": (lambda x: {"den": x["den"][:0]}, r"den: expected shape \[3, 97, 8\]"),
    "den that is not wanted": (lambda x: {"z0": None}, r"den: expected shape \[0, 97, 8\]"),
    "sums": (lambda x: {"sums": x["o"]}, r"sums: expected shape \[0, 97, 8, 20\]"),
    "reach": (lambda x: {"reach": x["reach"].int()}, "reach: expected int64, got int32"),
    "queries for no state": (lambda x: {"s0": x["s0"][:, :0]}, "s0: expected at least one head, got none"),
    "queries for some states": (lambda x: {"s0": torch.cat([x["s0"]] * 3, 1)}, "q: expected 6 states"),
    "gates": (lambda x: {"g": x["g"][:, :5]}, r"g: expected shape \[3, 97, H, D\]"),
    "wide": (lambda x: {"s0": torch.zeros(3, 2, 12, 257)}, r"s0: expected a last dimension in \[1, 256\], got 257"),
}


@backend_params(STEM, "native")
@pytest.mark.parametrize("what", BAD)
def test_refused_before_anything_is_written(what: str, backend: str) -> None:
    sample = drawn("shared", torch.float32)
    change, message = BAD[what]
    o, den, _, _, sums, _, reach = local(sample, backend)
    given = {"o": o, "den": den, "sums": sums, "reach": reach, **{n: sample[n] for n in ("q", "g", "s0", "z0")}}
    kept = o.clone()
    with pytest.raises(RuntimeError, match=message):
        HANDLES[backend][ENTER](*(given | change(given)).values(), SCALE, EPS)
    assert_same_bits(o, kept)
