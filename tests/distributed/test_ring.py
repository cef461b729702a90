"""Attention around a ring against one process; ranks are threads, and messages between two of them go by queues."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

import subquad
import subquad.distributed as sd
from subquad import IntervalMask, RopeSpec
from subquad.distributed import _collectives, traffic
from subquad.masks.parts import blocks

from .test_operators import CLOSE, LAYOUTS, MASKS, TOKENS, compare, normal
from .threads import caught, on_ranks, taken


class Mail:
    """Pairs (from, to) of ranks, by message; memory that was received into, and how much of it a rank ever held at once."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int]] = []
        self.received: dict[int, list[StorageWeakRef]] = defaultdict(list)
        self.held = 0


@pytest.fixture(autouse=True)
def mail(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mail]:
    """For messages between two ranks, which the threaded group does not have."""
    boxes: Any = defaultdict(SimpleQueue)
    mail = Mail()

    def swap(given: Any, came: Any, group: Any) -> Callable[[], None]:
        rank = dist.get_rank()
        mail.received[rank] += [StorageWeakRef(x.untyped_storage()) for _, x in came]
        mail.held = max(mail.held, sum(not x.expired() for x in mail.received[rank]))
        for to, x in given:
            assert x.is_contiguous() and x.numel() and to != rank
            mail.sent.append((rank, to))
            boxes[rank, to].put(x.clone())

        def wait() -> None:
            for source, x in came:
                got = taken(boxes[source, rank])
                assert got.shape == x.shape and got.dtype is x.dtype
                x.copy_(got)

        for _, x in came:
            x.fill_(torch.nan)  # until it is waited for
        return wait

    monkeypatch.setattr(_collectives, "swap", swap)
    monkeypatch.setitem(CLOSE, torch.float32, 1.3e-6)
    yield mail
    assert all(box.empty() for box in boxes.values())


