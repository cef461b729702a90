"""What the tiles of the Triton kernels make special: several queries and blocks of stripes, pages, anchors in several blocks."""

from __future__ import annotations

import pytest
import torch

import subquad
from subquad import SuperlinearConfig
from subquad.ops import _call
from subquad.reference import span_search as reference
from subquad.testing import Sampler, backend_params
from subquad.testing.specs.span_search import quarters


def same(found: subquad.SpanSearch, expected: subquad.SpanSearch) -> None:
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert torch.equal(a, b.to(a.dtype)), name


@pytest.mark.quick
@backend_params("span_search", "triton")
@pytest.mark.parametrize("route", ["head", "group"])
def test_pages_that_lie_anywhere(route: str, backend: str) -> None:
    """Rows in pages of a shuffled pool, whose other pages are NaN, choose what rows one after the other choose."""
    config = SuperlinearConfig(sw_index=1, num_spans=3, route_per=route)
    sampler = Sampler()
    q, k = quarters(sampler, 2, 3, 4, 8), quarters(sampler, 2, 24, 2, 8)
    table = torch.tensor([[5, 0, 7], [2, 6, 1]], dtype=torch.int32)
    pool = torch.full((9, 8, 2, 8), float("nan"))
    pool[table.long()] = k.unflatten(1, (3, 8))
    position = torch.tensor([[23, 4, 11], [20, 23, 0]])
    options = {"config": config, "cache_position": position}
    found = subquad.span_search(q, pool, block_table=table, backend=backend, **options)
    same(found, subquad.span_search(q, k, backend="reference", **options))


@pytest.mark.quick
@backend_params("span_search", "triton")
def test_stripes_that_cannot_be_chosen(backend: str) -> None:
    """NaN, infinite and equal scores over several blocks of stripes, from queries in any order."""
    config = SuperlinearConfig(sw_index=0, num_spans=5, forward_factor=0.5)
    q, k = torch.ones(2, 20, 2, 4), torch.zeros(2, 150, 1, 4)
    k[:, 40:60], k[:, 13], k[:, 77], k[:, 90] = float("nan"), float("inf"), float("-inf"), -0.0
    position = torch.randint(0, 150, (20,), generator=torch.Generator().manual_seed(0))
    keep = torch.arange(150) % torch.tensor([[5], [7]]) != 2  # other holes in each row
    for mask in (None, keep):
        options = {"config": config, "cache_position": position, "attention_mask": mask}
        found = subquad.span_search(q, k, backend=backend, **options)
        same(found, subquad.span_search(q, k, backend="reference", **options))
        assert not found.score.isnan().any() and (found.score == torch.inf).any()


@pytest.mark.quick
@backend_params("span_search", "native", "triton")
def test_zeros_of_either_sign_are_equal(backend: str) -> None:
    """Products that are too small for float32, after the scale: the farther stripe is chosen."""
    q, k = torch.ones(1, 1, 1, 4), torch.full((1, 100, 1, 4), 1e-30)
    k[:, ::2] *= -1
    config = SuperlinearConfig(num_spans=4, search_scale=1e-20)
    found = subquad.span_search(q, k, config=config, backend=backend)
    assert found.anchor.flatten().tolist() == [0, 19, 36, 51] and (found.score == 0).all()


@pytest.mark.quick
@backend_params("span_search", "native", "triton")
def test_three_heads_choose_together(backend: str) -> None:
    """A tile has a row for a fourth, whose score of an infinite key would be NaN; each head keeps its own score."""
    sampler = Sampler()
    q, k = quarters(sampler, 2, 5, 6, 8).abs() + 1, quarters(sampler, 2, 60, 2, 8)
    k[:, 55:57] = torch.inf
    config = SuperlinearConfig(route_per="group")
    found = subquad.span_search(q, k, config=config, backend=backend)
    same(found, subquad.span_search(q, k, config=config, backend="reference"))
    assert (found.score == torch.inf).any() and (found.score[..., 0, 1] != found.score[..., 1, 1]).any()


@pytest.mark.quick
@backend_params("span_search", "native", "triton")
def test_places_are_not_trusted(backend: str) -> None:
    """Positions behind the last key choose among the keys that there are; pages that there are not count as the nearest."""
    sampler = Sampler()
    q, k = quarters(sampler, 2, 3, 2, 8), quarters(sampler, 4, 16, 1, 8)
    table = torch.tensor([[1, 3], [-7, 2**31 - 1]], dtype=torch.int32)
    position = torch.tensor([[40, 31, 5], [600, -1, 31]], dtype=torch.int32)
    reach = (position, torch.zeros_like(position), position, position, position)
    arguments = (q, k, *reach, SuperlinearConfig().offsets(700), None, table, 3, 1.0, False)
    with torch.no_grad():
        found = _call.run("span_search_fwd", backend, arguments, reference.span_search, tokens=3)
        expected = reference.span_search(*arguments)
    for actual, right in zip(found, expected, strict=True):
        assert torch.equal(actual, right.to(actual.dtype))


@pytest.mark.quick
@backend_params("span_search", "triton")
def test_gradient_of_one_key_in_many_tiles(backend: str) -> None:
    """All queries choose the same key, more of them than a tile has rows."""
    q, k = torch.ones(1, 90, 2, 4), torch.zeros(1, 90, 1, 4)
    k[0, 0], k[0, 8], k[0, 70] = 3.0, 2.0, 1.0
    config = SuperlinearConfig(num_spans=2)
    grads = []
    for which in (backend, "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k)]
        score = subquad.span_search(*leaves, config=config, backend=which).score
        upstream = torch.arange(score.numel()).view(score.shape).float() / score.numel()
        grads.append(torch.autograd.grad(score, leaves, upstream))
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.quick
@backend_params("span_search", "native", "triton")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradient_of_a_query_that_is_not_finite(backend: str, value: float) -> None:
    """It reaches the keys that it chose, and no others of their block."""
    q, k = torch.ones(1, 60, 1, 4), torch.ones(1, 60, 1, 4)
    config = SuperlinearConfig(num_spans=2)
    q.requires_grad_(), k.requires_grad_()
    found = subquad.span_search(q, k, config=config, backend=backend)
    q.data[0, 50, 0, 1] = value  # what was chosen stays
    score = found.score.masked_fill(found.anchor < 0, 0.0)
    (grad,) = torch.autograd.grad(score.sum(), (k,))
    chosen = torch.zeros(60, dtype=torch.bool)
    chosen[found.anchor[0, 50, 0].long()] = True
    assert torch.equal(grad.isfinite()[0, :, 0, 1], ~chosen) and grad[..., [0, 2, 3]].isfinite().all()
