"""The search where it goes wrong easily: planted keys, ties, NaN, holes, any positions, packed rows, pages, far offsets."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import subquad
from subquad import SuperlinearConfig
from subquad.testing import backend_params
from subquad.testing.compare import assert_same_bits

from .dense import README, RELEASED, every_backend, exact, search, stacked


def agrees(found: subquad.SpanSearch, expected: Any) -> None:
    """Every place, and the scores but for rounding."""
    for name in ("anchor", "start", "end"):
        assert torch.equal(getattr(found, name).long(), stacked(expected, name)), name
    torch.testing.assert_close(found.score.double(), stacked(expected, "score").double(), atol=1e-5, rtol=1e-5)


def drawn(batch: int, tokens: int, keys: int, heads: int, kv_heads: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    return exact(batch, tokens, heads, d), exact(batch, keys, kv_heads, d)


# --- 1, 2: lengths and offsets ----------------------------------------


@every_backend
@pytest.mark.parametrize("t", [25, 100, 121, 225, 400])
def test_lengths_at_squares(t: int, backend: str) -> None:
    """The span begins at a - 2 sqrt(t), not one before."""
    q, k = drawn(1, 1, t, 1, 1, 4)
    found = subquad.span_search(q, k, backend=backend)
    root = round(t**0.5)
    assert root * root == t
    assert torch.equal(found.start, (found.anchor - 2 * root).clamp(min=0))
    agrees(found, search(q, k, SuperlinearConfig()))


@every_backend
@pytest.mark.parametrize(("i", "offset"), [(291, 30185), (360, 44444), (381, 49270), (410, 56300), (416, 57807)])
def test_planted_keys_of_a_fractional_power(i: int, offset: int, backend: str) -> None:
    """One large key at the place where double precision has the stripe, larger ones beside it that are no stripes."""
    tokens = offset + 500
    k = torch.zeros(1, tokens, 1, 4)
    anchor = tokens - offset
    k[0, anchor - 30 : anchor + 31, 0, 0] = 9.0
    k[0, anchor, 0, 0] = 7.0
    stripes = tokens - subquad.stripe_offsets(tokens, RELEASED)
    k[0, stripes, 0, 0] = torch.where(stripes == anchor, 7.0, 0.0)
    q = torch.ones(1, 1, 1, 4)
    found = subquad.span_search(q, k, config=RELEASED, backend=backend)
    assert found.anchor[0, 0, 0, 0] == anchor and found.score[0, 0, 0, 0] == 7.0
    whole = subquad.span_search(q, k, config=RELEASED, cache_position=torch.tensor([tokens - 1]), backend=backend)
    assert torch.equal(whole.anchor, found.anchor)


# --- 3, 4: short rows, ends ----------------------------------------


@every_backend
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("sw_index", [0, 1, 2])
def test_short_rows(tokens: int, sw_index: int, backend: str) -> None:
    config = SuperlinearConfig(sw_index=sw_index, num_spans=3, forward_factor=1.0)
    q, k = drawn(2, tokens, tokens, 2, 1, 8)
    agrees(subquad.span_search(q, k, config=config, backend=backend), search(q, k, config))


@every_backend
def test_spans_end_before_the_window(backend: str) -> None:
    config = SuperlinearConfig(sw_index=2, forward_factor=5.0, num_spans=8)
    q, k = drawn(1, 60, 60, 2, 2, 8)
    found = subquad.span_search(q, k, config=config, backend=backend)
    last = torch.arange(60)[None, :, None, None] - config.window_len()
    assert (found.end <= torch.where(found.anchor < 0, -1, last)).all()
    assert (found.end == last)[found.anchor >= 0].any()
    agrees(found, search(q, k, config))


# --- 5: padding and holes ----------------------------------------


@every_backend
@pytest.mark.parametrize("route_per", ["head", "group"])
def test_padding_holes_and_empty_rows(route_per: str, backend: str) -> None:
    """A row of its own padding each, a hole on what would be chosen, a row without tokens."""
    config = SuperlinearConfig(sw_index=1, forward_factor=0.5, route_per=route_per)
    q, k = drawn(4, 40, 40, 4, 2, 8)
    keep = torch.ones(4, 40, dtype=torch.bool)
    keep[1, :11] = keep[2, :23] = keep[3] = False
    best = subquad.span_search(q, k, config=config, backend="reference").anchor[:, -1, 0, 0]
    keep[torch.arange(4), best.long()] = False
    found = subquad.span_search(q, k, config=config, attention_mask=keep, backend=backend)
    agrees(found, search(q, k, config, keep=keep))
    assert (found.anchor[3] == -1).all() and (found.score[3] == -torch.inf).all()


# --- 6: ties, NaN, infinities ----------------------------------------


@every_backend
def test_equal_scores_choose_the_farther(backend: str) -> None:
    q, k = torch.ones(1, 30, 1, 4), torch.ones(1, 30, 1, 4)
    found = subquad.span_search(q, k, backend=backend)
    assert found.anchor[0, 29, 0].tolist() == [5, 14, 21]
    agrees(found, search(q, k, SuperlinearConfig()))


@every_backend
@pytest.mark.parametrize("num_spans", [1, 3, 8])
def test_duplicated_keys(num_spans: int, backend: str) -> None:
    """Few different scores: every slot is a tie."""
    config = SuperlinearConfig(num_spans=num_spans)
    q, k = torch.ones(1, 150, 2, 4), torch.randint(0, 3, (1, 150, 1, 1)).float().expand(-1, -1, -1, 4)
    agrees(subquad.span_search(q, k, config=config, backend=backend), search(q, k, config))


@every_backend
def test_nan_and_infinite_keys(backend: str) -> None:
    q, k = torch.ones(1, 120, 1, 4), torch.randn(1, 120, 1, 4)
    stripes = (119 + 1 - torch.arange(1, 11) ** 2).tolist()
    k[0, stripes[4], 0, 1] = torch.nan
    k[0, stripes[6], 0] = torch.inf
    k[0, stripes[7], 0] = -torch.inf
    found = subquad.span_search(q, k, backend=backend)
    anchors, scores = found.anchor[0, -1, 0].tolist(), found.score[0, -1, 0]
    assert anchors[0] == stripes[6] and scores[0] == torch.inf
    assert stripes[4] not in anchors and stripes[7] not in anchors and not found.score.isnan().any()
    everything = torch.full((1, 120, 1, 4), torch.nan)
    assert (subquad.span_search(q, everything, backend=backend).anchor == -1).all()


# --- 9: positions, strides, nothing ----------------------------------------


@every_backend
def test_positions_in_any_order(backend: str) -> None:
    """Unsorted, repeated, far apart, of their own in every row; keys beyond the last do not exist."""
    q, k = drawn(2, 6, 90, 4, 2, 8)
    positions = torch.tensor([[9, 3, 3, 70, 0, 41], [0, 1, 88, 88, 2, 60]])
    for value in (positions, positions[0], positions.int()):
        found = subquad.span_search(q, k, config=README, cache_position=value, backend=backend)
        agrees(found, search(q, k, README, value.expand(2, 6)))
    garbage = k.clone()
    garbage[0, 71:], garbage[1, 89:] = torch.nan, torch.nan
    again = subquad.span_search(q, garbage, config=README, cache_position=positions, backend=backend)
    for a, b in zip(
        again, subquad.span_search(q, k, config=README, cache_position=positions, backend=backend), strict=True
    ):
        assert torch.equal(a, b)


@every_backend
def test_strides_and_no_queries(backend: str) -> None:
    q, k = drawn(2, 33, 50, 4, 2, 8)
    expected = subquad.span_search(q, k, config=README, backend=backend)
    transposed = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    for a, b in zip(subquad.span_search(*transposed, config=README, backend=backend), expected, strict=True):
        assert_same_bits(a, b)
    for positions in (None, torch.zeros(0, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int32)):
        none = subquad.span_search(q[:, :0], k, config=README, cache_position=positions, backend=backend)
        assert none.anchor.shape == (2, 0, 4, 3)


# --- 10: shapes, packed rows, pages, offsets ----------------------------------------

SHAPES = [(1, 16, 1), (3, 40, 2), (5, 80, 5), (16, 96, 8), (2, 256, 4)]


@every_backend
@pytest.mark.parametrize(("group", "d", "num_spans"), SHAPES)
def test_groups_widths_and_counts(group: int, d: int, num_spans: int, backend: str) -> None:
    config = SuperlinearConfig(sw_index=1, num_spans=num_spans, forward_factor=1.0)
    q, k = drawn(1, 40, 40, group * 2, 2, d)
    agrees(subquad.span_search(q, k, config=config, backend=backend), search(q, k, config))


@every_backend
def test_packed_rows_of_length_0_and_1(backend: str) -> None:
    bounds = [0, 0, 1, 1, 2, 20, 50]
    q, k = drawn(1, 50, 50, 2, 1, 8)
    found = subquad.span_search(q, k, config=README, cu_seqlens=torch.tensor(bounds), backend=backend)
    firsts = [begin for begin, end in itertools.pairwise(bounds) for _ in range(end - begin)]
    agrees(found, search(q, k, README, firsts=firsts))


@every_backend
def test_fractional_factors_far_out(backend: str) -> None:
    config = SuperlinearConfig(backward_factor=0.3, forward_factor=0.3)
    q, k = drawn(1, 3, 10_795, 1, 1, 4)
    agrees(subquad.span_search(q, k, config=config, backend=backend), search(q, k, config))


@every_backend
def test_pages(backend: str) -> None:
    """In any order; entries behind the last are not read."""
    q, k = drawn(2, 5, 64, 4, 2, 8)
    positions = torch.tensor([[0, 15, 16, 40, 63], [1, 31, 32, 33, 47]])
    expected = subquad.span_search(q, k, config=README, cache_position=positions, backend=backend)
    table = torch.tensor([[3, 0, 6, 2], [7, 5, 1, -1]], dtype=torch.int32)
    pool = torch.full((8, 16, 2, 8), torch.nan)
    for row in range(2):
        for page in range(4):
            if table[row, page] >= 0:
                pool[table[row, page]] = k[row, 16 * page : 16 * page + 16]
    found = subquad.span_search(q, pool, config=README, cache_position=positions, block_table=table, backend=backend)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@backend_params("span_search", "native", "triton", "simt")
def test_offsets_beyond_32_bits(backend: str) -> None:
    """Keys that lie further than 2**31 elements from the first; the memory between them does not exist."""
    q, k = drawn(1, 4, 20, 2, 1, 8)
    expected = subquad.span_search(q, k, config=SuperlinearConfig(), backend=backend)
    torch.use_deterministic_algorithms(False)  # poisoning would touch it
    stride = 2**31 // 19 + 16
    far = torch.empty(19 * stride + 8).as_strided((1, 20, 1, 8), (8, stride, 8, 1)).copy_(k)
    for a, b in zip(subquad.span_search(q, far, config=SuperlinearConfig(), backend=backend), expected, strict=True):
        assert_same_bits(a, b)


# --- gradients ----------------------------------------


@pytest.mark.parametrize("route_per", ["head", "group"])
def test_gradcheck(route_per: str) -> None:
    config = SuperlinearConfig(sw_index=1, search_scale=0.7, route_per=route_per)
    q = torch.randn(1, 12, 4, 3, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 12, 2, 3, dtype=torch.float64, requires_grad=True)

    def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        found = subquad.span_search(q, k, config=config, backend="reference")
        return found.score.masked_fill(found.anchor < 0, 0.0)

    assert torch.autograd.gradcheck(scores, (q, k))


# --- what is refused ----------------------------------------

GOOD: dict[str, Any] = {"q_search": torch.zeros(2, 5, 4, 8), "k": torch.zeros(2, 9, 2, 8)}
PAGED = {"k": torch.zeros(4, 16, 2, 8), "block_table": torch.zeros(2, 2, dtype=torch.int32)}
WRONG: dict[str, tuple[dict[str, Any], str, type[Exception]]] = {
    "no queries": ({"q_search": None}, "q_search", TypeError),
    "queries of integers": ({"q_search": torch.zeros(2, 5, 4, 8).int()}, "q_search", TypeError),
    "queries of three dimensions": ({"q_search": torch.zeros(2, 5, 8)}, "q_search", ValueError),
    "queries too wide": ({"q_search": torch.zeros(2, 5, 4, 257)}, "q_search", ValueError),
    "no keys": ({"k": 3}, "k", TypeError),
    "keys of another dtype": ({"k": torch.zeros(2, 9, 2, 8).half()}, "k", TypeError),
    "keys of another batch": ({"k": torch.zeros(1, 9, 2, 8)}, "k", ValueError),
    "keys of another width": ({"k": torch.zeros(2, 9, 2, 6)}, "k", ValueError),
    "heads that do not divide": ({"k": torch.zeros(2, 9, 3, 8)}, "k", ValueError),
    "fewer keys than queries": ({"k": torch.zeros(2, 4, 2, 8)}, "cache_position", ValueError),
    "config of an int": ({"config": 3}, "config", TypeError),
    "config of a dict": ({"config": {"num_spans": 2}}, "config", TypeError),
    "positions of floats": ({"cache_position": torch.zeros(5)}, "cache_position", TypeError),
    "positions as a list": ({"cache_position": [0, 1, 2, 3, 4]}, "cache_position", TypeError),
    "positions of another length": ({"cache_position": torch.arange(4)}, "cache_position", ValueError),
    "positions beyond the keys": ({"cache_position": torch.arange(5, 10)}, "cache_position", ValueError),
    "positions below 0": ({"cache_position": torch.arange(-1, 4)}, "cache_position", ValueError),
    "a mask of floats": ({"attention_mask": torch.ones(2, 9)}, "attention_mask", TypeError),
    "a mask too short": ({"attention_mask": torch.ones(2, 8).bool()}, "attention_mask", ValueError),
    "bounds and positions": (
        {"cu_seqlens": torch.tensor([0, 5]), "cache_position": torch.arange(5)}, "cu_seqlens", ValueError,
    ),
    "bounds and other keys": ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens", ValueError),
    "pages as a list": ({**PAGED, "block_table": [[0]]}, "block_table", TypeError),
    "pages of int64": ({**PAGED, "block_table": torch.zeros(2, 2).long()}, "block_table", TypeError),
    "pages of another batch": ({**PAGED, "block_table": torch.zeros(3, 2).int()}, "block_table", ValueError),
    "pages that are not there": ({**PAGED, "block_table": torch.full((2, 2), 99).int()}, "block_table", ValueError),
    "pages below -1": ({**PAGED, "block_table": torch.full((2, 2), -2).int()}, "block_table", ValueError),
    "pages of 12": ({**PAGED, "k": torch.zeros(4, 12, 2, 8)}, "k", ValueError),
    "pages with gradients": ({**PAGED, "q_search": torch.zeros(2, 5, 4, 8, requires_grad=True)}, "q_search", ValueError),
    "an unknown backend": ({"backend": "fast"}, "backend", ValueError),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(what: str) -> None:
    changed, name, kind = WRONG[what]
    with pytest.raises(kind, match=f"^{name}: "):
        subquad.span_search(**{**GOOD, "backend": "reference", **changed})
