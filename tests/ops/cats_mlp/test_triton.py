"""Cases that only the structure of the Triton cats_mlp kernels makes special, run in Triton's interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from subquad.contract import HANDLES
from subquad.reference.cats_mlp import cats_mlp as reference

pytestmark = pytest.mark.backend("cats_mlp", "triton")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
layouts = pytest.mark.parametrize("neuron_major", [True, False], ids=["neuron-major", "row-major"])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def inputs(tokens: int, hidden: int, intermediate: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """x, w_gate, w_up and the transpose of w_down, of unit scale after each product."""
    generator = torch.Generator().manual_seed(hidden + intermediate)
    shapes = [(tokens, hidden), (intermediate, hidden), (intermediate, hidden), (intermediate, hidden)]
    x, gate, up, down = (torch.randn(shape, generator=generator) for shape in shapes)
    return [t.to(dtype) for t in (x, gate / hidden**0.5, up / hidden**0.5, down / intermediate**0.5)]


def mlp(*tensors: torch.Tensor, biases: Any = (None, None, None), union: bool = False) -> torch.Tensor:
    return HANDLES["triton"]["cats_mlp_fwd"](*tensors, *biases, 0, False, union)


@dtypes
@pytest.mark.parametrize("tokens", [3, 5])
def test_missing_tokens_of_a_tile_wake_no_neuron(dtype: torch.dtype, tokens: int) -> None:
    """Tiles are padded with rows of zeros; with a gate bias those would be active everywhere."""
    x, gate, up, down = inputs(tokens, 20, 40, dtype)
    bias = torch.full((40,), 3.0, dtype=dtype)
    gate, x = gate.zero_(), x.abs()
    gate[:, 0] = -8.0 / x[:, 0].min().item()  # real tokens: act(3 - 8 or less) is far below the threshold
    y = mlp(x, gate, up, down.T, torch.tensor([0.5]), biases=(bias, None, None), union=True)
    assert torch.equal(y, torch.zeros_like(y))


@dtypes
@layouts
@pytest.mark.parametrize("intermediate", [127, 129, 2100])
def test_splits_cover_every_neuron_once(dtype: torch.dtype, neuron_major: bool, intermediate: int) -> None:
    x, gate, up, down = inputs(2, 9, intermediate, dtype)
    down_t = down.T if neuron_major else down.T.contiguous()
    want = reference(*(t.double() for t in (x, gate, up, down.T)), torch.tensor([-1.0]).double())
    got = mlp(x, gate, up, down_t, torch.tensor([-1.0]))
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("plan", ["_DOT", "_FMA"])
def test_splits_of_any_size(plan: str) -> None:
    from subquad.kernels import cats_mlp

    chosen = getattr(cats_mlp, plan)
    for inner in (*range(700), 4096, 11008, 14336, 28672, 10**6):
        splits, span = chosen.splits(inner)
        assert splits <= chosen.max_splits and span % chosen.block_i == 0
        assert max(splits - 1, 0) * span < max(inner, 1) and inner <= splits * span


@pytest.mark.parametrize(
    ("dtype", "neuron_major"),  # only the products of 16-bit weights have a second pass
    [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)],
    ids=["fp32", "bf16-neuron-major", "bf16-row-major"],
)
def test_non_finite_weights_reach_only_tokens_that_use_them(dtype: torch.dtype, neuron_major: bool) -> None:
    """The second pass of `down`: finite results keep their bits, the others follow IEEE arithmetic per active term."""
    x, gate, up, down = inputs(6, 24, 150, dtype)
    threshold = torch.tensor([0.2])
    active = torch.nn.functional.silu(x.double() @ gate.double().T).abs() > 0.2
    mixed = (active.any(0) & ~active.all(0)).nonzero().flatten().tolist()
    down_t = down.T if neuron_major else down.T.contiguous()
    clean = mlp(x, gate, up, down_t, threshold)
    dirty = down_t.clone(memory_format=torch.preserve_format)
    dirty[3, mixed[0]], dirty[5, mixed[1]], dirty[5, mixed[2]], dirty[20, mixed[3]] = (
        math.inf,
        -math.inf,
        math.inf,
        math.nan,
    )
    got = mlp(x, gate, up, dirty, threshold)
    touched = torch.zeros_like(clean, dtype=torch.bool)
    for column, neuron in ((3, mixed[0]), (5, mixed[1]), (5, mixed[2]), (20, mixed[3])):
        touched[:, column] |= active[:, neuron]
    assert torch.equal(got[~touched], clean[~touched])
    assert not got[touched].isfinite().any()
    both = active[:, mixed[1]] & active[:, mixed[2]]
    assert bool((got[:, 3].isinf() == active[:, mixed[0]]).all()) and bool(
        (got[:, 20].isnan() == active[:, mixed[3]]).all()
    )
    u = (x.double() @ up.double().T).sign() * (x.double() @ gate.double().T).sign()
    opposite = both & (u[:, mixed[1]] == u[:, mixed[2]])  # +inf and -inf meet
    assert bool((got[:, 5].isnan() == opposite).all())
    for token in range(6):
        alone = mlp(x[token : token + 1], gate, up, dirty, threshold)[0]
        torch.testing.assert_close(alone, got[token], rtol=0, atol=0, equal_nan=True)


@dtypes
def test_other_tokens_and_their_number_do_not_change_a_bit(dtype: torch.dtype) -> None:
    x, gate, up, down = inputs(16, 40, 150, dtype)
    threshold = torch.tensor([0.2])
    y = mlp(x, gate, up, down.T, threshold)
    for first, last in ((0, 1), (0, 4), (3, 8), (15, 16)):
        assert torch.equal(mlp(x[first:last].clone(), gate, up, down.T, threshold), y[first:last])
    x[7] = math.nan
    poisoned = mlp(x, gate, up, down.T, threshold)
    assert poisoned[7].isnan().all()
    assert torch.equal(poisoned[torch.arange(16) != 7], y[torch.arange(16) != 7])


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {0: lambda t: t.repeat(17, 1)}),
        ("x", {0: lambda t: t[:0]}),
        ("x", {0: lambda t: t.repeat(1, 2)[:, ::2]}),
        ("w_gate", {1: lambda t: t.T.contiguous().T}),
        ("w_gate", {1: lambda t: t[:, 1:]}),
        ("w_up", {2: lambda t: t[1:]}),
        ("w_down", {3: lambda t: t[1:]}),
        ("w_down", {3: lambda t: t.repeat(2, 2)[::2, ::2]}),
        ("threshold", {4: lambda t: t.repeat(2)}),
        ("threshold", {4: lambda t: t.double()}),
        ("b_gate", {5: lambda t: t.repeat(2)[::2]}),
        ("b_down", {7: lambda t: t[1:]}),
    ],
)
def test_launcher_refuses_what_would_leave_its_tensors(name: str, change: dict[int, Any]) -> None:
    x, gate, up, down = inputs(1, 6, 10, torch.float32)
    tensors = [x, gate, up, down.T, torch.tensor([0.1]), torch.ones(10), torch.ones(10), torch.ones(6)]
    for position, function in change.items():
        tensors[position] = function(tensors[position])
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        mlp(*tensors[:5], biases=tensors[5:])
