# ruff: noqa: B008, E731 - predicates take what they close over as defaults, for they are made in a loop
"""IntervalMask: every builder against a predicate, the algebra against bool matrices, the plan against tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from subquad import IntervalMask, interval_attention
from subquad.masks.plan import PLAN_K, PLAN_Q
from subquad.testing import backend_params

Predicate = Callable[[int, int], bool]


def dense(rows: int, keys: int, sees: Predicate) -> torch.Tensor:
    """The definition, pair by pair."""
    return torch.tensor([[sees(t, j) for j in range(keys)] for t in range(rows)], dtype=torch.bool).reshape(rows, keys)


def random_cases() -> list[tuple[str, IntervalMask, torch.Tensor]]:
    """(name, mask, its dense definition)"""
    cases = []
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for n in range(6):
        tq, tk = draw(1, 30), draw(1, 30)
        off, w, s = tk - tq, draw(0, 12), draw(0, 6)
        sink: Predicate = lambda t, j, off=off, w=w, s=s: j <= t + off and (j < s or t + off - j < w)
        cases += [
            (f"causal-{n}", IntervalMask.causal(tq, tk), dense(tq, tk, lambda t, j, off=off: j <= t + off)),
            (f"full-{n}", IntervalMask.full(tq, tk), torch.ones(tq, tk, dtype=torch.bool)),
            (f"sink-{n}", IntervalMask.sink(s, w, tq, tk), dense(tq, tk, sink)),
            (
                f"sliding-{n}",
                IntervalMask.sliding(w, tq, tk),
                dense(tq, tk, lambda t, j, off=off, w=w: 0 <= t + off - j < w),
            ),
            (
                f"prefix-{n}",
                IntervalMask.prefix_lm(s, tq, max(tk, s)),
                dense(tq, max(tk, s), lambda t, j, off=max(tk, s) - tq, s=s: j < s or j <= t + off),
            ),
        ]
        lengths = torch.randint(0, 9, (4,), generator=generator)
        more = lengths + torch.randint(0, 4, (4,), generator=generator)
        cu, cu_k = (torch.nn.functional.pad(x.cumsum(0), (1, 0)) for x in (lengths, more))
        document = torch.repeat_interleave(torch.arange(4), lengths).tolist()

        def packed(
            t: int, j: int, causal: bool, w: int, s: int,
            cu: Any = cu.tolist(), cu_k: Any = cu_k.tolist(), document: Any = document,
        ) -> bool:  # fmt: skip
            d = document[t]
            low, high = cu_k[d], cu_k[d + 1]
            i = t - cu[d] + (high - low) - (cu[d + 1] - cu[d])  # position within the keys of the document
            here = low <= j < high
            if not causal:
                return here
            return here and j - low <= i and (w < 0 or j - low < s or i - (j - low) < w)

        rows, keys = int(cu[-1]), int(cu_k[-1])
        for causal, width, sinks in ((True, -1, 0), (False, -1, 0), (True, w, s)):
            mask = IntervalMask.packed(cu, cu_k, causal=causal, window=width, sink_tokens=sinks)
            definition = dense(rows, keys, lambda t, j, c=causal, w=width, s=sinks, f=packed: f(t, j, c, w, s))
            cases.append((f"packed-{causal}-{width}-{n}", mask, definition))
        a, b, c, d = sorted(draw(0, 30) for _ in range(4))
        cases.append((
            f"mma-{n}",
            IntervalMask.mma(31, [(a, b), (b, c)], [(c, d)]),
            dense(31, 31, lambda t, j, a=a, c=c, d=d: j <= t or (a <= t < c and c <= j < d)),
        ))  # fmt: skip
        images = [sorted((draw(0, 30), draw(0, 30))) for _ in range(3)]
        asked = [sorted((draw(0, 30), draw(0, 30))) for _ in range(3)]
        images[2] = images[0]  # one image with two questions; the spans may overlap
        cases.append((
            f"mma-overlapping-{n}",
            IntervalMask.mma(30, [(x, y) for x, y in images], [(x, y) for x, y in asked]),
            dense(30, 30, lambda t, j, i=images, q=asked: j <= t or any(
                x <= t < y and u <= j < z for (x, y), (u, z) in zip(i, q, strict=True)
            )),
        ))  # fmt: skip
        prefix, sizes, suffix = draw(0, 5), [draw(0, 6) for _ in range(3)], draw(0, 5)
        edges = [prefix + sum(sizes[:i]) for i in range(4)]
        owner = [-1] * prefix + [i for i in range(3) for _ in range(sizes[i])] + [-1] * suffix
        cases.append((
            f"pine-{n}",
            IntervalMask.pine(prefix, sizes, suffix),
            dense(len(owner), len(owner), lambda t, j, o=owner, e=edges: j <= t or (
                o[t] >= 0 and e[0] <= j < e[3] and o[j] != o[t]
            )),
        ))  # fmt: skip
        h, w2, before, after = draw(1, 5), draw(1, 5), draw(0, 3), draw(0, 3)
        places = IntervalMask.cca_permutation(h, w2, before, after).tolist()
        image = range(before, before + h * w2)

        def ring(token: int, h: int = h, w: int = w2, before: int = before) -> int:
            y, x = divmod(token - before, w)
            return min(y, x, h - 1 - y, w - 1 - x)

        def cca(t: int, j: int, places: Any = places, image: Any = image, ring: Any = ring) -> bool:
            a, b = places[t], places[j]
            if a in image and b in image:
                return ring(b) <= ring(a)
            return b <= a

        cases.append((f"cca-{n}", IntervalMask.cca(h, w2, before, after), dense(len(places), len(places), cca)))
        main, conditions = draw(1, 6), [draw(1, 5) for _ in range(2)]
        block = [0] * main + [i + 1 for i in range(2) for _ in range(conditions[i])]
        cases.append((
            f"easycontrol-{n}",
            IntervalMask.easycontrol(main, conditions),
            dense(len(block), len(block), lambda t, j, b=block: b[t] == 0 or b[t] == b[j]),
        ))  # fmt: skip
        frames, f, sinks, local, together = draw(1, 7), draw(1, 3), draw(0, 2), draw(2, 5), draw(1, 3)
        pin = (1, 2)

        def frame(t: int, j: int, n: int = frames, f: int = f, s: int = sinks, w: int = local - sinks, b: int = together,
                  pin: Any = pin) -> bool:  # fmt: skip
            last = min(t // f // b * b + b - 1, n - 1)
            first, key = last - w + 1, j // f
            return key <= last and (key < s or key >= first or (pin[0] <= key < pin[1] and pin[1] <= max(first, 0)))

        cases.append((
            f"frames-{n}",
            IntervalMask.frame_sink(frames, f, sinks, local, together, pin),
            dense(frames * f, frames * f, frame),
        ))  # fmt: skip
        ahead = torch.randint(0, 5, (20,), generator=generator)
        left = draw(0, 6)
        cases.append((
            f"lookahead-{n}",
            IntervalMask.lookahead(ahead, left),
            dense(20, 20, lambda t, j, a=ahead.tolist(), n=left: t - n <= j <= t + a[t]),
        ))  # fmt: skip
        start = torch.randint(-3, 30, (1, 1, 12, 4), generator=generator)
        stop = start + torch.randint(0, 8, start.shape, generator=generator)
        cases.append((
            f"spans-{n}",
            IntervalMask.spans(start, stop, 30, window=w or None),
            dense(12, 30, lambda t, j, a=start[0, 0].tolist(), b=stop[0, 0].tolist(), w=w: any(
                0 <= x <= j < y for x, y in zip(a[t], b[t], strict=True)
            ) or 0 <= t + 18 - j < w),
        ))  # fmt: skip
    return cases


CASES = random_cases()


@pytest.mark.parametrize(("mask", "definition"), [pytest.param(m, d, id=n) for n, m, d in CASES])
def test_builders(mask: IntervalMask, definition: torch.Tensor) -> None:
    assert torch.equal(mask.to_dense()[0, 0], definition)
    wide = mask.materialize()
    assert wide.starts is not None and wide.ends is not None
    IntervalMask(wide.starts, wide.ends, tk=definition.shape[1])  # canonical: passes the checks of the constructor
    touching = (wide.starts[..., 1:] == wide.ends[..., :-1]) & (wide.starts[..., 1:] < wide.ends[..., 1:])
    assert not touching.any()
    rows, keys = definition.shape
    after = torch.arange(keys)[None] > torch.arange(rows)[:, None] + keys - rows
    if mask.starts is not None:
        assert mask.is_causal() == (not (definition & after).any())
    b, h = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    if definition.numel():
        mod = mask.to_mask_mod()
        grid = torch.stack([mod(b, h, t.expand(keys), torch.arange(keys)) for t in torch.arange(rows)])
        assert torch.equal(grid, definition)


def random_dense(generator: torch.Generator, *shape: int) -> torch.Tensor:
    flips = torch.rand(shape, generator=generator) < 0.02 + 0.2 * torch.rand((), generator=generator)
    x = (flips.cumsum(-1) + torch.randint(0, 2, (*shape[:-1], 1), generator=generator)) % 2 == 0
    x[..., shape[-2] // 2 :, :] &= torch.rand((), generator=generator) < 0.8  # sometimes rows that see nothing
    if torch.rand((), generator=generator) < 0.5:
        x[..., : shape[-2] // 2 + 1, shape[-1] // 4 : shape[-1]] = True
    return x


def test_algebra() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        tq, tk = torch.randint(1, 40, (2,), generator=generator).tolist()
        a, b = random_dense(generator, 1, 2, tq, tk), random_dense(generator, 2, 1, tq, tk)
        x, y = IntervalMask.from_dense(a), IntervalMask.from_dense(b)
        assert torch.equal(x.to_dense(), a) and torch.equal((~x).to_dense(), ~a)
        assert torch.equal((x | y).to_dense(), a | b) and torch.equal((x & y).to_dense(), a & b)
        assert (x & y).num_intervals <= x.num_intervals + y.num_intervals - 1
        assert (~x).num_intervals <= x.num_intervals + 1
        query, key = torch.randperm(tq, generator=generator), torch.randperm(tk, generator=generator)
        assert torch.equal(x.permute(query, key).to_dense(), a[:, :, query][..., key])
        both = IntervalMask.concat([x, y]).to_dense()
        assert torch.equal(both[:, :, :tq, :tk], a.expand(2, -1, -1, -1))
        assert torch.equal(both[:, :, tq:, tk:], b.expand(-1, 2, -1, -1)) and not both[:, :, :tq, tk:].any()
        first = torch.randint(0, tq + 1, (1, 1, tk), generator=generator).int()
        last = first + torch.randint(0, tq + 1, (1, 1, tk), generator=generator).int()
        t = torch.arange(tq)[:, None]
        alive = (t >= first[:, :, None]) & (t < last[:, :, None])
        assert torch.equal((x.with_key_lifetime(first, last) & y).to_dense(), a & b & alive)
        soon, late = first.flip(-1), last.flip(-1)
        both_alive = alive & (t >= soon[:, :, None]) & (t < late[:, :, None])
        both = x.with_key_lifetime(first, last) & y.with_key_lifetime(soon, late)
        assert torch.equal(both.to_dense(), a & b & both_alive)
        keys = torch.rand(3, tk, generator=generator) < 0.7
        assert torch.equal(
            IntervalMask.causal(tq, tk).with_keys(keys).to_dense(),
            IntervalMask.causal(tq, tk).to_dense() & keys[:, None, None],
        )
        low, high = sorted(torch.randint(0, tk + 1, (2,), generator=generator).tolist())
        square = random_dense(generator, 1, 1, tk, tk)
        seen = square[0, 0, low:high]
        closed = not (seen[:, :low].any() or seen[:, high:].any())
        assert IntervalMask.from_dense(square).is_closed(low, high) is closed


def test_algebra_of_intervals_with_gaps_in_their_order() -> None:
    """Empty intervals may stand anywhere in a mask made by hand."""
    mask = IntervalMask(intervals((0, 1, 6, 9)), intervals((5, 1, 8, 9)), tk=10)
    seen = torch.tensor([[[[1, 1, 1, 1, 1, 0, 1, 1, 0, 0]]]]) > 0
    assert torch.equal(mask.to_dense(), seen) and torch.equal((~mask).to_dense(), ~seen)
    assert torch.equal((mask & mask).to_dense(), seen) and torch.equal((mask | mask).to_dense(), seen)
    assert not (mask & ~mask).to_dense().any() and (mask | ~mask).to_dense().all()
    assert torch.equal(mask.permute(key=torch.arange(9, -1, -1)).to_dense(), seen.flip(-1))


def test_plan_against_dense() -> None:
    """300 random masks: which tiles are listed, in what order, and which count as whole."""
    generator = torch.Generator().manual_seed(2)
    for case in range(300):
        tq, tk = (int(torch.randint(1, n, (), generator=generator)) for n in (290, 200))
        a = random_dense(generator, 1, 1 + case % 2, tq, tk)
        mask = IntervalMask.from_dense(a)
        nq, nk = -(-tq // PLAN_Q), -(-tk // PLAN_K)
        padded = torch.nn.functional.pad(a, (0, nk * PLAN_K - tk, 0, nq * PLAN_Q - tq))
        tiles = padded.unflatten(3, (nk, PLAN_K)).unflatten(2, (nq, PLAN_Q)).transpose(3, 4)
        rows = (tq - torch.arange(nq) * PLAN_Q).clamp(max=PLAN_Q)
        touched = tiles.any(-1).any(-1)
        whole = tiles.sum((-1, -2)) == rows[:, None] * PLAN_K  # a tile beyond the last key never is
        q_count, q_list, k_count, k_list = mask.plan()
        for counts, lists, hit, full in (
            (q_count, q_list, touched, whole),
            (k_count, k_list, touched.transpose(2, 3), whole.transpose(2, 3)),
        ):
            for h in range(a.shape[1]):
                for i in range(hit.shape[2]):
                    parts, wholes = counts[0, h, i].tolist()
                    expected = (
                        (hit & ~full)[0, h, i].nonzero().flatten().tolist(),
                        full[0, h, i].nonzero().flatten().tolist(),
                    )
                    assert lists[0, h, i, : parts + wholes].tolist() == [*expected[0], *expected[1]]
                    assert (parts, wholes) == (len(expected[0]), len(expected[1]))
        assert mask.plan() is mask.plan()
    assert mask.starts is not None and mask.ends is not None and mask.num_intervals > 1
    each = mask.plan(per_slot=True)
    for r in range(mask.num_intervals):
        one = slice(r, r + 1)
        alone = IntervalMask(mask.starts[..., one].contiguous(), mask.ends[..., one].contiguous(), tk=tk)
        assert all(torch.equal(x[:, :, r], y) for x, y in zip(each, alone.plan(), strict=True))


def test_worked_example_of_modality_mutual_attention() -> None:
    mask = IntervalMask.mma(9, [(2, 5)], [(5, 8)])
    assert mask.starts is not None and mask.ends is not None
    rows = [
        [(s, e) for s, e in zip(a, b, strict=True) if s < e]
        for a, b in zip(mask.starts[0, 0].tolist(), mask.ends[0, 0].tolist(), strict=True)
    ]
    assert rows[2] == [(0, 3), (5, 8)] and rows[3] == [(0, 4), (5, 8)] and rows[4] == [(0, 8)] and rows[8] == [(0, 9)]
    assert mask.is_closed(0, 8) and not mask.is_closed(0, 5)


def test_worked_example_of_concentric_attention() -> None:
    mask = IntervalMask.cca(4, 4, 1, 1)
    assert mask.num_intervals == 1 and mask.ends is not None
    assert mask.ends.flatten().tolist() == [1, *[13] * 12, *[17] * 4, 18]
    assert IntervalMask.cca_positions(4, 4, 1, 1).tolist() == [0, *[1] * 12, *[2] * 4, 3]
    raster = mask.permute(*(IntervalMask.cca_permutation(4, 4, 1, 1).argsort(),) * 2)
    assert raster.num_intervals > 1 and raster.is_closed(0, 17)


@pytest.mark.heavy
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("heads", [1, 2])
def test_mask_mod_is_traced(batch: int, heads: int) -> None:
    """FlexAttention builds its block mask of it in eager mode and compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, create_mask

    generator = torch.Generator().manual_seed(4)
    a = random_dense(generator, batch, heads, 9, 13)
    birth = torch.randint(0, 3, (batch, heads, 13), generator=generator).int()
    mask = IntervalMask.from_dense(a).with_key_lifetime(birth, birth + 6)
    mod = mask.to_mask_mod()
    dense = create_mask(mod, 2, 2, 9, 13, device="cpu")
    assert torch.equal(dense, mask.to_dense().expand(2, 2, -1, -1))
    block = torch.compile(create_block_mask, backend="aot_eager")
    expected = create_block_mask(mod, 2, 2, 9, 13, device="cpu", BLOCK_SIZE=4)
    assert torch.equal(block(mod, 2, 2, 9, 13, device="cpu", BLOCK_SIZE=4).to_dense(), expected.to_dense())


