"""The CATS MLP: the generic tests of its spec, and what is true of it alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from subquad import cats_mlp, reference
from subquad.ops import _linear
from subquad.reference.cats_activation import ACTIVATIONS, activate
from subquad.testing import Sample, Sampler, Task, assert_same_bits, backend_params, generic_tests, strategies
from subquad.testing.case import Case
from subquad.testing.checks import CHECKS
from subquad.testing.instruments import record_ops
from subquad.testing.layouts import lay_out
from subquad.testing.specs.cats_mlp import SPEC, draw, gate_scores, with_threshold

EPS = 2.0**-24  # of float32 rounding
EXAMPLES = {"native": 60, "simt": 25, "triton": 6, "reference": 25}
dtypes = pytest.mark.parametrize("dtype", SPEC.dtypes, ids=("fp32", "bf16", "fp16"))


@generic_tests(SPEC)
def test_generic(task: Task, device: str) -> None:
    task.run(device)


@st.composite
def problems(draw_: st.DrawFn, backend: str) -> Sample:
    """Calls of the public function with everything free: sizes, layouts, dtype, activation, threshold, mask mode."""
    largest = 24 if backend == "triton" else 140
    sampler = Sampler(draw_(strategies.dtypes(SPEC)), seed=draw_(strategies.seeds()))
    sample = draw(
        sampler,
        "random",
        draw_(st.integers(1, 5 if backend == "triton" else 20)),
        draw_(strategies.extents(1, largest)),
        draw_(strategies.extents(1, largest)),
        threshold=-1.0,
        bias=draw_(st.booleans()),
        row_major=draw_(st.booleans()),
        activation=draw_(st.sampled_from(ACTIVATIONS)),
        inclusive=draw_(st.booleans()),
        mask_mode=draw_(st.sampled_from(("token", "union"))),
        prefill=draw_(st.sampled_from(("masked", "dense"))),
        grad=draw_(st.sampled_from(("masked", "ste"))),
    )
    chosen = {n: draw_(strategies.layouts(SPEC, n)) for n, a in sample.args.items() if a is not None}
    laid_out = {n: lay_out(sample[n], layout) for n, layout in chosen.items() if layout != "contiguous"}
    kind = draw_(st.sampled_from(("scalar", "tensor", "channel")))
    try:
        return with_threshold(sample.replace(**laid_out), sampler, kind, draw_(st.floats(0.0, 0.95)))
    except ValueError:  # no gap between the scores
        reject()


@backend_params("cats_mlp")
def test_random_problems(backend: str) -> None:
    @settings(max_examples=EXAMPLES[backend])
    @given(problems(backend))
    def run(sample: Sample) -> None:
        case = Case(dataclasses.replace(SPEC, samples=lambda _: [sample]), backend, sample["x"].dtype)
        Task(case.spec, CHECKS["forward"], backend, case.dtype).run()
        if backend != "triton":
            Task(case.spec, CHECKS["gradients"], backend, case.dtype).run()

    run()


def _visible(case: Case, tokens: int, activation: str, n: int) -> tuple[Sample, torch.Tensor, torch.Tensor]:
    """A problem whose result is the thresholded activation, its scores in float64, and sum |x w| of each score."""
    sampler = Sampler(case.dtype, seed=11)
    x, gate = sampler.normal(tokens, n), sampler.normal(n, n, std=n**-0.5)
    ones, eye = torch.ones(n, dtype=case.dtype), torch.eye(n, dtype=case.dtype)
    tensors = {"x": x, "w_gate": gate, "w_up": torch.zeros_like(gate), "w_down": eye, "b_up": ones}
    scores = activate(x.double() @ gate.double().T, activation).abs()
    return Sample("visible", tensors, {"activation": activation}), scores, x.double().abs() @ gate.double().abs().T


@backend_params("cats_mlp")
@dtypes
@pytest.mark.parametrize("tokens", [5, 17])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_wrong_decisions_are_near_the_threshold(backend: str, dtype: torch.dtype, tokens: int, activation: str) -> None:
    """Thresholds on top of the scores: only where rounding of a float32 sum can turn the decision may it be turned."""
    case = Case(SPEC, backend, dtype)
    sample, scores, magnitude = _visible(case, tokens, activation, 12 if backend == "triton" else 64)
    t = scores.gather(0, torch.arange(scores.shape[1])[None] % tokens).squeeze(0).float()
    for inclusive in (False, True):
        taken = case.call(sample.with_options(threshold=t, inclusive=inclusive))[0] != 0
        expected = (scores >= t if inclusive else scores > t) & (scores > 0)
        wrong = taken != expected
        assert bool(((scores - t).abs() <= 8 * EPS * magnitude)[wrong].all())
        assert int(wrong.sum()) <= scores.shape[1]


@backend_params("cats_mlp")
@dtypes
@pytest.mark.parametrize("tokens", [1, 17])
def test_tie_is_one_float_wide(backend: str, dtype: torch.dtype, tokens: int) -> None:
    """Bisect the largest threshold that leaves a neuron active: with `inclusive` it is the next float, in every dtype.

    That float is the kernel's own score, so the comparison is made in float32 on the unrounded activation.
    """
    case = Case(SPEC, backend, dtype)
    sample, scores, magnitude = _visible(case, tokens, "silu", 8)
    boundary = {}
    for inclusive in (False, True):
        low, high = ((scores[0] * f).float().view(torch.int32) for f in (0.9999, 1.0001))
        while bool((high - low > 1).any()):
            middle = (low + high) // 2
            y = case.call(sample.with_options(threshold=middle.view(torch.float32), inclusive=inclusive))[0]
            low, high = torch.where(y[0] != 0, middle, low), torch.where(y[0] != 0, high, middle)
        boundary[inclusive] = low
    assert torch.equal(boundary[True], boundary[False] + 1)
    own = boundary[True].view(torch.float32).double()
    assert bool(((own - scores[0]).abs() <= 8 * EPS * magnitude[0]).all())


@backend_params("cats_mlp")
def test_dead_neurons_get_no_gradient(backend: str) -> None:
    """Rows of the weights that no token woke have gradients of exactly zero; the threshold has none at all."""
    case = Case(SPEC, backend)
    sample = draw(Sampler(), "sparse", 3, 16, 40, fraction=0.9)
    scores, t = gate_scores(sample), sample.kwargs["threshold"]
    awake = (scores > t).any(0)
    assert 0 < int(awake.sum()) < 40
    grads = case.gradients(sample)
    for name, dim in (("w_gate", 1), ("w_up", 1), ("w_down", 0)):
        assert torch.equal(grads[name].count_nonzero(dim) > 0, awake), name
    learnable = torch.tensor(t, requires_grad=True)
    y = case.call(sample.with_options(threshold=learnable), x=sample["x"].clone().requires_grad_())[0]
    assert torch.autograd.grad(y.sum(), learnable, allow_unused=True) == (None,)


@backend_params("cats_mlp", "native", "triton", "simt")
def test_decode_is_one_operator(backend: str) -> None:
    """Without gradients a few tokens cost one operator call, whose result is handed on as it is."""
    case = Case(SPEC, backend)
    with record_ops() as calls:
        y = case.call(draw(Sampler(), "decode", 2, 16, 24))[0]
    assert [(c.op.namespace, c.name) for c in calls] == [(case.namespace, "cats_mlp_fwd")]
    assert y.data_ptr() == calls[0].result.data_ptr()


def test_union_covers_token_masks() -> None:
    """The reference with the union of the token masks is what `mask_mode="union"` computes."""
    sample = draw(Sampler(), "union", 4, 16, 40, fraction=0.8)
    mask = (gate_scores(sample) > sample.kwargs["threshold"]).any(0, keepdim=True).expand(4, -1)
    tensors = {n: a for n, a in sample.args.items() if a is not None}
    expected = reference.cats_mlp.cats_mlp(**tensors, threshold=torch.zeros(1), mask=mask)
    assert_same_bits(SPEC.reference(**tensors, threshold=sample.kwargs["threshold"], mask_mode="union"), expected)


def test_narrow_weights_are_widened_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rows, the last one incomplete, in their order."""
    x, w, b = (torch.randn(shape).bfloat16() for shape in ((3, 8), (10, 8), (10,)))
    whole = _linear.linear_fp32(x, w, b)
    monkeypatch.setattr(_linear, "_BLOCK_ELEMENTS", 24)
    torch.testing.assert_close(_linear.linear_fp32(x, w, b), whole)


