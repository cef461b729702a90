"""`span_attention` and `combine_spans` for any selector's spans, by their definition; wrong arguments of the family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import subquad
from subquad import SuperlinearConfig
from subquad.ops.span_attention import attend as operator
from subquad.testing import backend_params

from .dense import attend, error

CLOSE = 2e-6
every_backend = backend_params("span_attention")


def drawn(batch: int = 2, tokens: int = 20, keys: int = 50, spans: int = 3) -> Any:
    """q, k, v, start, end: spans of every kind, empty, outside, overlapping."""
    q, k, v = torch.randn(batch, tokens, 4, 8), torch.randn(batch, keys, 2, 8), torch.randn(batch, keys, 2, 5)
    start = torch.randint(-3, keys + 3, (batch, tokens, 4, spans))
    return q, k, v, start, start + torch.randint(-2, 30, start.shape)


def seen_by(start: torch.Tensor, end: torch.Tensor, keys: int) -> torch.Tensor:
    j = torch.arange(keys)
    return (j >= start[..., None]) & (j <= end[..., None])


def joined(q: Any, k: Any, v: Any, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over all spans, a key as often as spans hold it."""
    out, lse = attend(q, k, v, seen, None)
    total = lse.logsumexp(-1)
    share = torch.exp(lse - total.masked_fill(total == -torch.inf, 0.0)[..., None])
    return (share[..., None] * out).sum(-2), total


@every_backend
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_three_ways_to_combine(window: int, masked: bool, backend: str) -> None:
    q, k, v, start, end = drawn()
    config = SuperlinearConfig(sw_index=window)
    at = torch.arange(30, 50)[None, :, None, None]
    end = torch.minimum(end, at - config.window_len())  # no span reaches into the window
    near = seen_by(at - config.window_len() + 1, at, 50)
    keep = torch.rand(2, 50) > 0.3
    options: dict[str, Any] = {"config": config, "backend": backend}
    if masked:
        options["attention_mask"] = keep
    visible = keep[:, None, None, None] if masked else torch.tensor(True)
    seen = seen_by(start, end, 50) & visible
    out, lse = subquad.span_attention(q, k, v, start, end, **options)
    expected, expected_lse = attend(q, k, v, seen | (near & visible), None)
    assert error(out, expected) < CLOSE
    torch.testing.assert_close(lse.double(), expected_lse, atol=CLOSE, rtol=CLOSE)
    gate = torch.softmax(torch.randn(start.shape), -1)
    mixed, slots = subquad.span_attention(q, k, v, start.int(), end.int(), gate=gate, **options)
    assert error(mixed, (gate[..., None] * expected).sum(-2)) < CLOSE
    torch.testing.assert_close(slots, lse, atol=CLOSE, rtol=CLOSE)
    together, total = subquad.span_attention(q, k, v, start, end, joint=True, **options)
    own = torch.cat([seen, (near & visible).expand(2, 20, 4, 1, 50)], 3)
    wanted, wanted_lse = joined(q, k, v, own)
    assert error(together, wanted) < CLOSE
    torch.testing.assert_close(total.double(), wanted_lse, atol=CLOSE, rtol=CLOSE)


@every_backend
def test_bare_spans_are_combined_by_hand(backend: str) -> None:
    q, k, v, start, end = drawn()
    out, lse = subquad.span_attention(q, k, v, start, end, backend=backend)
    assert ((out == 0).all(-1) == (lse == -torch.inf)).all() and (lse == -torch.inf).any()
    gate = torch.softmax(torch.randn(start.shape), -1)
    with_gate, _ = subquad.span_attention(q, k, v, start, end, gate=gate, backend=backend)
    assert error(subquad.combine_spans(out, lse, gate=gate), with_gate) < CLOSE
    together, _ = subquad.span_attention(q, k, v, start, end, joint=True, backend=backend)
    assert error(subquad.combine_spans(out, lse), together) < CLOSE
    rest = subquad.combine_spans(out[..., 1:, :], lse[..., 1:], base_out=out[..., 0, :], base_lse=lse[..., 0])
    assert error(rest, together) < CLOSE


@every_backend
def test_ends_that_32_bits_do_not_hold(backend: str) -> None:
    q, k, v, start, end = drawn()
    far = torch.where(start > 3, 3, -(2**40)), torch.where(end < 50, 50, 2**40)
    found = subquad.span_attention(q, k, v, far[0], far[1], joint=True, backend=backend)
    wanted = subquad.span_attention(q, k, v, far[0].clamp(min=0), far[1].clamp(max=49), joint=True, backend=backend)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@every_backend