def test_a_mask_that_is_closed_by_its_lifetimes() -> None:
    generator = torch.Generator().manual_seed(5)
    found = set()
    for _ in range(40):
        n = int(torch.randint(1, 9, (), generator=generator))
        low, high = sorted(torch.randint(0, n + 1, (2,), generator=generator).tolist())
        birth = torch.randint(0, n + 1, (1, 1, n), generator=generator).int()
        mask = IntervalMask.from_dense(random_dense(generator, 1, 1, n, n)).with_key_lifetime(birth, birth + 2)
        seen = mask.to_dense()[0, 0, low:high]
        closed = not (seen[:, :low].any() or seen[:, high:].any())
        assert mask.is_closed(low, high) is closed
        found.add(closed)
    assert found == {False, True}
    assert (
        IntervalMask.full(300, 300)
        .with_key_lifetime(torch.full((1, 1, 300), 299).int(), torch.full((1, 1, 300), 300).int())
        .is_closed(0, 299)
    )  # more rows than are looked at together
    assert (
        not IntervalMask.full(300, 300)
        .with_key_lifetime(torch.full((1, 1, 300), 298).int(), torch.full((1, 1, 300), 299).int())
        .is_closed(0, 299)
    )


def test_lifetimes_of_a_view_are_made_contiguous() -> None:
    x = torch.arange(8, dtype=torch.int32)[None, None, ::2]
    mask = IntervalMask(intervals((0, 2)), intervals((1, 4)), tk=4, key_start=x, key_stop=x + 1)
    assert mask.key_start is not None and mask.key_start.is_contiguous()


