"""A ring of int8 beside tokens of 16 bits: the native kernels multiply integers, at every level."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import subquad
from subquad.testing import Sampler
from subquad.testing.compare import assert_close, assert_same_bits
from subquad.testing.levels import at_level, levels
from subquad.testing.spec import Sample
from subquad.testing.specs.sink_attention_step import draw, oracle

# Errors of the integers beside that of the result's own rounding, 2^-9 and 2^-12 of an element.
LIMITS = {torch.bfloat16: 3e-3, torch.float16: 6e-4}
CASES: dict[str, dict[str, Any]] = {
    "pre": {"rotary": 64},
    "post": {"rotary": 64, "key_rope": "post"},
    "no rotation": {},
    "wide heads": {"d": 256, "dv": 64, "rotary": 256, "heads": (2, 1)},
    "part of the elements rotated": {"d": 192, "dv": 128, "rotary": 128},
    "as many sums as a query has heads": {"heads": (7, 1), "rotary": 64},
    "many rows": {"heads": (6, 2), "tokens": 9, "rotary": 64},
    "other tiles for keys than for values": {"dv": 40, "rotary": 64},
    "rows that see nothing of a tile": {"tokens": 40, "window": 20, "slack": 30, "rotary": 64},
    "large scores": {"rotary": 64, "factor": 6.0},
    "two ranges, and a wrap": {"rotary": 64, "window": 700, "seen": (1100, 300)},
}


def sample(
    dtype: torch.dtype,
    heads: tuple[int, int] = (4, 1),
    d: int = 64,
    dv: int | None = None,
    factor: float = 1.0,
    **options: Any,
) -> Sample:
    """A call whose queries are multiplied by `factor`."""
    options = {"window": 151, "slack": 9, "seen": (1000, 3, 97)} | options
    made = draw(Sampler(dtype, seed=len(options)), "integers", heads, d, dv, ring="int8", **options)
    made["q"].mul_(factor)
    return made


def step(made: Sample, **changed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    args: dict[str, Any] = {n: x if x is None else x.clone() for n, x in (made.args | changed).items()}
    return subquad.sink_attention_step(**args, **made.kwargs, backend="native")


def definition(made: Sample, **changed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    args = {n: x.double() if x is not None and x.is_floating_point() else x for n, x in (made.args | changed).items()}
    found: Any = oracle(**{n: x if x is None else x.clone() for n, x in args.items()}, **made.kwargs)
    return found[0][0], found[0][1]


at_levels = pytest.mark.parametrize("level", levels())
in_dtypes = pytest.mark.parametrize("dtype", list(LIMITS), ids=["bf16", "fp16"])


@at_levels
@in_dtypes
@pytest.mark.parametrize("case", list(CASES))
def test_near_the_definition(level: str, dtype: torch.dtype, case: str) -> None:
    made = sample(dtype, **CASES[case])
    expected, expected_lse = definition(made)
    with at_level(level):
        out, lse = step(made)
    assert_close(out.double(), expected.double(), LIMITS[dtype])
    assert float((lse.double() - expected_lse.double()).abs().max()) < 1e-3 * CASES[case].get("factor", 1.0)


@at_levels
@pytest.mark.parametrize("key_rope", ["pre", "post"])
def test_every_byte(level: str, key_rope: str) -> None:
    """-128 too, which no rounding makes, and rows of nothing else, whose products are the largest there are."""
    made = sample(torch.float16, rotary=64, key_rope=key_rope, window=300, slack=0, seen=(2000,))
    codes = torch.arange(made["ring_k"].numel()).reshape(made["ring_k"].shape)
    rings = {"ring_k": ((codes * 37) % 256 - 128).to(torch.int8), "ring_v": ((codes * 101) % 256 - 128).to(torch.int8)}
    for row in range(0, 300, 3):
        rings["ring_k"][:, :, row] = -128
        rings["ring_v"][:, :, row] = -128
    made["q"].copy_(made["q"].sign())
    expected, _ = definition(made, **rings)
    with at_level(level):
        out, _ = step(made, **rings)
    assert_close(out.double(), expected.double(), LIMITS[torch.float16])


@at_levels
@in_dtypes
def test_numbers_that_are_none(level: str, dtype: torch.dtype) -> None:
    """They reach whoever sees them, and nobody else."""
    made = sample(dtype, rotary=64)
    with at_level(level):
        clean = step(made)
    for name in ("k_scale", "v_scale"):
        for worst in (float("nan"), float("inf")):
            scale = made[name].clone()
            scale[1] = worst  # 3 tokens so far: one in the ring is seen
            scale[2, :, 95:] = worst  # not written yet
            with at_level(level):
                out, lse = step(made, **{name: scale})
            assert not out[1].isfinite().any(), (name, worst)
            assert bool(lse[1].isnan().all()) == (name == "k_scale")
            for row in (0, 2):
                assert_same_bits(out[row], clean[0][row], f"{name} of row {row}")
    q = made["q"].clone()
    q[0, 0, 1, 5] = float("inf")
    with at_level(level):
        out, _ = step(made, q=q)
    assert bool(out[0, 0, 1].isnan().all())
    assert_same_bits(out[0, 0, 0], clean[0][0, 0, 0])


@at_levels
@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_what_left_the_window_of_a_later_row(level: str, name: str) -> None:
    made = sample(torch.bfloat16, tokens=2, rotary=64, seen=(1000,))
    scale = made[name].clone()
    oldest = 1000 - made.kwargs["window"] + 1
    scale[0, :, (oldest - made["sink_k"].shape[2]) % made["ring_k"].shape[2]] = float("nan")
    with at_level(level):
        clean, found = step(made)[0], step(made, **{name: scale})[0]
    assert bool(found[0, 0].isnan().all())
    assert_same_bits(found[0, 1], clean[0, 1])


@at_levels
@pytest.mark.parametrize("size", [1e-36, 1e30])
def test_sizes_of_values(level: str, size: float) -> None:
    """What is rounded is relative to the largest of a row, whatever that is."""
    made = sample(torch.bfloat16, rotary=64)
    made["v_scale"].mul_(size)
    made["sink_v"].mul_(size)
    made["v"].mul_(size)
    expected, _ = definition(made)
    with at_level(level):
        out, _ = step(made)
    assert_close(out.double() / size, expected.double() / size, LIMITS[torch.bfloat16])


@at_levels
def test_threads_change_no_bit(level: str) -> None:
    made, before = (
        sample(torch.bfloat16, (8, 2), 128, rotary=128, window=1400, seen=(5000, 700)),
        torch.get_num_threads(),
    )
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with at_level(level):
                results.append(step(made))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)