@backend_params("cats_mlp", "native")
def test_tokens_beyond_a_panel(backend: str) -> None:
    """More than the dense path takes at once, the last panel too short to be one: it begins among the tokens of another."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        sample = draw(Sampler(dtype), "panels", 515, 8, 71)
        found, expected = Case(SPEC, backend).call(sample)[0], Case(SPEC, "reference").call(sample)[0]
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@backend_params("cats_mlp", "native")
@pytest.mark.parametrize("row_major", [False, True])
@pytest.mark.parametrize(("tokens", "hidden", "neurons"), [(17, 579, 333), (40, 512, 160), (90, 301, 71)])
def test_many_tokens_in_bfloat16(tokens: int, hidden: int, neurons: int, row_major: bool, backend: str) -> None:
    """Several slices and blocks of each dimension, the last one odd, on one thread and on three."""
    sample = draw(Sampler(torch.bfloat16), "blocks", tokens, hidden, neurons, bias=True, row_major=row_major)
    expected, before = Case(SPEC, "reference").call(sample)[0], torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(Case(SPEC, backend).call(sample)[0])
    finally:
        torch.set_num_threads(before)
    assert_same_bits(results[0], results[1])
    torch.testing.assert_close(results[0], expected, rtol=2e-2, atol=2e-2)


@backend_params("cats_mlp", "native")
def test_short_sums_are_not_rounded_on_the_way(backend: str) -> None:
    """Two neurons that all but cancel: what is left has more digits than one of them in bfloat16."""
    one = torch.ones(20, 1, dtype=torch.bfloat16)
    gate, up, down = (
        torch.tensor(x, dtype=torch.bfloat16) for x in ([[129 / 128], [1.0]], [[129 / 128], [130 / 128]], [[1.0, -1.0]])
    )
    y = cats_mlp(one, gate, up, down, -1.0, activation="relu", backend=backend)
    assert_same_bits(y, torch.full_like(one, 2.0**-14))


@pytest.mark.quick
@backend_params("cats_mlp")
@pytest.mark.parametrize("neuron_major", [False, True])
def test_a_neuron_that_one_token_keeps_is_dead_for_another(neuron_major: bool, backend: str) -> None:
    """They share what is read of w_down, but not what is infinite there."""
    x, gate, down = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.ones(2, 3)
    down[:, 0] = torch.inf
    down = down.t().contiguous().t() if neuron_major else down
    y = cats_mlp(x, gate, torch.ones(3, 2), down, 0.1, backend=backend)
    assert bool((y[0] == torch.inf).all()) and bool(y[1].isfinite().all())