@pytest.mark.parametrize("page", [1, 2, 16, 64])
def test_spans_across_pages(page: int, backend: str) -> None:
    """In any order, some of nobody; a table that ends before the spans do, and numbers of no page, are not an access."""
    q, k, v, start, end = drawn(keys=64)
    count = 64 // page
    table = torch.randperm(2 * count + 3)[: 2 * count].view(2, count).int()
    pools = []
    for x in (k, v):
        pool = torch.full((2 * count + 3, page, *x.shape[2:]), torch.nan)
        pool[table.long()] = x.unflatten(1, (count, page))
        pools.append(pool)
    gate = torch.softmax(torch.randn(start.shape), -1)
    base = torch.randn(2, 20, 4, 5), torch.randn(2, 20, 4)
    arguments = (start.int(), end.int(), gate, *base)
    found = operator(q, *pools, *arguments, None, table, 0.3, backend)
    expected = operator(q, k, v, *arguments, None, None, 0.3, backend)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=CLOSE, rtol=CLOSE)
    table[:, count // 2 :] = torch.tensor([-1, 2**31 - 1]).int()[:, None]
    near = torch.minimum(end, torch.tensor(page * (count // 2) - 1)).int()
    found = operator(q, *pools, start.int(), near, gate, *base, None, table, 0.3, backend)
    expected = operator(q, k, v, start.int(), near, gate, *base, None, None, 0.3, backend)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize("kind", ["gate", "joint", "slots"])
def test_gradcheck(kind: str) -> None:
    q, k, v, start, end = (x.double() if x.is_floating_point() else x for x in drawn(1, 4, 12, 2))
    gate = torch.rand(start.shape, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, gate)]

    def results(q: Any, k: Any, v: Any, gate: Any) -> tuple[torch.Tensor, ...]:
        options = {"gate": {"gate": gate}, "joint": {"joint": True}, "slots": {}}[kind]
        out, lse = subquad.span_attention(q, k, v, start, end, **options, backend="reference")  # type: ignore[arg-type]
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(results, inputs)


# --- what is refused ----------------------------------------

Q, K, V = torch.zeros(2, 5, 4, 8), torch.zeros(2, 9, 2, 8), torch.zeros(2, 9, 2, 6)
SPANS = torch.zeros(2, 5, 4, 3, dtype=torch.int32)
Wrong = dict[str, tuple[dict[str, Any], str, type[Exception]]]
ATTENTION: Wrong = {
    "no q": ({"q": None}, "q", TypeError),
    "q of three dimensions": ({"q": Q[0]}, "q", ValueError),
    "q of integers": ({"q": Q.int()}, "q", TypeError),
    "no k": ({"k": None}, "k", TypeError),
    "k of another width": ({"k": K[..., :6]}, "k", ValueError),
    "k of another batch": ({"k": K[:1]}, "k", ValueError),
    "k of heads that do not divide": ({"k": torch.zeros(2, 9, 3, 8)}, "k", ValueError),
    "k of another dtype": ({"k": K.double()}, "k", TypeError),
    "no v": ({"v": 2}, "v", TypeError),
    "v of other keys": ({"v": V[:, :8]}, "v", ValueError),
    "v too wide": ({"v": torch.zeros(2, 9, 2, 257)}, "v", ValueError),
    "v of another dtype": ({"v": V.half()}, "v", TypeError),
    "config of an int": ({"config": 3}, "config", TypeError),
    "positions beyond the keys": (
        {"config": SuperlinearConfig(sw_index=1), "cache_position": torch.arange(5, 10)}, "cache_position", ValueError,
    ),
    "positions of floats": (
        {"config": SuperlinearConfig(sw_index=1), "cache_position": torch.ones(5)}, "cache_position", TypeError,
    ),
    "a mask of integers": ({"attention_mask": torch.ones(2, 9).int()}, "attention_mask", TypeError),
    "a mask of another batch": ({"attention_mask": torch.ones(1, 9).bool()}, "attention_mask", ValueError),
    "an unknown backend": ({"backend": "fast"}, "backend", ValueError),
}  # fmt: skip
SPAN: Wrong = {
    **ATTENTION,
    "no start": ({"start": None}, "start", TypeError),
    "start of floats": ({"start": SPANS.float()}, "start", TypeError),
    "start of other heads": ({"start": SPANS[:, :, :2]}, "start", ValueError),
    "no spans": ({"start": SPANS[..., :0], "end": SPANS[..., :0]}, "start", ValueError),
    "end of other spans": ({"end": SPANS[..., :2]}, "end", ValueError),
    "end of bools": ({"end": SPANS.bool()}, "end", TypeError),
    "a gate of other spans": ({"gate": torch.zeros(2, 5, 4, 2)}, "gate", ValueError),
    "a gate of integers": ({"gate": SPANS}, "gate", TypeError),
    "a gate and one softmax": ({"gate": SPANS.float(), "joint": True}, "joint", ValueError),
    "joint as a number": ({"joint": 1}, "joint", TypeError),
    "scale as a string": ({"scale": "1"}, "scale", TypeError),
    "an infinite scale": ({"scale": float("inf")}, "scale", ValueError),
    "positions without a window": ({"cache_position": torch.arange(5.0)}, "cache_position", TypeError),
    "positions that are no keys": ({"cache_position": torch.arange(5) + 5}, "cache_position", ValueError),
    "sparse queries": ({"q": Q.to_sparse()}, "q", TypeError),
    "sparse keys": ({"k": K.to_sparse()}, "k", TypeError),
}
WHOLE: Wrong = {
    **ATTENTION,
    "no q_search": ({"q_search": None}, "q_search", TypeError),
    "q_search of other heads": ({"q_search": Q[:, :, :2]}, "q_search", ValueError),
    "q_search of another width": ({"q_search": Q[..., :6]}, "q_search", ValueError),
    "q_search of another dtype": ({"q_search": Q.double()}, "q_search", TypeError),
    "search keys of another width": ({"search_keys": K[..., :6]}, "search_keys", ValueError),
    "search keys of other tokens": ({"search_keys": K[:, :8]}, "search_keys", ValueError),
    "search keys of other heads": ({"search_keys": K[:, :, :1]}, "search_keys", ValueError),
    "search keys as a number": ({"search_keys": 1}, "search_keys", TypeError),
    "more queries than keys": ({"k": K[:, :3], "v": V[:, :3]}, "cache_position", ValueError),
    "bounds and a mask": (
        {"cu_seqlens": torch.tensor([0, 5]), "attention_mask": torch.ones(2, 9).bool()}, "cu_seqlens", ValueError,
    ),
    "return_aux as a string": ({"return_aux": "yes"}, "return_aux", TypeError),
}  # fmt: skip
COMBINE: Wrong = {
    "no out": ({"out": None}, "out", TypeError),
    "out of four dimensions": ({"out": torch.zeros(2, 5, 4, 6)}, "out", ValueError),
    "no lse": ({"lse": None}, "lse", TypeError),
    "lse of other spans": ({"lse": torch.zeros(2, 5, 4, 2)}, "lse", ValueError),
    "lse of integers": ({"lse": SPANS}, "lse", TypeError),
    "a gate of other spans": ({"gate": torch.zeros(2, 5, 4, 2)}, "gate", ValueError),
    "lse of another device": ({"lse": torch.zeros(2, 5, 4, 3, device="meta")}, "lse", ValueError),
    "a gate of another device": ({"gate": torch.zeros(2, 5, 4, 3, device="meta")}, "gate", ValueError),
    "half a base": ({"base_out": torch.zeros(2, 5, 4, 6)}, "base_lse", ValueError),
    "a base of other heads": (
        {"base_out": torch.zeros(2, 5, 4, 6), "base_lse": torch.zeros(2, 5, 3)}, "base_lse", ValueError,
    ),
    "a base of another width": (
        {"base_out": torch.zeros(2, 5, 4, 5), "base_lse": torch.zeros(2, 5, 4)}, "base_out", ValueError,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SPAN)
def test_wrong_arguments(what: str) -> None:
    changed, name, kind = SPAN[what]
    with pytest.raises(kind, match=f"^{name}: "):
        subquad.span_attention(
            **{"q": Q, "k": K, "v": V, "start": SPANS, "end": SPANS, "backend": "reference", **changed}
        )


@pytest.mark.parametrize("what", WHOLE)
def test_wrong_arguments_of_the_whole(what: str) -> None:
    changed, name, kind = WHOLE[what]
    with pytest.raises(kind, match=f"^{name}: "):
        subquad.superlinear_attention(**{"q_search": Q, "q": Q, "k": K, "v": V, "backend": "reference", **changed})


@pytest.mark.parametrize("what", COMBINE)
def test_wrong_arguments_of_combine_spans(what: str) -> None:
    changed, name, kind = COMBINE[what]
    with pytest.raises(kind, match=f"^{name}: "):
        subquad.combine_spans(**{"out": torch.zeros(2, 5, 4, 3, 6), "lse": torch.zeros(2, 5, 4, 3), **changed})
