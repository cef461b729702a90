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
