"""Attention to spans, forward: many tiles, holes, bases, pages, threads, every instruction set, and what must not be seen."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from subquad.ops.span_attention import attend
from subquad.testing import Sampler, assert_close, assert_same_bits, backend_params

BACKENDS = ("native",)
TILE = 64  # keys that are loaded at once
SCALE = 0.3
LIMIT = {torch.float32: 3e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
SHAPES = {"few": 2, "many": 70}  # queries: spans in pieces, or tiles with all pairs that see them


@dataclass(frozen=True)
class Call:
    """Arguments of the operator."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    gate: torch.Tensor | None = None
    base_out: torch.Tensor | None = None
    base_lse: torch.Tensor | None = None
    key_mask: torch.Tensor | None = None
    block_table: torch.Tensor | None = None

    def run(self, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        return attend(*vars(self).values(), SCALE, backend)

    def oracle(self) -> tuple[torch.Tensor, torch.Tensor]:
        wide = {
            name: x.double()
            for name, x in vars(self).items()
            if isinstance(x, torch.Tensor) and x.dtype.is_floating_point
        }
        return replace(self, **wide).run("reference")


def draw(
    tokens: int,
    keys: int = 700,
    heads: int = 4,
    kv_heads: int = 2,
    d: int = 40,
    dv: int = 24,
    spans: int = 3,
    longest: int = 300,
    *,
    batch: int = 2,
    gated: bool = True,
    based: bool = True,
    masked: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Call:
    """Random spans, some outside, some empty; every third base is one of no key, and never read."""
    sampler = Sampler(dtype)
    shape = (batch, tokens, heads, spans)
    start = sampler.integers(-3, keys + 3, *shape)
    call = Call(
        sampler.normal(batch, tokens, heads, d),
        sampler.normal(batch, keys, kv_heads, d),
        sampler.normal(batch, keys, kv_heads, dv),
        start.int(),
        (start + sampler.integers(-1, longest, *shape)).int(),
        sampler.normal(*shape).float() if gated else None,
    )
    if based:
        out, lse = sampler.normal(batch, tokens, heads, dv), sampler.normal(batch, tokens, heads).float()
        out.view(-1, dv)[::3] = torch.nan
        lse.view(-1)[::3] = -torch.inf
        call = replace(call, base_out=out, base_lse=lse)
    return replace(call, key_mask=sampler.integers(0, 4, batch, keys) > 0) if masked else call


def assert_is_reference(call: Call, backend: str) -> None:
    (out, lse), expected = call.run(backend), call.oracle()
    limit = LIMIT[call.q.dtype]
    assert_close(out, expected[0], limit, "out")
    assert_close(lse, expected[1], limit, "lse")


def assert_same(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor], what: str = "") -> None:
    assert_same_bits(a[0], b[0], f"out {what}")
    assert_same_bits(a[1], b[1], f"lse {what}")


@backend_params("span_attention", *BACKENDS)
@pytest.mark.parametrize("dtype", list(LIMIT), ids=str)
@pytest.mark.parametrize("tokens", list(SHAPES.values()), ids=list(SHAPES))
def test_is_the_reference(backend: str, dtype: torch.dtype, tokens: int) -> None:
    for kind in ({}, {"masked": True}, {"gated": False}, {"based": False, "masked": True, "gated": False}):
        assert_is_reference(draw(tokens, dtype=dtype, **kind), backend)


@backend_params("span_attention", *BACKENDS)
@pytest.mark.parametrize("tokens", list(SHAPES.values()), ids=list(SHAPES))
def test_widths_and_groups(backend: str, tokens: int) -> None:
    for d, dv, heads, kv_heads, spans in ((1, 1, 3, 1, 1), (17, 256, 7, 1, 2), (256, 5, 2, 2, 8), (128, 128, 16, 1, 3)):
        assert_is_reference(draw(tokens, 200, heads, kv_heads, d, dv, spans, 150), backend)


@backend_params("span_attention", *BACKENDS)
@pytest.mark.parametrize("tokens", list(SHAPES.values()), ids=list(SHAPES))
def test_every_edge_of_a_tile(backend: str, tokens: int) -> None:
    """Spans of each length around one and two tiles, from each place in a tile; one of them is alone in its tile."""
    call = draw(tokens, 5 * TILE, spans=1, batch=1, based=False)
    count = call.start.numel()
    for length in (1, 2, TILE - 1, TILE, TILE + 1, 2 * TILE):
        start = (torch.arange(count) * 5 % (3 * TILE)).view_as(call.start).int()
        start[0, 0, 0, 0] = 5 * TILE - length
        assert_is_reference(replace(call, start=start, end=start + (length - 1)), backend)


@backend_params("span_attention", *BACKENDS)
def test_a_span_of_very_many_keys(backend: str) -> None:
    """More pieces than a span is cut into: they become longer."""
    call = draw(1, 40_000, 1, 1, 8, 8, 2, batch=1)
    whole = replace(call, start=torch.zeros_like(call.start), end=torch.full_like(call.end, 2**31 - 1))
    assert_is_reference(whole, backend)


@backend_params("span_attention", *BACKENDS)
@pytest.mark.parametrize("tokens", list(SHAPES.values()), ids=list(SHAPES))
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_seen_does_not_matter(backend: str, tokens: int, name: str, value: float) -> None:
    """Masked keys, and keys beyond the ends of a span whose tile others see, may hold anything."""
    call = draw(tokens, 6 * TILE, batch=1, masked=True, based=False)
    assert call.key_mask is not None
    holes = call.key_mask[0].logical_not().nonzero()[:, 0]
    bad = getattr(call, name).clone()
    bad[:, holes] = value
    assert_same(replace(call, **{name: bad}).run(backend), call.run(backend), "masked")
    call = replace(call, key_mask=None)
    forbidden = torch.arange(6 * TILE) % 50 == 49
    begin = torch.arange(call.start.numel()).view_as(call.start) % 6 * 50
    call = replace(call, start=begin.int(), end=(begin + 48).int())
    bad = getattr(call, name).clone()
    bad[:, forbidden] = value
    actual, expected = replace(call, **{name: bad}).run(backend), call.run(backend)
    assert_close(actual[0], expected[0], 1e-6, "out")
    assert_close(actual[1], expected[1], 1e-6, "lse")


@backend_params("span_attention", *BACKENDS)
@pytest.mark.parametrize("tokens", list(SHAPES.values()), ids=list(SHAPES))
def test_a_bad_key_spoils_the_rows_that_see_it(backend: str, tokens: int) -> None:
    for name in ("k", "v"):
        call = draw(tokens, batch=1, based=False)
        key = int(call.start[0, 0, :2].max())
        bad = getattr(call, name).clone()
        bad[0, key, 0] = torch.nan
        spoiled = replace(call, **{name: bad}).run(backend)[0].isnan().any(-1)
        sees = ((call.start <= key) & (call.end >= key)).any(-1)
        sees[:, :, 2:] = False  # the other key head's
        assert sees.any()
        assert torch.equal(spoiled, sees), name


@backend_params("span_attention", *BACKENDS)
@pytest.mark.parametrize("tokens", list(SHAPES.values()), ids=list(SHAPES))
def test_pages(backend: str, tokens: int) -> None:
    """Rows in pages of any order have the same bits as rows in one piece."""
    for page in (1, 16, 128):
        call = draw(tokens, 384, batch=2, masked=True)
        count = 384 // page
        table = torch.randperm(2 * count, generator=torch.Generator().manual_seed(0)).view(2, count)
        pages = {}
        for name in ("k", "v"):
            x = getattr(call, name)
            pages[name] = x.new_full((2 * count, page, *x.shape[2:]), torch.nan)
            pages[name][table.flatten()] = x.reshape(2 * count, page, *x.shape[2:])
        paged = replace(call, block_table=table.int(), **pages)
        with torch.no_grad():
            assert_same(paged.run(backend), call.run(backend), f"pages of {page}")


@backend_params("span_attention", *BACKENDS)
@pytest.mark.parametrize("tokens", [1, 2, 300])
def test_same_bits_on_any_number_of_threads(backend: str, tokens: int) -> None:
    """Though the queries of an item are as many as the threads need."""
    before = torch.get_num_threads()
    for dtype in LIMIT:
        call = draw(tokens, 3000, longest=1500, masked=True, dtype=dtype)
        try:
            torch.set_num_threads(1)
            expected = call.run(backend)
            for threads in (2, 3, 7):
                torch.set_num_threads(threads)
                assert_same(call.run(backend), expected, f"{threads} threads")
        finally:
            torch.set_num_threads(before)


@backend_params("span_attention", *BACKENDS)
@pytest.mark.parametrize("tokens", list(SHAPES.values()), ids=list(SHAPES))
def test_a_row_does_not_depend_on_its_company(backend: str, tokens: int) -> None:
    """Other rows' spans, and other sequences of the batch, are none of its business."""
    call = draw(tokens)
    expected = call.run(backend)
    alone = {name: x[1:] for name, x in vars(call).items() if x is not None}
    assert_same(replace(call, **alone).run(backend), (expected[0][1:], expected[1][1:]), "batch")
    start = call.start.clone()
    start[:, 1:] = 5
    others = replace(call, start=start, end=torch.where(start == call.start, call.end, 90)).run(backend)
    assert_same((others[0][:, :1], others[1][:, :1]), (expected[0][:, :1], expected[1][:, :1]), "spans")


@backend_params("span_attention", *BACKENDS)
@pytest.mark.parametrize("tokens", list(SHAPES.values()), ids=list(SHAPES))
def test_large_scores(backend: str, tokens: int) -> None:
    """Maxima that grow from tile to tile, and far beyond what e^x holds."""
    call = draw(tokens, d=1, batch=1, based=False)
    k = torch.linspace(-400, 400, call.k.shape[1])[None, :, None, None].expand_as(call.k)
    assert_is_reference(replace(call, q=call.q.sign() * 30, k=k), backend)


@backend_params("span_attention", *BACKENDS)
@pytest.mark.parametrize("tokens", list(SHAPES.values()), ids=list(SHAPES))
def test_offsets_beyond_32_bits(backend: str, tokens: int) -> None:
    """Rows that lie gigabytes apart; what lies between them is never touched."""
    call = draw(tokens, 5, 2, 1, 8, 8, longest=5, batch=1, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(False)  # poisoning would touch it
    far = {}
    for name in ("k", "v"):
        x = getattr(call, name)
        stride = 2**31 // 3  # in elements: the last row lies beyond 2^31
        memory = torch.empty(4 * stride + 8, dtype=x.dtype)
        far[name] = memory.as_strided(x.shape, (0, stride, 8, 1))
        far[name].copy_(x)
    assert_same(replace(call, **far).run(backend), call.run(backend))
