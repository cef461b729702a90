"""Cases that only the structure of the Triton kernels makes special, run in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from subquad.contract import HANDLES
from subquad.reference.quantised_linear import FORMATS
from subquad.testing.spec import Sample, Sampler
from subquad.testing.specs.quantised_cats_mlp import BIASES, WEIGHTS, draw, formats_of, oracle

pytestmark = pytest.mark.backend("quantised_cats_mlp", "triton")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
ORDER = ("x", *WEIGHTS, "threshold", *BIASES)


def mlp(sample: Sample, *, union: bool = False, **changed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    threshold = torch.as_tensor(sample.kwargs["threshold"]).reshape(-1)
    tensors = {**sample.args, "w_down": sample["w_down"].contiguous(), "threshold": threshold, **changed}
    codes = [tuple(FORMATS).index(format) for format in formats_of(sample)]
    return HANDLES["triton"]["quantised_cats_mlp_fwd"](*(tensors[name] for name in ORDER), *codes, 0, False, union)


@pytest.mark.parametrize("plan", ["_DOT", "_FMA"])
def test_splits_keep_to_blocks_of_scales(plan: str) -> None:
    """A step reads one row of shared scales, so it must lie within one block of 32 neurons."""
    from subquad.kernels import quantised_cats_mlp

    chosen = getattr(quantised_cats_mlp, plan)
    assert chosen.cols == chosen.block_h == 32 and 32 % chosen.block_i == 0
    for inner in (*range(700), 4096, 11008, 14336, 28672, 10**6):
        splits, span = chosen.splits(inner)
        assert splits <= chosen.max_splits and span % 32 == 0
        assert max(splits - 1, 0) * span < max(inner, 1) and inner <= splits * span


@dtypes
@pytest.mark.parametrize("shared", [False, True], ids=["rows", "shared"])
@pytest.mark.parametrize("neurons", [96, 4128])
def test_splits_cover_every_neuron_once(dtype: torch.dtype, shared: bool, neurons: int) -> None:
    """4,128 neurons are more than all splits can be long at least."""
    sample = draw(Sampler(dtype), "splits", 2, 64, neurons, format="int4_min", shared=shared, threshold=-1.0)
    wide = sample.to(torch.float64, ("x",))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    y, mask = mlp(sample)
    assert mask.all()
    torch.testing.assert_close(y.double(), oracle(**wide.args, **wide.kwargs), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shared", [False, True], ids=["rows", "shared"])
@pytest.mark.parametrize("number", [torch.inf, torch.nan])
def test_the_second_pass_keeps_bits(shared: bool, number: float) -> None:
    """The second pass of `down`, of 16-bit calls: what does not depend on the scale keeps its bits."""
    sample = draw(
        Sampler(torch.bfloat16), "foreign", 6, 64, 96, shared=shared, format="int8", fraction=0.97 if shared else 0.6
    )
    y, mask = mlp(sample)
    name, column = ("down_scales", 0) if shared else ("w_down", 64)
    partly = (mask.any(0) & ~mask.all(0)).nonzero().flatten().tolist()
    neuron = next(n for n in partly if not shared or not mask[:, n // 32 * 32 : n // 32 * 32 + 32].any(1).all())
    data = sample[name].clone()
    data[neuron // 32 if shared else neuron].view(torch.float16)[column // 2] = number
    uses = mask[:, neuron // 32 * 32 : neuron // 32 * 32 + 32].any(1) if shared else mask[:, neuron]
    got, again = mlp(sample, **{name: data})
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[:, : 1 if shared else 32] = uses[:, None]
    assert torch.equal(again, mask) and uses.any() and not uses.all()
    assert torch.equal(got[~touched], y[~touched])
    assert not got[touched].isfinite().any()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda t: t.repeat(17, 1)),
        ("x", lambda t: t[:0]),
        ("x", lambda t: t.repeat(1, 2)[:, ::2]),
        ("w_gate", lambda t: t[:, 1:].contiguous()),
        ("w_gate", lambda t: t.repeat(1, 2)[:, ::2]),
        ("w_up", lambda t: t[1:]),
        ("w_up", lambda t: t.char()),
        ("w_down", lambda t: t[1:]),
        ("scales of w_down", lambda t: t[1:]),
        ("scales of w_down", lambda t: t.repeat(1, 2)[:, ::2]),
        ("threshold", lambda t: t.repeat(2)),
        ("threshold", lambda t: t.double()),
        ("b_gate", lambda t: t.repeat(2)[::2]),
        ("b_down", lambda t: t[1:]),
    ],
)
def test_launcher_refuses_what_would_leave_its_tensors(
    name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    sample = draw(Sampler(), "wrong", 1, 32, 64, shared=True, bias=True, threshold=0.1)
    argument = "down_scales" if name.startswith("scales") else name
    given = torch.tensor([0.1]) if name == "threshold" else sample[argument]
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        mlp(sample, **{argument: change(given)})