def rows_of(dtype: torch.dtype = torch.float32, batch: int = 2) -> dict[str, torch.Tensor]:
    shapes = {"q": (batch, TOKENS, 4, 8), "k": (batch, TOKENS, 2, 8), "v": (batch, TOKENS, 2, 5)}
    return {name: normal(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}


FULL = {
    "full-lifetimes": lambda: IntervalMask.full(TOKENS, TOKENS).with_key_lifetime(
        *(torch.full((1, 1, TOKENS), x, dtype=torch.int32) for x in (5, 40))
    )
}


@pytest.mark.parametrize("kind", ["even", "zigzag"])
@pytest.mark.parametrize("mask", [*MASKS, *FULL])
def test_blocks_show_what_the_mask_shows(kind: str, mask: str) -> None:
    made = (MASKS | FULL)[mask]()
    dense = made.to_dense(TOKENS, TOKENS)

    def body(rank: int) -> None:
        layout = LAYOUTS[kind](3)
        rows, keys = layout.positions(), [layout.positions(r)[r:] for r in range(3)]  # not all keys of all ranks
        for at, block in zip(keys, blocks(made, rows, keys, TOKENS, TOKENS), strict=True):
            assert block is not None
            found, expected = block.to_dense(len(rows), len(at)), dense[:, :, rows][..., at]
            assert torch.equal(found.expand_as(expected), expected)

    on_ranks(3, body)


@pytest.mark.parametrize(("size", "kind"), [(2, "uneven"), (3, "zigzag"), (5, "gaps")])
@pytest.mark.parametrize("mask", MASKS)
def test_is_one_process(size: int, kind: str, mask: str) -> None:
    """Sink logits far from 0, so that one that is dropped or counted twice shows; biases and a cap with half of the masks."""
    made, more = MASKS[mask](), sorted(MASKS).index(mask) % 2
    rows, options = rows_of(), {"softcap": 2.0} if more else {}
    if more:
        rows["key_bias"] = normal(2, TOKENS, seed=8)
    compare(
        size,
        LAYOUTS[kind],
        rows,
        {"sink_logits": torch.tensor([10.0, -10.0, 3.0, 0.0])},
        lambda **x: subquad.interval_attention(**x, mask=made, **options),
        lambda **x: sd.interval_attention(**x, mask=made, method="ring", **options),
    )


@pytest.mark.parametrize("sinks", [False, True])
def test_gradients_of_the_log_sum_exp_and_the_same_bits_again(sinks: bool) -> None:
    """Rows that see nothing, too: the first ones."""
    dense = torch.rand(1, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(4)) < 0.2
    dense[:, :, :3] = False
    mask, rows = IntervalMask.from_dense(dense), rows_of()
    logits = [torch.tensor([10.0, -10.0, 3.0, -torch.inf])] * sinks

    def one(method: dict[str, Any], tensors: list[torch.Tensor], w: torch.Tensor) -> list[torch.Tensor]:
        call: Any = sd.interval_attention if method else subquad.interval_attention
        given = {"sink_logits": tensors[3]} if sinks else {}
        out, lse = call(*tensors[:3], mask, return_lse=True, **given, **method)
        seen = lse > -torch.inf
        loss = (out * w).sum() + lse[seen].square().sum()
        return [out.detach(), lse.detach(), *torch.autograd.grad(loss, tensors)]

    w = normal(2, TOKENS, 4, 5, seed=9)
    expected = one({}, [x.requires_grad_() for x in (*rows.values(), *(x.clone() for x in logits))], w)

    def body(rank: int) -> Any:
        layout = LAYOUTS["zigzag"](3)
        found = []
        for _ in range(2):
            local = [layout.shard(x.detach()).requires_grad_() for x in rows.values()]
            local += [x.clone().requires_grad_() for x in logits]
            found.append(one({"layout": layout, "method": "ring"}, local, layout.shard(w)))
        return layout.positions(), *found

    every = on_ranks(3, body)
    for at, first, again in every:
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        for a, b in zip(first[:5], expected[:5], strict=True):
            assert torch.equal(a == -torch.inf, b[:, at] == -torch.inf)
            scale = float(b[b.isfinite()].abs().max())
            torch.testing.assert_close(a, b[:, at], rtol=0, atol=1.3e-6 * scale)
    if sinks:
        total = sum(first[5] for _, first, _ in every)
        torch.testing.assert_close(total, expected[5], rtol=0, atol=2e-6 * float(expected[5].abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once(dtype: torch.dtype) -> None:
    """What joins is not: the result is that of the same numbers in float32, rounded; gradients nearly so."""
    mask, rows = IntervalMask.causal(), rows_of(dtype)
    wide = [x.float().requires_grad_() for x in rows.values()]
    expected: Any = subquad.interval_attention(*wide, mask)
    w = normal(*expected.shape, seed=9).to(dtype)
    grads = torch.autograd.grad((expected * w).sum(), wide)

    def body(rank: int) -> Any:
        layout = LAYOUTS["zigzag"](5)
        local = [layout.shard(x).requires_grad_() for x in rows.values()]
        out: Any = sd.interval_attention(*local, mask, layout=layout, method="ring")
        return layout.positions(), out.detach(), torch.autograd.grad((out * layout.shard(w)).sum(), local)

    half = torch.finfo(dtype).eps / 2
    for at, out, found in on_ranks(5, body):
        torch.testing.assert_close(out.float(), expected[:, at].detach(), rtol=1.01 * half, atol=1e-6)
        for a, b in zip(found, grads, strict=True):
            assert a.dtype is dtype
            torch.testing.assert_close(a.float(), b[:, at], rtol=1.01 * half, atol=half * float(b.abs().max()))


@pytest.mark.parametrize("mask", ["sliding", "sink", "causal", "packed"])
def test_pairs_without_a_visible_key_send_nothing(mask: str, mail: Mail) -> None:
    """The pairs are those of a dense mask; forward one message a pair, backward one each way."""
    made, size = MASKS[mask](), 5
    rows, dense = rows_of(batch=1), made.to_dense(TOKENS, TOKENS)[0, 0]

    def body(rank: int) -> torch.Tensor:
        layout = LAYOUTS["even"](size)
        local = [layout.shard(x).requires_grad_() for x in rows.values()]
        out: Any = sd.interval_attention(*local, made, layout=layout, method="ring")
        out.sum().backward()
        return layout.positions()

    at = on_ranks(size, body)
    pairs = {(s, r) for s in range(size) for r in range(size) if s != r and bool(dense[at[r]][:, at[s]].any())}
    assert sorted(mail.sent) == sorted([*pairs, *pairs, *((r, s) for s, r in pairs)])
    assert len(pairs) < size * (size - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_holds_the_keys_of_two_others(dtype: torch.dtype, mail: Mail) -> None:
    """And backward one part of gradients on its way."""

    def body(rank: int) -> None:
        layout = LAYOUTS["zigzag"](5)
        local = [layout.shard(x).requires_grad_() for x in rows_of(dtype).values()]
        out: Any = sd.interval_attention(*local, IntervalMask.causal(), layout=layout, method="ring")
        if backward:
            out.sum().backward()

    backward = False
    on_ranks(5, body)
    assert mail.held == 2
    backward = True
    on_ranks(5, body)
    assert mail.held == 3


@pytest.mark.parametrize("mask", MASKS)
def test_brings_as_many_bytes_as_keys(mask: str) -> None:
    """Backward the keys again, beside their gradients."""
    made, found = MASKS[mask](), {}
    for method in ("keys", "ring"):
        rows = [x[:, :12].clone().requires_grad_() for x in rows_of().values()]
        with traffic.played(3, 5) as came:
            layout = sd.SequenceLayout.contiguous(TOKENS)
            came.clear()  # of agreements
            out: Any = sd.interval_attention(*rows, made, layout=layout, method=method)
            forward = sum(came) - 4 * 8
            out.sum().backward()
            found[method] = forward, sum(came) - 4 * 8 - forward
    (keys, gradients), ring = found["keys"], found["ring"]
    assert ring == (keys, keys + gradients) and keys > 0


def test_a_border_that_no_row_sees_across_is_one_process(mail: Mail) -> None:
    """With the bits of it, also of one rank alone."""
    rows = rows_of(batch=1)
    for size in (1, 3):
        edges = [0, 21, 41, TOKENS] if size == 3 else [0, TOKENS]
        mask = IntervalMask.packed(torch.tensor(edges))
        expected: Any = subquad.interval_attention(*rows.values(), mask)

        def body(rank: int, size: int = size, mask: Any = mask) -> Any:
            layout = LAYOUTS["even"](size)
            local = [layout.shard(x) for x in rows.values()]
            return layout.positions(), sd.interval_attention(*local, mask, layout=layout, method="ring")

        for at, out in on_ranks(size, body):
            assert torch.equal(out, expected[:, at])
    assert mail.sent == []


def test_refuses_before_it_sends(mail: Mail) -> None:
    rows = rows_of(batch=1)
    shift = torch.zeros(1, 1, 11, 1, dtype=torch.int32)
    rotated = IntervalMask.pine(50, [1], 10, shift=shift)

    def body(rank: int) -> list[str]:
        layout = LAYOUTS["even"](2)
        q, k, v = (layout.shard(x) for x in rows.values())
        per_head = IntervalMask(*(torch.full((1, 3, TOKENS, 1), x, dtype=torch.int32) for x in (0, TOKENS)), tk=TOKENS)

        def call(q: Any = q, k: Any = k, mask: Any = IntervalMask.causal(), **options: Any) -> str:  # noqa: B008
            return caught(lambda: sd.interval_attention(q, k, v, mask, layout=layout, method="ring", **options))

        rope = RopeSpec(10000.0 ** -(torch.arange(4) / 4), 8)
        return [
            call(q_shift=rope),
            call(mask=rotated),
            call(backend="reference"),
            call(q=q.double(), k=k.double()),
            call(k=k[:, :, :, :4]),
            call(sink_logits=torch.zeros(3)),
            call(softcap=-1.0),
            call(mask=per_head),
        ]

    for messages in on_ranks(2, body):
        for message, words in zip(
            messages,
            (
                "ValueError: method: expected 'keys' with q_shift, got 'ring'",
                "ValueError: method: expected 'keys' with q_shift, got 'ring'",
                "ValueError: backend: expected 'native' or 'triton' with method 'ring', got 'reference'",
                "TypeError: v: expected torch.float64 as q has, got torch.float32",
                "ValueError: k: expected shape",
                "ValueError: sink_logits: expected shape [4], one per query head, got [3]",
                "ValueError: softcap: expected 0 or a finite positive float32, got -1.0",
                "ValueError: mask: expected batch and heads of",
            ),
            strict=True,
        ):
            assert message.startswith(words), message
    assert mail.sent == []


def test_autocast() -> None:
    """Casts before anything is sent, as one process does."""
    rows, mask = rows_of(), IntervalMask.causal()
    with torch.autocast("cpu"):
        expected: Any = subquad.interval_attention(*rows.values(), mask)

    def body(rank: int) -> Any:
        layout = LAYOUTS["even"](2)
        with torch.autocast("cpu"):
            local = [layout.shard(x).requires_grad_() for x in rows.values()]
            out: Any = sd.interval_attention(*local, mask, layout=layout, method="ring")
        out.float().sum().backward()
        assert all(x.grad is not None and x.grad.dtype is torch.float32 for x in local)
        return layout.positions(), out.detach()

    for at, out in on_ranks(2, body):
        assert out.dtype is torch.bfloat16
        torch.testing.assert_close(out, expected[:, at], rtol=2**-7, atol=1e-3)