def test_full_attention_of_one_token_is_causal() -> None:
    assert IntervalMask.full(1, 1).is_causal() and not IntervalMask.full(2, 2).is_causal()
    assert IntervalMask.full(1, 5).is_causal() and not IntervalMask.full().is_causal()


def test_flashmask() -> None:
    generator = torch.Generator().manual_seed(3)
    masks = [m for _, m, d in CASES if d.numel()] + [
        IntervalMask.from_dense(random_dense(generator, 1, 1, 25, 30)) for _ in range(20)
    ]
    refused = 0
    for mask in masks:
        a = mask.to_dense()[0, 0]
        columns = torch.nn.functional.pad(~a.T, (1, 0))
        runs = int((columns[:, 1:] & ~columns[:, :-1]).sum(-1).max())
        if runs > 2:
            refused += 1
            with pytest.raises(ValueError, match=r"^mask: .*two runs"):
                mask.to_flashmask()
            continue
        lts, lte, uts, ute = mask.to_flashmask()[0, 0].unbind(-1)
        t = torch.arange(a.shape[0])[:, None]
        hidden = ((t >= lts) & (t < lte)) | ((t >= uts) & (t < ute))
        assert torch.equal(hidden, ~a)
    assert 0 < refused < len(masks)


def test_flashmask_has_the_first_rows_in_its_upper_pair() -> None:
    """(LTS, LTE, UTS, UTE) of a key: a single run is the upper one if it begins with the first row, the lower one if not."""
    causal, window = (
        mask.to_flashmask()[0, 0].tolist() for mask in (IntervalMask.causal(4), IntervalMask.sliding(2, 4))
    )
    assert causal[2] == [4, 4, 0, 2] and causal[0] == [4, 4, 0, 0]
    assert window[1] == [3, 4, 0, 1] and window[0] == [2, 4, 0, 0]


