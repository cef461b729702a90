"""What the tiles of the Triton kernels make special: chunks of queries, tiles of spans that are far apart, pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import subquad
from subquad.ops.span_attention import attend
from subquad.reference import span_attention as reference
from subquad.testing import Sampler, backend_params

Results = list[torch.Tensor]


def results(backend: str, args: dict[str, torch.Tensor], **options: Any) -> Results:
    """Results, and gradients of all that is floating-point."""
    leaves = {n: x.clone().requires_grad_() if x.is_floating_point() else x for n, x in args.items()}
    out, lse = subquad.span_attention(**leaves, **options, backend=backend)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    seen = lse != -torch.inf
    loss = (out * upstream).sum() + lse[seen].sum()
    grads = torch.autograd.grad(loss, [x for x in leaves.values() if x.is_floating_point()])
    return [out.detach(), lse[seen].detach(), *grads]


def close(found: Results, expected: Results) -> None:
    for actual, right in zip(found, expected, strict=True):
        assert float((actual.double() - right).abs().max()) <= 2e-5 * max(1.0, float(right.abs().max()))


def draw(tokens: int, keys: int, heads: int, spans: int, start: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
    sampler = Sampler()
    args = {"q": sampler.normal(1, tokens, heads, 8)}
    args |= {name: sampler.normal(1, keys, 1, 8) for name in "kv"}
    start = start.expand(1, tokens, heads, spans).int().contiguous()
    return args | {"start": start, "end": start + length - 1}


def wide(args: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: x.double() if x.is_floating_point() else x for n, x in args.items()}


@pytest.mark.quick
@backend_params("span_attention", "triton")
@pytest.mark.parametrize("gated", [True, False])
def test_chunks_of_queries(gated: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few queries at a time give what all at once give."""
    from subquad.kernels import span_attention as kernels

    start = torch.arange(13)[None, :, None, None] * 2 + torch.tensor([0, 9])
    args = draw(13, 50, 2, 2, start, 11)
    options = {"gate": torch.rand(1, 13, 2, 2)} if gated else {"joint": True}
    at_once = results(backend, args, **options)
    sizes: list[int] = []
    sort = kernels._sorted

    def counted(start: torch.Tensor, *rest: Any) -> Any:
        sizes.append(start.shape[1])
        return sort(start, *rest)

    monkeypatch.setattr(kernels, "SCRATCH", 5 * 2 * 2 * 60)
    monkeypatch.setattr(kernels, "_sorted", counted)
    in_chunks = results(backend, args, **options)
    assert sizes == [5, 5, 3, 13, 5, 5, 3]
    close(in_chunks, at_once)


@pytest.mark.quick
@backend_params("span_attention", "triton")
def test_tiles_jump_over_blocks_that_no_row_needs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two far groups of spans in one tile: four of 32 blocks are loaded."""
    from subquad.kernels.span_attention import forward

    start = torch.tensor([3, 900]) + torch.arange(4)[None, :, None, None]
    args = draw(4, 1000, 1, 2, start, 40)
    close(results(backend, args, joint=True), results("reference", wide(args), joint=True))
    visited: list[int] = []
    load = forward.load_block

    def counted(x: Any, place: Any, cols: Any, *rest: Any) -> Any:
        visited.append(int(cols.handle.data.min()))
        return load(x, place, cols, *rest)

    monkeypatch.setattr(forward, "load_block", counted)
    subquad.span_attention(**args, joint=True, backend=backend)
    assert visited == [block for block in (0, 32, 896, 928) for _ in "kv"]


@pytest.mark.quick
@backend_params("span_attention", "triton")
@pytest.mark.parametrize("gated", [True, False])
def test_pages_that_lie_anywhere(gated: bool, backend: str) -> None:
    """Rows in pages of a shuffled pool, whose other pages are NaN, with a base and a mask."""
    sampler = Sampler()
    q, k, v = sampler.normal(2, 3, 4, 8), sampler.normal(2, 48, 2, 8), sampler.normal(2, 48, 2, 12)
    table = torch.tensor([[5, 0, 7], [2, 6, 1]], dtype=torch.int32)
    pools = [torch.full((9, 16, 2, x.shape[3]), float("nan")) for x in (k, v)]
    for pool, x in zip(pools, (k, v), strict=True):
        pool[table.long()] = x.unflatten(1, (3, 16))
    start = sampler.integers(0, 48, 2, 3, 4, 2).int()
    rest = (
        start, start + 20, torch.rand(2, 3, 4, 2) if gated else None, sampler.normal(2, 3, 4, 12), sampler.normal(2, 3, 4),
        torch.arange(48) % torch.tensor([[5], [7]]) != 0,
    )  # fmt: skip
    with torch.no_grad():
        found = attend(q, *pools, *rest, table, 0.5, backend)
        expected = reference.span_attention(q, k, v, *rest, None, 0.5)
    for actual, right in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, right, atol=1e-5, rtol=1e-5)


@pytest.mark.quick
@backend_params("span_attention", "native", "triton")
def test_pages_that_are_not_there(backend: str) -> None:
    """They count as the nearest that are."""
    sampler = Sampler()
    q, k, v = sampler.normal(2, 3, 2, 8), sampler.normal(4, 16, 1, 8), sampler.normal(4, 16, 1, 8)
    table = torch.tensor([[1, 3], [-7, 2**31 - 1]], dtype=torch.int32)
    start = sampler.integers(0, 32, 2, 3, 2, 2).int()
    rest = (start, start + 9, None, None, None, None, table, 0.5)
    with torch.no_grad():
        found, expected = attend(q, k, v, *rest, backend), reference.span_attention(q, k, v, *rest)
    for actual, right in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, right, atol=1e-5, rtol=1e-5)


@pytest.mark.quick
@backend_params("span_attention", "triton")
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_reaches_what_sees_it_alone(where: str, backend: str) -> None:
    """Rows of one tile see different keys, so that the product of a tile holds pairs that do not see each other."""
    args = draw(30, 70, 1, 1, torch.arange(30)[None, :, None, None] * 2, 9)
    at = 10 if where == "q" else 25
    args[where][0, at, 0, 5] = float("nan")
    leaves = {n: args[n].requires_grad_() for n in "qkv"}
    out, _ = subquad.span_attention(**args, joint=True, backend=backend)
    seen = (args["start"][0, :, 0] <= torch.arange(70)) & (torch.arange(70) <= args["end"][0, :, 0])  # [T, N]
    reached = torch.arange(30) == at if where == "q" else seen[:, at]
    assert torch.equal(out.isnan().any(-1)[0, :, 0], reached)
    grads = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
    assert not grads[0][0, ~reached].isnan().any()
    hidden = ~seen[reached].any(0)
    assert not grads[1][0, hidden].isnan().any() and not grads[2][0, hidden].isnan().any()


@pytest.mark.quick
@backend_params("span_attention", "triton")
def test_spans_of_very_different_lengths(backend: str) -> None:
    """Gradients of a key that many spans see which end far behind it, or behind the last key, next to short ones."""
    sampler = Sampler()
    args = draw(40, 320, 2, 2, torch.zeros(1, 1, 1, 1), 1)  # the last block is full
    args["start"] = sampler.integers(-3, 310, 1, 40, 2, 2).int()
    args["end"] = torch.where(args["start"] % 3 == 0, args["start"] + 3, 319 + args["start"] % 2 * 9).int()
    gate = torch.rand(1, 40, 2, 2)
    close(results(backend, args | {"gate": gate}), results("reference", wide(args | {"gate": gate})))
