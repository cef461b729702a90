"""What gated linear attention on shards does besides one process's work: walks without queries where another rank needs them, or
results first and what enters them later."""

from __future__ import annotations

import itertools
from importlib import import_module
from typing import Any

import pytest
import torch

import subquad
import subquad.distributed as sd
from subquad.distributed.traffic import played
from subquad.testing.instruments import record_ops

from .test_operators import (
    LAYOUTS,
    TOKENS,
    batch_of,
    bounds_of,
    compare,
    normal,
    states_and_their_gradients,
)
from .threads import on_ranks

module = import_module("subquad.distributed.gated_linear_attention")  # as an attribute it is the function


def rows_of(
    batch: int, gate: str, k: int = 8, v: int = 5, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Four query heads of two states; one head of v, of the gates one or two."""
    rows = {
        "q": normal(batch, TOKENS, 4, k, seed=1, dtype=dtype).abs(),
        "k": normal(batch, TOKENS, 2, k, seed=2, dtype=dtype).abs(),
        "v": normal(batch, TOKENS, 1, v, seed=3, dtype=dtype),
    }
    if gate != "none":
        shape = (batch, TOKENS, 1, k) if gate == "channel" else (batch, TOKENS, 2)
        rows["g"] = -0.1 * normal(*shape, seed=4).abs()
    return rows


@pytest.mark.parametrize("gate", ["channel", "head", "none"])
@pytest.mark.parametrize("kind", ["uneven", "packed", "zigzag"])
@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_block_by_block(monkeypatch: pytest.MonkeyPatch, kind: str, gate: str, normalize: bool) -> None:
    """Blocks far shorter than a run, and than the last of them."""

    def blocks(q: torch.Tensor) -> list[tuple[int, int]]:
        return [(max(0, high - 4), high) for high in range(q.shape[1], 0, -4)]

    monkeypatch.setattr(module, "_blocks", blocks)
    cu = bounds_of(kind, 3)
    compare(
        3,
        LAYOUTS[kind],
        rows_of(batch_of(kind), gate),
        {},
        lambda **x: subquad.gated_linear_attention(**x, cu_seqlens=cu, normalize=normalize)[0],
        lambda **x: sd.gated_linear_attention(**x, normalize=normalize)[0],
    )


@pytest.mark.parametrize(("heads", "width", "size"), [(4, 64, 1024), (1, 8, 32768), (64, 256, 256)])
def test_blocks_are_a_mebibyte_and_cover_the_tokens(heads: int, width: int, size: int) -> None:
    for tokens in (1, size, size + 1, 3 * size + 5):
        blocks = module._blocks(torch.empty(1, 1, heads, width).expand(1, tokens, heads, width))
        assert blocks[0][1] == tokens and blocks[-1][0] == 0 and len(blocks) == -(-tokens // size)
        assert all(high - low == size for low, high in blocks[:-1])
        assert all(one[0] == other[1] for one, other in itertools.pairwise(blocks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [0, 1, 256, 600, 20000])
def test_sums_of_gates(tokens: int, dtype: torch.dtype) -> None:
    for shape in ((2, tokens, 3), (1, tokens, 2, 5)):
        gates = -normal(*shape, seed=tokens, dtype=dtype).abs()
        before, found = gates.clone(), module._sum_of_tokens(gates)
        assert found.dtype is torch.float32 and torch.equal(gates, before)
        torch.testing.assert_close(found.double(), gates.double().sum(1), rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_eps_is_part_of_the_denominator(dtype: torch.dtype) -> None:
    """One as large as the sums, in the gradients too."""
    options: dict[str, Any] = {"normalize": True, "eps": 20.0, "scale": 0.3}
    compare(
        3,
        LAYOUTS["uneven"],
        rows_of(2, "channel", dtype=dtype),
        {},
        lambda **x: subquad.gated_linear_attention(**x, **options)[0],
        lambda **x: sd.gated_linear_attention(**x, **options)[0],
    )


def test_the_widest_values_have_one_column_more() -> None:
    compare(
        2,
        LAYOUTS["even"],
        rows_of(1, "channel", k=3, v=256),
        {},
        lambda **x: subquad.gated_linear_attention(**x, normalize=True)[0],
        lambda **x: sd.gated_linear_attention(**x, normalize=True)[0],
    )


def test_a_gradient_of_the_last_state_enters_once_for_all_its_queries() -> None:
    """The last rank hands on what is asked of the state behind it."""
    options: dict[str, Any] = {"normalize": True, "output_final_state": True}
    rows = rows_of(1, "channel")

    def gradients(leaves: list[torch.Tensor], result: Any, last: bool) -> tuple[torch.Tensor, ...]:
        o, states = result
        return torch.autograd.grad(o.square().sum() + last * sum(x.square().sum() for x in states), leaves)

    whole = [x.clone().requires_grad_() for x in rows.values()]
    wanted = gradients(whole, subquad.gated_linear_attention(*whole, **options), True)

    def body(rank: int) -> Any:
        layout = LAYOUTS["uneven"](3)
        shards = [layout.shard(x).requires_grad_() for x in rows.values()]
        result = sd.gated_linear_attention(*shards, layout=layout, **options)
        return layout.positions(), gradients(shards, result, rank == 2)

    for at, found in on_ranks(3, body):
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other[:, at], rtol=0, atol=2e-6 * float(other.abs().max()))


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("normalize", [False, True])
def test_walks_have_no_queries_and_are_made_where_they_are_needed(rank: int, normalize: bool) -> None:
    """Nobody needs the state after the last run, or the gradient of the one before the first."""
    forward, local, backward = (f"gated_linear_attention_{name}" for name in ("fwd", "local_fwd", "bwd"))
    tensors = [torch.rand(1, 5, 2, 4, requires_grad=True) for _ in range(3)]
    with played(rank, 3), record_ops("native") as calls:
        layout = sd.SequenceLayout.contiguous(15)
        o, _ = sd.gated_linear_attention(*tensors, layout=layout, normalize=normalize, backend="native")
        found = [(call.name, heads_of(call)) for call in calls]
        assert found == [(local, 0)] * (rank < 2) + [(forward, 2)]
        calls.clear()
        o.sum().backward()
        found = [(call.name, heads_of(call)) for call in calls]
        assert found == [(forward, 0)] * (rank > 0) + [(backward, 2)]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_gates_that_forget_need_no_walk(rank: int) -> None:
    """The first run has nothing before it; all others compute before they know what was."""
    forward, local, enter = (f"gated_linear_attention_{name}" for name in ("fwd", "local_fwd", "enter_"))
    q, k, v = (torch.rand(1, 200, heads, 4) for heads in (4, 2, 2))
    for other, fall, forgets in ((9.0, 1.06, True), (1.06, 1.03, False)):  # within half of the tokens, or just behind
        g = torch.tensor([-other, -fall]).expand(1, 200, 2)  # all heads, not one alone
        with played(rank, 3), record_ops("native") as calls:
            layout = sd.SequenceLayout.contiguous(600)
            sd.gated_linear_attention(q, k, v, g, layout=layout, backend="native")
            found = [call.name for call in calls]
        results = [forward] if rank == 0 else [local, enter]
        walks = [local] * (rank < 2) + [forward]
        assert found == (results if forgets else walks)
    for dtype, grad, first in (
        (torch.float32, False, True),
        (torch.float32, True, False),
        (torch.bfloat16, False, False),
    ):
        with played(rank, 3), record_ops("native") as calls:  # a state for every query head, no gates
            rows = [x[:, :, :2].to(dtype).requires_grad_(grad) for x in (q, k, v)]
            sd.gated_linear_attention(*rows, layout=layout, backend="native")
            assert [call.name for call in calls] == (results if first else walks)


EARLY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "channel": ({"gate": "channel"}, {"normalize": True}),
    "head": ({"gate": "head"}, {}),
    "none": ({"gate": "none"}, {"normalize": True, "eps": 0.5, "scale": 0.3}),
    "bf16": ({"gate": "channel", "dtype": torch.bfloat16}, {"normalize": True}),
}


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results before what enters, whatever the gates."""
    monkeypatch.setattr(module, "_results_first", lambda call, *_: call.splits)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("case", EARLY)
def test_results_first(early: None, size: int, kind: str, case: str) -> None:
    shapes, options = EARLY[case]
    cu = bounds_of(kind, size)
    compare(
        size,
        LAYOUTS[kind],
        rows_of(batch_of(kind), **shapes),
        {},
        lambda **x: subquad.gated_linear_attention(**x, cu_seqlens=cu, **options)[0],
        lambda **x: sd.gated_linear_attention(**x, **options)[0],
    )


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", ["uneven", "gaps", "zigzag", "packed", "packed-zigzag"])
@pytest.mark.parametrize("normalize", [False, True])
def test_states_of_results_first(early: None, size: int, kind: str, normalize: bool) -> None:
    states_and_their_gradients(size, kind, normalize)


@pytest.mark.parametrize("method", ["all_gather", "scan"])
def test_steep_gates(method: str) -> None:
    """Such that forget, some heads at once and some never, whose results come first by themselves."""
    rows = rows_of(2, "channel")
    rows["g"] = rows["g"] * 300.0
    mixed = rows | {"g": torch.cat([rows["g"], torch.zeros_like(rows["g"])], 2)}
    for given in (rows, mixed, rows | {"g": torch.full_like(rows["g"], -torch.inf)}):
        compare(
            3,
            LAYOUTS["even"],
            given,
            {},
            lambda **x: subquad.gated_linear_attention(**x, normalize=True)[0],
            lambda **x: sd.gated_linear_attention(**x, method=method, normalize=True)[0],
        )


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_goes_on(monkeypatch: pytest.MonkeyPatch, value: float, first: bool) -> None:
    """Over the borders, and not before it came."""
    monkeypatch.setattr(module, "_results_first", lambda *_: first)
    rows = rows_of(1, "channel")
    rows["g"] = rows["g"] * 300.0
    rows["v"][0, 25, 0, 2] = value
    wanted = subquad.gated_linear_attention(**rows)[0]

    def body(rank: int) -> Any:
        layout = LAYOUTS["even"](3)
        y = sd.gated_linear_attention(**{name: layout.shard(x) for name, x in rows.items()}, layout=layout)[0]
        return layout.positions(), y

    for at, y in on_ranks(3, body):
        good = wanted[:, at].isfinite()
        assert torch.equal(y.isfinite(), good)
        torch.testing.assert_close(y[good], wanted[:, at][good], rtol=3e-6, atol=3e-6)


def heads_of(call: Any) -> int:
    """Of the queries."""
    names = [argument.name for argument in call.op._schema.arguments]
    return int(call.args[names.index("q")].shape[2])
