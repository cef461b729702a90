"""quantised_cats_mlp: the generic tests of its spec, masks, shared scales, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import subquad
from subquad import reference
from subquad.reference.quantised_cats_mlp import dequantise_down
from subquad.reference.quantised_linear import FORMATS
from subquad.testing import Task, generic_tests
from subquad.testing.spec import Sample, Sampler
from subquad.testing.specs.quantised_cats_mlp import SPECS, WEIGHTS, draw, shared_scales

ALL = pytest.mark.parametrize("format", FORMATS)


@generic_tests(*SPECS)
def test_generic(task: Task, device: str) -> None:
    task.run(device)


def call(sample: Sample, **options: Any) -> Any:
    args = {name: value for name, value in sample.args.items() if value is not None}
    return subquad.quantised_cats_mlp(**args, **sample.kwargs, **options)


@ALL
def test_shared_scales_are_the_numbers_of_the_transposed_rows(format: str) -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    codes, scales = shared_scales(weight, format)
    found = dequantise_down(codes, format, scales, torch.float64)
    assert torch.equal(found, subquad.dequantise(subquad.quantise(weight, format), format, torch.float64).t())


@ALL
@pytest.mark.parametrize("tokens", [1, 4, 16, 17])
@pytest.mark.parametrize("shared", [False, True])
def test_the_mask_is_the_one_that_was_taken(format: str, tokens: int, shared: bool) -> None:
    sample = draw(Sampler(), "mask", tokens, 64, 96, format=format, shared=shared)
    y, mask = call(sample, return_mask=True)
    assert mask.shape == (tokens, 96) and mask.dtype == torch.bool and 0 < mask.float().mean() < 1
    wide = sample.to(torch.float64, ("x",))
    weights = {name: wide.args[name] for name in (*WEIGHTS, "x")}
    threshold = torch.tensor(sample.kwargs["threshold"])
    formats = (format, format, format)
    _, own = reference.quantised_cats_mlp.quantised_cats_mlp(**weights, threshold=threshold, formats=formats)  # type: ignore[arg-type]
    assert torch.equal(own, mask)
    under, _ = reference.quantised_cats_mlp.quantised_cats_mlp(
        **weights, threshold=threshold, formats=formats, mask=mask
    )  # type: ignore[arg-type]
    assert (y.double() - under).norm() <= 1e-6 * under.norm()


def test_formats_and_shapes_that_do_not_fit_are_named() -> None:
    sample = draw(Sampler(), "wrong", 2, 64, 96, threshold=0.1)
    shared = draw(Sampler(), "wrong", 2, 64, 96, threshold=0.1, shared=True)
    for error, name, bad, options in (
        (ValueError, "format: expected one of", sample, {"format": "int5"}),
        (TypeError, "format: expected a name or three", sample, {"format": ("int8", "int8")}),
        (ValueError, "w_gate: expected shape", sample, {"format": ("int4", "int8", "int8")}),
        (ValueError, "w_up: expected shape", sample, {"format": ("int8", "int4", "int8")}),
        (ValueError, "w_down: expected shape", sample, {"format": ("int8", "int8", "int4")}),
        (ValueError, "down_scales: expected shape", shared.replace(down_scales=shared["down_scales"][:2]), {}),
        (ValueError, "w_down: expected shape", shared, {"format": ("int8", "int8", "int4_min")}),
        (TypeError, "down_scales: expected a uint8", shared.replace(down_scales=shared["down_scales"].short()), {}),
        (TypeError, "w_down: expected a uint8", sample.replace(w_down=torch.randn(96, 64)), {}),
        (TypeError, "w_gate: expected a uint8", sample.replace(w_gate=torch.randn(96, 64)), {}),
        (ValueError, "x: expected shape", sample.replace(x=torch.randn(2, 32)), {}),
        (ValueError, "b_gate: expected shape", sample.replace(b_gate=torch.randn(3)), {}),
        (TypeError, "return_mask: expected a bool", sample, {"return_mask": 1}),
        (ValueError, "threshold", sample, {"threshold": float("nan")}),
    ):  # fmt: skip
        with pytest.raises(error, match=name):
            call(
                bad.with_options(**options) if "return_mask" not in options else bad,
                **{k: v for k, v in options.items() if k == "return_mask"},
            )
    odd = draw(Sampler(), "odd", 2, 64, 40, threshold=0.1)
    with pytest.raises(ValueError, match="down_scales: expected None, for 40 neurons"):
        call(odd.replace(down_scales=torch.zeros(1, 128, dtype=torch.uint8)))


# --- rows of neurons ----------------------------------------


@ALL
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("hidden", "neurons"), [(1056, 96), (544, 1088)])
def test_tokens_do_not_depend_on_each_other(format: str, shared: bool, hidden: int, neurons: int) -> None:
    """Whole slices of the hidden dimension and a rest, several rounds of neurons; alone, in tiles, in all sixteen."""
    sample = draw(Sampler(), "alone", 16, hidden, neurons, format=format, shared=shared)
    y, mask = call(sample, return_mask=True)
    for first, last in ((0, 1), (3, 5), (5, 8), (7, 12)):
        part = sample.replace(x=sample["x"][first:last])
        found, own = call(part, return_mask=True)
        assert torch.equal(own, mask[first:last])
        assert torch.equal(found, y[first:last])


@ALL
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_rows_of_dead_neurons_are_not_multiplied(format: str, shared: bool, bad: float) -> None:
    """Neuron 3 is dead for the first token and alive for the second; so is the block of 32 that it stands in."""
    hidden, neurons, at = 64, 96, 35
    x = torch.zeros(3, hidden)
    x[:, 0] = torch.tensor([1.0, -1.0, 1.0])
    gate = torch.zeros(neurons, hidden)
    gate[:32, 0], gate[at, 0], gate[64:, 0] = 1.0, -1.0, 1.0  # relu: the second token wakes neuron `at` alone
    up, down = torch.ones(neurons, hidden), torch.ones(hidden, neurons)
    sample = draw(Sampler(), "dead", 3, hidden, neurons, format=format, shared=shared, activation="relu")
    codes, scales = shared_scales(down, format) if shared else (subquad.quantise(down.t(), format), None)
    up = subquad.quantise(up, format)
    clean = sample.with_options(threshold=0.0).replace(
        x=x, w_gate=subquad.quantise(gate, format), w_up=up, w_down=codes, down_scales=scales
    )
    expected, mask = call(clean, return_mask=True)
    assert mask.sum(1).tolist() == [64, 1, 64] and expected.isfinite().all()
    spoilt_up, spoilt_down = up.clone(), (codes if scales is None else scales).clone()
    start = (hidden // 32) * FORMATS[format].code_bytes
    spoilt_up[at, start:].view(torch.float16).fill_(bad)
    (spoilt_down[at // 32] if shared else spoilt_down[at, start:]).view(torch.float16).fill_(bad)
    name = "down_scales" if shared else "w_down"
    for spoilt in (clean.replace(w_up=spoilt_up), clean.replace(**{name: spoilt_down})):
        for tokens in (slice(None), slice(0, 1), slice(1, 2)):
            y = call(spoilt.replace(x=x[tokens]))
            dead = ~mask[tokens, at]
            assert torch.equal(y[dead], expected[tokens][dead])
            assert not y[~dead].isfinite().any()
        for many in (x.repeat(8, 1), x.clone().requires_grad_()):  # products of all rows
            y = call(spoilt.replace(x=many)).detach()
            dead = ~mask[:, at].repeat(len(many) // 3)
            torch.testing.assert_close(y[dead], expected.repeat(len(many) // 3, 1)[dead])
            assert not y[~dead].isfinite().any()


@ALL
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_gate_that_is_not_a_number_is_active(format: str, tokens: int) -> None:
    sample = draw(Sampler(), "nan", tokens, 64, 64, format=format, threshold=float("inf"))
    w_gate = sample["w_gate"].clone()
    w_gate[5, -2:].view(torch.float16).fill_(torch.nan)
    y, mask = call(sample.replace(w_gate=w_gate), return_mask=True)
    assert mask.nonzero()[:, 1].tolist() == [5] * tokens and y.isnan().all()
    y, mask = call(sample, return_mask=True)
    assert not mask.any() and not y.any()


@ALL
@pytest.mark.parametrize("tokens", [1, 5])
def test_threads_do_not_change_results(format: str, tokens: int) -> None:
    sample = draw(Sampler(), "threads", tokens, 96, 1100, format=format)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(call(sample))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("tokens", [1, 17])
def test_codes_with_any_strides(tokens: int) -> None:
    sample = draw(Sampler(), "strided", tokens, 64, 64, threshold=0.1)
    wide = {name: torch.cat([sample[name], sample[name]], 1)[:, : sample[name].shape[1]] for name in WEIGHTS[:3]}
    assert torch.equal(call(sample.replace(**wide)), call(sample))
