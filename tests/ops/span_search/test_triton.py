"""What the tiles of the Triton kernels make special: several queries and blocks of stripes, pages, anchors in several blocks."""

from __future__ import annotations

import pytest
import torch

import subquad
from subquad import SuperlinearConfig
from subquad.testing import Sampler, backend_params
from subquad.testing.specs.span_search import quarters


def same(found: subquad.SpanSearch, expected: subquad.SpanSearch) -> None:
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert torch.equal(a, b.to(a.dtype)), name


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


@backend_params("span_search", "triton")
def test_stripes_that_cannot_be_chosen(backend: str) -> None:
    """NaN, infinite and equal scores over several blocks of stripes, from queries in any order."""
    config = SuperlinearConfig(sw_index=0, num_spans=5, forward_factor=0.5)
    q, k = torch.ones(1, 20, 2, 4), torch.zeros(1, 150, 1, 4)
    k[0, 40:60], k[0, 13], k[0, 77], k[0, 90] = float("nan"), float("inf"), float("-inf"), -0.0
    position = torch.randint(0, 150, (20,), generator=torch.Generator().manual_seed(0))
    found = subquad.span_search(q, k, config=config, cache_position=position, backend=backend)
    same(found, subquad.span_search(q, k, config=config, cache_position=position, backend="reference"))
    assert not found.score.isnan().any() and (found.score == torch.inf).any()


@backend_params("span_search", "triton")
def test_gradient_of_one_key_in_many_tiles(backend: str) -> None:
    """All queries choose the same key, more of them than a tile has rows; a query of NaN reaches no other key."""
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
