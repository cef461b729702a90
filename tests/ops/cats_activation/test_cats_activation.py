"""Thresholded activation and gated unit: the generic tests of both specs, and what is true of them alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

import subquad
from subquad.reference.cats_activation import ACTIVATIONS
from subquad.testing import OpSpec, Sample, Sampler, Task, assert_same_bits, backend_params, generic_tests, strategies
from subquad.testing.checks import CHECKS
from subquad.testing.specs.cats_activation import GLU, SPECS, draw

EXAMPLES = {"native": 60, "simt": 25, "triton": 15, "reference": 25}


@generic_tests(*SPECS)
def test_generic(task: Task, device: str) -> None:
    task.run(device)


@st.composite
def problems(draw_: st.DrawFn, spec: OpSpec) -> Sample:
    """Everything free: shape, dtype, activation, threshold, tie rule, gradient rule."""
    sampler = Sampler(draw_(strategies.dtypes(spec)), seed=draw_(strategies.seeds()))
    try:
        return draw(
            sampler,
            "random",
            draw_(strategies.extents(1, 40)),
            draw_(strategies.extents(1, 520)),
            threshold=draw_(st.sampled_from(("scalar", "tensor", "channel", -1.0, float("inf")))),
            gated=spec is GLU,
            activation=draw_(st.sampled_from(ACTIVATIONS)),
            inclusive=draw_(st.booleans()),
            grad=draw_(st.sampled_from(("masked", "ste"))),
        )
    except ValueError:  # no gap between the scores
        reject()


@backend_params("cats_activation")
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_random_problems(backend: str, spec: OpSpec) -> None:
    @settings(max_examples=EXAMPLES[backend])
    @given(problems(spec))
    def run(sample: Sample) -> None:
        fixed = dataclasses.replace(spec, samples=lambda _: [sample])
        for check in ("forward", "gradients"):
            Task(fixed, CHECKS[check], backend, sample["z"].dtype).run()

    run()


@backend_params("cats_activation")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ties(backend: str, activation: str) -> None:
    """A threshold equal to the kernel's own value drops it; `inclusive` keeps it."""
    z = torch.linspace(-5.0, 5.0, 301)
    options = {"activation": activation, "backend": backend}
    a = subquad.cats_activation(z, -1.0, **options)
    assert not subquad.cats_activation(z, a.abs(), **options).count_nonzero()
    assert_same_bits(subquad.cats_activation(z, a.abs(), inclusive=True, **options), a)


@backend_params("cats_activation", "native")
def test_rows_beyond_a_work_item(backend: str) -> None:
    z = torch.randn(300, 70)
    found = subquad.cats_activation(z, 0.1, backend=backend)
    torch.testing.assert_close(found, subquad.cats_activation(z, 0.1, backend="reference"))


@pytest.mark.quick
@backend_params("cats_activation")
def test_results_are_rounded_to_the_nearest_even(backend: str) -> None:
    """Products half way between two numbers of 16 bits, beyond the largest, and below the smallest normal one."""
    cases = {
        torch.bfloat16: [(1.5, 131 / 128, 196 / 128), (1.5, 129 / 128, 194 / 128)],
        torch.float16: [
            (1.5, 1027 / 1024, 1540 / 1024), (1.5, 1025 / 1024, 1538 / 1024), (1.5 * 2.0**-12, 2.0**-12, 2.0**-23),
            (2.5 * 2.0**-12, 2.0**-12, 2.0**-23), (300.0, 300.0, float("inf")), (255.875, 256.0, 65504.0),
        ],
    }  # fmt: skip
    for dtype, triples in cases.items():
        z, u, expected = (torch.tensor(column * 9, dtype=dtype) for column in zip(*triples, strict=True))
        h = GLU.fn(z[None], u[None], threshold=0.0, activation="relu", backend=backend)
        assert_same_bits(h, expected[None])


@pytest.mark.quick
@backend_params("cats_activation")
@pytest.mark.parametrize("inclusive", [False, True])
def test_nan_is_active(backend: str, inclusive: bool) -> None:
    """No comparison with it is true: it must not pass for a small activation."""
    z = torch.tensor([float("nan"), 0.1, 3.0])
    a = subquad.cats_activation(z, 1.0, inclusive=inclusive, backend=backend)
    assert a.isnan().tolist() == [True, False, False] and a[1] == 0 and a[2] > 1


@backend_params("cats_activation")
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_dead_entries_are_positive_zero(backend: str, spec: OpSpec) -> None:
    """Exactly +0 whatever the input holds, and no gradient: a select, not a product."""
    z = torch.tensor([[-0.1, 0.1, -0.0, 0.0]]).requires_grad_()
    args = {"z": z}
    if spec is GLU:
        args["u"] = torch.tensor([[float("inf"), float("nan"), -1.0, -float("inf")]]).requires_grad_()
    y = spec.fn(**args, threshold=1.0, backend=backend)
    assert_same_bits(y, torch.zeros_like(y))
    for grad in torch.autograd.grad(y, tuple(args.values()), torch.full_like(y, float("inf"))):
        assert not grad.count_nonzero()


@backend_params("cats_activation")
def test_gated_unit_takes_a_wider_gate(backend: str) -> None:
    """z in float32 beside u in bfloat16, as the training path passes them."""
    sample = draw(Sampler(), "mixed", 3, 37, gated=True)
    z, u = sample["z"], sample["u"].bfloat16()
    leaves = z.clone().requires_grad_(), u.clone().requires_grad_()
    h = GLU.fn(*leaves, **sample.kwargs, backend=backend)
    grads = torch.autograd.grad(h, leaves, torch.ones_like(h))
    assert [t.dtype for t in (h, *grads)] == [torch.bfloat16, torch.float32, torch.bfloat16]
    torch.testing.assert_close(h, GLU.reference(z, u, **sample.kwargs))


@pytest.mark.quick
@backend_params("cats_activation")
def test_odd_addresses(backend: str) -> None:
    """Whole vectors of columns that begin where no vector may."""
    z = torch.randn(4, 64)
    shifted = torch.empty(1 + z.numel())[1:].view(z.shape).copy_(z)
    results = []
    for x in (z, shifted):
        leaf = x.detach().requires_grad_()
        y = subquad.cats_activation(leaf, 0.1, backend=backend)
        results.append([y, *torch.autograd.grad(y, leaf, torch.ones_like(y))])
    for expected, found in zip(*results, strict=True):
        assert_same_bits(found, expected)