def intervals(*rows: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)[None, None]


def shifted() -> IntervalMask:
    return IntervalMask(intervals((0, 2)), intervals((2, 3)), tk=4, shift=intervals((5, 7)))


WRONG: dict[str, tuple[str, type[Exception], Callable[[], Any]]] = {
    "int64": ("starts", TypeError, lambda: IntervalMask(intervals((0, 2)).long(), intervals((1, 3)), tk=4)),
    "a list": ("starts", TypeError, lambda: IntervalMask([[0]], intervals((1, 3)), tk=4)),  # type: ignore[arg-type]
    "two dimensions": ("starts", ValueError, lambda: IntervalMask(intervals((0, 2))[0, 0], intervals((1, 3))[0, 0], tk=4)),
    "other shape": ("ends", ValueError, lambda: IntervalMask(intervals((0, 2)), intervals((1, 3), (1, 3)), tk=4)),
    "beyond": ("starts", ValueError, lambda: IntervalMask(intervals((0, 2)), intervals((1, 5)), tk=4)),
    "negative": ("starts", ValueError, lambda: IntervalMask(intervals((-1, 2)), intervals((1, 3)), tk=4)),
    "reversed": ("starts", ValueError, lambda: IntervalMask(intervals((3, 4)), intervals((1, 4)), tk=4)),
    "unsorted": ("starts", ValueError, lambda: IntervalMask(intervals((2, 0)), intervals((3, 1)), tk=4)),
    "overlapping": ("starts", ValueError, lambda: IntervalMask(intervals((0, 1)), intervals((2, 3)), tk=4)),
    "overlapping behind an empty one": (
        "starts",
        ValueError,
        lambda: IntervalMask(intervals((0, 1, 2)), intervals((5, 1, 4)), tk=6),
    ),
    "half a lifetime": (
        "key_stop",
        ValueError,
        lambda: IntervalMask(intervals((0, 2)), intervals((1, 3)), tk=4, key_start=torch.zeros(1, 1, 4, dtype=torch.int32)),
    ),
    "short lifetime": (
        "key_start",
        ValueError,
        lambda: IntervalMask.causal(4, 4).with_key_lifetime(*(torch.zeros(1, 1, 3, dtype=torch.int32),) * 2),
    ),
    "long lifetime": (
        "key_start",
        ValueError,
        lambda: IntervalMask.causal(4, 4).with_key_lifetime(*(torch.zeros(1, 1, 5, dtype=torch.int32),) * 2),
    ),
    "shift of another shape": ("shift", ValueError, lambda: IntervalMask.from_dense(torch.ones(3, 4) > 0).with_shift(
        torch.zeros(1, 1, 3, 2, dtype=torch.int32))),
    "visible is a float": ("visible", TypeError, lambda: IntervalMask.causal(4).with_keys(torch.ones(1, 4))),
    "visible is short": ("visible", ValueError, lambda: IntervalMask.causal(4).with_keys(torch.ones(1, 3) > 0)),
    "union of a shifted mask": ("mask", ValueError, lambda: shifted() | IntervalMask.full(1, 4)),
    "union with a shifted mask": ("other", ValueError, lambda: IntervalMask.full(1, 4) | shifted()),
    "complement of a shifted mask": ("mask", ValueError, lambda: ~shifted()),
    "permuted shifted mask": ("mask", ValueError, lambda: shifted().permute(query=torch.tensor([0]))),
    "concat of shifted masks": ("masks", ValueError, lambda: IntervalMask.concat([shifted()])),
    "keys of a shifted mask": ("mask", ValueError, lambda: shifted().with_keys(torch.ones(1, 4) > 0)),
    "concat of nothing": ("masks", ValueError, lambda: IntervalMask.concat([])),
    "permutation is short": ("key", ValueError, lambda: IntervalMask.causal(4).permute(key=torch.tensor([1, 0]))),
    "permutation beyond the keys": ("key", ValueError, lambda: IntervalMask.causal(2).permute(key=torch.tensor([0, 2]))),
    "permutation beyond the rows": ("query", ValueError, lambda: IntervalMask.causal(2).permute(query=torch.tensor([-1]))),
    "permutation of floats": ("key", TypeError, lambda: IntervalMask.causal(2).permute(key=torch.zeros(2))),
    "keys without rows": ("tq", ValueError, lambda: IntervalMask.causal(None, 5)),
    "dense is a list": ("mask", TypeError, lambda: IntervalMask.from_dense([[True]])),  # type: ignore[arg-type]
    "visible is a list": ("visible", TypeError, lambda: IntervalMask.causal(1).with_keys([[True]])),  # type: ignore[arg-type]
    "spans are lists": ("start", TypeError, lambda: IntervalMask.spans([[1]], [[2]], 3)),  # type: ignore[arg-type]
    "shift is a float": ("shift", TypeError, lambda: IntervalMask.pine(1, [2], 1, torch.zeros(1, 1, 2, 1))),
    "shift of other rows": ("shift", ValueError, lambda: IntervalMask.pine(1, [2], 3, torch.zeros(1, 1, 2, 1).int())),
    "shift without documents": ("lengths", ValueError, lambda: IntervalMask.pine(1, [], 3, torch.zeros(1, 1, 3, 0).int())),
    "window of all keys": ("window", ValueError, lambda: IntervalMask.packed(torch.tensor([0, 6]), causal=False, window=2)),
    "packed window": ("window", ValueError, lambda: IntervalMask.packed(torch.tensor([0, 6]), window=-5)),
    "packed sinks": ("sink_tokens", ValueError, lambda: IntervalMask.packed(torch.tensor([0, 6]), sink_tokens=-1, window=1)),
    "negative prefix": ("prefix", ValueError, lambda: IntervalMask.prefix_lm(-1, 4)),
    "prefix is a float": ("prefix", TypeError, lambda: IntervalMask.prefix_lm(torch.ones(2), 4)),
    "negative condition": ("conditions", ValueError, lambda: IntervalMask.easycontrol(3, [-1])),
    "blocks of no frames": ("block_frames", ValueError, lambda: IntervalMask.frame_sink(4, 2, 1, 2, 0)),
    "negative frames": ("frames", ValueError, lambda: IntervalMask.frame_sink(-4, 2, 1, 2)),
    "pinned reversed": ("pinned", ValueError, lambda: IntervalMask.frame_sink(4, 2, 1, 2, 1, (3, 2))),
    "negative image": ("height", ValueError, lambda: IntervalMask.cca(-2, 2)),
    "lookahead is a float": ("ahead", TypeError, lambda: IntervalMask.lookahead(torch.ones(3))),
    "lookahead without heads": ("ahead", ValueError, lambda: IntervalMask.lookahead(torch.ones(2, 3).int())),
    "negative left": ("left", ValueError, lambda: IntervalMask.lookahead(torch.ones(3).int(), -1)),
    "spans are floats": ("start", TypeError, lambda: IntervalMask.spans(*(torch.ones(1, 1, 3, 1),) * 2, 3)),
    "negative window of spans": (
        "window",
        ValueError,
        lambda: IntervalMask.spans(*(torch.zeros(1, 1, 3, 1, dtype=torch.int32),) * 2, 3, window=-1),
    ),
    "negative window": ("window", ValueError, lambda: IntervalMask.sliding(-1)),
    "window is a float": ("window", TypeError, lambda: IntervalMask.sliding(2.0)),  # type: ignore[arg-type]
    "negative size": ("tq", ValueError, lambda: IntervalMask.causal(-1)),
    "dense is a float": ("mask", TypeError, lambda: IntervalMask.from_dense(torch.ones(3, 4))),
    "dense has one dimension": ("mask", ValueError, lambda: IntervalMask.from_dense(torch.ones(3) > 0)),
    "cu_seqlens from 1": ("cu_seqlens", ValueError, lambda: IntervalMask.packed(torch.tensor([1, 3]))),
    "cu_seqlens decreases": ("cu_seqlens", ValueError, lambda: IntervalMask.packed(torch.tensor([0, 3, 2]))),
    "cu_seqlens is float": ("cu_seqlens", TypeError, lambda: IntervalMask.packed(torch.tensor([0.0, 3.0]))),
    "cu_seqlens_k is longer": (
        "cu_seqlens_k",
        ValueError,
        lambda: IntervalMask.packed(torch.tensor([0, 3]), torch.tensor([0, 3, 4])),
    ),
    "image outside": ("images", ValueError, lambda: IntervalMask.mma(9, [(2, 10)], [(5, 8)])),
    "questions missing": ("questions", ValueError, lambda: IntervalMask.mma(9, [(0, 1), (2, 3), (4, 5)], [(5, 6), (6, 7)])),
    "more sinks than frames": ("sink_frames", ValueError, lambda: IntervalMask.frame_sink(4, 2, 3, 2)),
    "dense without sizes": ("tq, tk", ValueError, lambda: IntervalMask.causal().to_dense()),
    "complement without sizes": ("mask", ValueError, lambda: ~IntervalMask.causal()),
    "union of other sizes": ("other", ValueError, lambda: IntervalMask.causal(4) | IntervalMask.causal(5)),
    "closed outside": ("lo, hi", ValueError, lambda: IntervalMask.causal(4).is_closed(0, 5)),
    "closed of a rectangle": ("mask", ValueError, lambda: IntervalMask.causal(4, 5).is_closed(0, 2)),
    "plan of a plain mask": ("mask", ValueError, lambda: IntervalMask.causal(4).plan()),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named(case: str) -> None:
    name, kind, call = WRONG[case]
    with pytest.raises(kind, match=f"^{name}: "):
        call()


def test_debugging_checks_indices_again(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = IntervalMask.from_dense(torch.ones(3, 4) > 0)
    assert mask.ends is not None
    mask.ends[0, 0, 1] = 9
    mask.lower(3, 4)  # kernels clamp
    monkeypatch.setattr(f"{IntervalMask.__module__}._DEBUG", True)
    with pytest.raises(ValueError, match=r"^starts: .*\[0, 9\)"):
        mask.lower(3, 4)


def test_plain_masks_take_the_sizes_of_the_call() -> None:
    mask = IntervalMask.sink(2, 3)
    assert mask.to_dense(4, 6).shape == (1, 1, 4, 6) and mask.tq is None
    assert (mask | IntervalMask.full(4, 6)).to_dense().all()
    assert "sink_tokens=2" in repr(mask) and "intervals" in repr(mask.materialize(4, 6))
    for rows, keys in ((5, 6), (4, 7), (4, 5)):
        with pytest.raises(ValueError, match=rf"^mask: expected {rows} rows and {keys} keys"):
            IntervalMask.causal(4, 6).lower(rows, keys)


# --- tensors that are written to ----------------------------------------


def written_case() -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    starts = torch.zeros(1, 1, 200, 1, dtype=torch.int32)
    return starts, torch.full_like(starts, 40), tuple(torch.randn(1, 200, 2, 16) for _ in range(3))


@backend_params("interval_attention", "native", "triton", "reference")
@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_follows_its_own_tensors_and_no_others(backend: str, inference: bool) -> None:
    """What kernels keep of it, too: the tiles of keys that a tile of rows visits."""
    starts, ends, (q, k, v) = written_case()
    with torch.inference_mode(inference):
        mask = IntervalMask(starts, ends, tk=200)
        parts = IntervalMask.from_dense(torch.zeros(200, 200, dtype=torch.bool))

        def seen(mask: IntervalMask, stop: int) -> bool:
            out = interval_attention(q, k, v, mask, backend=backend)
            expected = v[:, :stop].mean(1, keepdim=True).expand_as(v) if stop else torch.zeros_like(v)
            uniform = interval_attention(torch.zeros_like(q), k, v, mask, backend=backend)
            torch.testing.assert_close(uniform, expected, atol=1e-5, rtol=1e-4)
            return bool(out.isfinite().all())

        assert seen(mask, 40) and seen(parts, 0)
        ends.fill_(190)
        assert seen(mask, 40)  # made from them, once
        mask.ends.fill_(190)
        assert seen(mask, 190)
        mask.ends[:] = 70
        assert seen(mask, 70)
        mask.ends = torch.full_like(mask.ends, 130)
        assert seen(mask, 130)
        parts.starts.fill_(0)
        parts.ends.fill_(150)
        assert seen(parts, 150)
        alive = mask.with_key_lifetime(
            torch.zeros(1, 1, 200, dtype=torch.int32), key_stop := torch.full((1, 1, 200), 200).int()
        )
        key_stop.zero_()
        assert seen(alive, 130)
        alive.key_stop[..., 60:] = 0
        assert seen(alive, 60)


def test_a_predicate_is_of_the_mask_as_it_was() -> None:
    starts, ends, _ = written_case()
    twice = IntervalMask.spans(starts.repeat(1, 1, 1, 2), ends.repeat(1, 1, 1, 2), 200)
    for mask in (IntervalMask(starts, ends, tk=200), twice):
        predicate = mask.to_mask_mod()
        assert mask.ends is not None
        mask.ends.fill_(190)
        place = torch.tensor(100)
        assert not predicate(torch.tensor(0), torch.tensor(0), place, place)
