"""The search for spans, native: many stripes, threads, pages, ties between ranges of stripes, gradients summed in order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import subquad
from subquad import SpanSearch, SuperlinearConfig
from subquad.testing import Sampler, assert_close, assert_same_bits, backend_params

BACKENDS = ("native",)
README = SuperlinearConfig(sw_index=3, backward_factor=3.0, forward_factor=1.0)


def eighths(sampler: Sampler, *shape: int) -> torch.Tensor:
    """Small multiples of 1/4, whose products are exact: there are ties, and every backend sees the same ones."""
    return (sampler.normal(*shape) * 4).round().clamp(-16, 16) / 4


def draw(tokens: int, keys: int, dtype: torch.dtype = torch.float32, d: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    sampler = Sampler(dtype)
    return eighths(sampler, 2, tokens, 6, d), eighths(sampler, 2, keys, 2, d)


def assert_same(actual: SpanSearch, expected: SpanSearch, what: str = "") -> None:
    for name in SpanSearch._fields:
        assert_same_bits(getattr(actual, name), getattr(expected, name), f"{name} {what}")


@pytest.fixture
def thread_counts() -> Iterator[tuple[int, ...]]:
    before = torch.get_num_threads()
    yield 1, 2, 3, 7
    torch.set_num_threads(before)


@backend_params("span_search", *BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 150])
def test_many_stripes(backend: str, dtype: torch.dtype, tokens: int) -> None:
    """Several ranges of stripes; 300 keys of their own value each, so that the search has many ties."""
    q, k = draw(tokens, 150_000, dtype)
    k = k[:, torch.arange(150_000) % 300]
    for config in (README, SuperlinearConfig(num_spans=8), SuperlinearConfig(route_per="group", num_spans=2)):
        mask = torch.arange(150_000).expand(2, -1) % 7 != 3
        mask[1, :60_000] = False
        for keep in (None, mask):
            arguments = {"config": config, "attention_mask": keep}
            expected = subquad.span_search(q, k, **arguments, backend="reference")
            assert_same(subquad.span_search(q, k, **arguments, backend=backend), expected)


@backend_params("span_search", *BACKENDS)
def test_same_bits_on_any_number_of_threads(backend: str, thread_counts: tuple[int, ...]) -> None:
    sampler = Sampler()
    for tokens in (1, 200, 2500):
        q, k = sampler.normal(1, tokens, 4, 40), sampler.normal(1, 60_000, 2, 40)
        q.requires_grad_(), k.requires_grad_()
        found = []
        for threads in thread_counts:
            torch.set_num_threads(threads)
            result = subquad.span_search(q, k, config=README, backend=backend)
            score = torch.where(result.anchor < 0, 0.0, result.score)
            found.append((result, torch.autograd.grad((score * score.detach()).sum(), (q, k))))
        for result, grads in found[1:]:
            assert_same(result, found[0][0], f"{tokens} tokens")
            assert_same_bits(grads[0], found[0][1][0], f"dq, {tokens} tokens")
            assert_same_bits(grads[1], found[0][1][1], f"dk, {tokens} tokens")


@backend_params("span_search", *BACKENDS)
@pytest.mark.parametrize("tokens", [1, 100])
def test_pages(backend: str, tokens: int) -> None:
    """Keys in pages of any order have the same bits as keys in one piece."""
    for page in (1, 16, 1024):
        q, k = draw(tokens, 2048)
        count = 2048 // page
        table = torch.randperm(2 * count, generator=torch.Generator().manual_seed(0)).view(2, count)
        pages = k.new_full((2 * count, page, *k.shape[2:]), torch.nan)
        pages[table.flatten()] = k.reshape(2 * count, page, *k.shape[2:])
        with torch.no_grad():
            paged = subquad.span_search(q, pages, config=README, block_table=table.int(), backend=backend)
            assert_same(paged, subquad.span_search(q, k, config=README, backend=backend), f"pages of {page}")


@backend_params("span_search", *BACKENDS)
@pytest.mark.parametrize("tokens", [1, 100])
def test_what_cannot_be_chosen(backend: str, tokens: int) -> None:
    """NaN and -inf never are, +inf comes first; of equal stripes the farther ones come first."""
    q, k = draw(tokens, 300)
    q, k = torch.ones_like(q), torch.ones_like(k)
    config = SuperlinearConfig()
    anchor = subquad.span_search(q, k, config=config, backend=backend).anchor[:, -1]
    assert (anchor == torch.tensor([11, 44, 75])).all(), anchor  # 300 - 17^2, 16^2, 15^2
    k[:, 11], k[:, 75], k[:, 299] = torch.nan, -torch.inf, torch.inf
    anchor = subquad.span_search(q, k, config=config, backend=backend).anchor[:, -1]
    assert (anchor == torch.tensor([299, 44, 104])).all(), anchor


@backend_params("span_search", *BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_a_key_that_all_choose(backend: str, dtype: torch.dtype) -> None:
    """Long sums into one row of dk, and rows that nobody chose."""
    sampler = Sampler(dtype)
    q, k = eighths(sampler, 1, 400, 4, 24).abs() + 1, eighths(sampler, 1, 400, 2, 24)
    k[:, ::7] += 2
    results = {}
    for name in (backend, "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k)]
        found = subquad.span_search(*leaves, config=SuperlinearConfig(search_scale=0.5), backend=name)
        weight = torch.linspace(-1, 1, found.score.numel()).view_as(found.score)
        score = torch.where(found.anchor < 0, 0.0, found.score)
        results[name] = (found, torch.autograd.grad((score * weight).sum(), leaves))
    assert_same(results[backend][0], results["reference"][0])
    for i, name in enumerate(("dq", "dk")):
        limit = 1e-6 if dtype is torch.float32 else 4e-3
        assert_close(results[backend][1][i], results["reference"][1][i], limit, name)
