"""What every backend's kernels must do beside numbers: whose scale reaches whom, and the mask that they say they took."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import subquad
from subquad.testing import backend_params
from subquad.testing.spec import Sample, Sampler
from subquad.testing.specs.quantised_cats_mlp import draw, oracle

SHARED = pytest.mark.parametrize("shared", [False, True], ids=["rows", "shared"])


def call(sample: Sample, backend: str, **options: Any) -> Any:
    args = {name: value for name, value in sample.args.items() if value is not None}
    return subquad.quantised_cats_mlp(**args, **{**sample.kwargs, **options}, backend=backend)


@backend_params("quantised_cats_mlp")
@SHARED
@pytest.mark.parametrize("number", [torch.inf, torch.nan])
@pytest.mark.parametrize("tokens", [1, 6])
def test_a_foreign_scale_reaches_only_tokens_that_use_it(
    backend: str, shared: bool, number: float, tokens: int
) -> None:
    """Of one neuron and 32 channels, or of 32 neurons and one channel."""
    sample = draw(Sampler(), "foreign", 6, 64, 96, shared=shared, fraction=0.97 if shared else 0.6)
    sample = sample.replace(x=sample["x"][:tokens], w_down=sample["w_down"].contiguous())
    y, mask = call(sample, backend, return_mask=True)
    blocks = mask.unflatten(1, (3, 32)).any(2) if shared else mask
    name, channels = ("down_scales", slice(0, 1)) if shared else ("w_down", slice(0, 32))
    reached = []
    for block in range(0, blocks.shape[1], 1 if shared else 7):
        data = sample[name].clone()
        data[block].view(torch.float16)[0 if shared else 32] = number  # behind 64 codes
        got, again = call(sample.replace(**{name: data}), backend, return_mask=True)
        touched = torch.zeros_like(y, dtype=torch.bool)
        touched[:, channels] = blocks[:, block, None]
        assert torch.equal(again, mask)
        torch.testing.assert_close(got[~touched], y[~touched], rtol=1e-5, atol=1e-6)
        assert not got[touched].isfinite().any()
        reached += blocks[:, block].tolist()
    assert True in reached and False in reached


@pytest.mark.quick
@backend_params("quantised_cats_mlp")
@pytest.mark.parametrize("tokens", [2, 9, 20])
def test_the_mask_of_a_union_is_of_the_call(backend: str, tokens: int) -> None:
    sample = draw(Sampler(), "union", tokens, 32, 64, fraction=0.97)
    _, each = call(sample, backend, return_mask=True)
    y, union = call(sample, backend, return_mask=True, mask_mode="union")
    assert torch.equal(union, each.any(0).expand(tokens, 64)) and not torch.equal(union, each)
    wide = sample.to(torch.float64, ("x",)).with_options(mask_mode="union")
    torch.testing.assert_close(y.double(), oracle(**wide.args, **wide.kwargs), rtol=1e-5, atol=1e-5)


@backend_params("quantised_cats_mlp")
def test_a_dense_prefill_is_of_many_tokens_only(backend: str) -> None:
    for tokens, limit in ((3, 4), (4, 4), (5, 4), (16, None)):
        sample = draw(Sampler(), "dense", tokens, 32, 64)
        _, mask = call(sample, backend, return_mask=True, prefill="dense", max_sparse_tokens=limit)
        assert bool(mask.all()) == (tokens > (limit or 16))
