"""`SuperlinearKVCache` against lists: tokens, truncations, forks, exchanged rows in any order; as a state; errors."""

from __future__ import annotations

import copy
import io
import pickle
import random
from typing import Any

import pytest
import torch

from subquad import SuperlinearKVCache
from subquad.cache import State

Rows = list[list[float]]  # of each sequence, the number that its tokens are made of


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def made(numbers: Rows, width: int) -> torch.Tensor:
    """[B, T, 2, width] of numbers [B][T]."""
    return torch.tensor(numbers)[:, :, None, None] + torch.arange(2 * width).view(2, width) / 64


def cache_of(batch: int = 3, page: int | None = None, **options: Any) -> SuperlinearKVCache:
    return SuperlinearKVCache(batch, 2, 50, 8, v_head_dim=5, page_size=page, **options)


def append(cache: SuperlinearKVCache, numbers: Rows, **options: Any) -> None:
    if cache.search_keys is not None:
        options["search_keys"] = made(numbers, 8) + 0.5
    cache.append(made(numbers, 8), -made(numbers, 5), **options)


def filled(page: int | None = None, lens: tuple[int, ...] = (20, 33, 5), **options: Any) -> SuperlinearKVCache:
    cache = cache_of(len(lens), page, **options)
    column = torch.arange(max(lens)).expand(len(lens), -1)
    numbers = [[100.0 * row + i for i in range(max(lens))] for row in range(len(lens))]
    append(cache, numbers, positions=torch.where(column < torch.tensor(lens)[:, None], column, -1))
    return cache


def stored(cache: SuperlinearKVCache, row: int) -> list[float]:
    """The numbers of a row, after a check that all of its tensors hold them."""
    n = int(cache.seq_lens[row])
    found = {}
    for name in ("k", "v", "search_keys"):
        x = getattr(cache, name)
        if x is None:
            continue
        if cache.block_table is None:
            found[name] = x[row, :n]
        else:
            pages = cache.block_table[row][: -(-n // x.shape[1])]
            assert (pages >= 0).all()
            found[name] = x[pages.long()].flatten(0, 1)[:n]
    numbers: list[float] = found["k"][:, 0, 0].tolist()
    for name, sign, more in (("k", 1, 0.0), ("v", -1, 0.0), ("search_keys", 1, 0.5)):
        if name in found and n:
            assert torch.equal(found[name], sign * made([numbers], found[name].shape[2])[0] + more)
    return numbers


def holds(cache: SuperlinearKVCache, rows: Rows) -> None:
    assert cache.seq_lens.tolist() == [len(row) for row in rows]
    assert [stored(cache, i) for i in range(len(rows))] == rows


def counted(*caches: SuperlinearKVCache) -> None:
    """The caches of one pool hold what its counters say, and the last page of no row is another's where it is not full."""
    pages = caches[0]._pages
    if pages is None:
        return
    held = [int(p) for cache in caches for p in cache.block_table.flatten() if p >= 0]  # type: ignore[union-attr]
    users = [held.count(p) for p in range(pages.users.shape[0])]
    left = int(pages.left)
    assert pages.users.tolist() == users and left == users.count(0)
    assert sorted(pages.free[:left].tolist()) == [p for p, n in enumerate(users) if not n]
    for cache in caches:
        assert cache._pages is pages and cache.page_size is not None and cache.block_table is not None
        for row, n in enumerate(cache.seq_lens.tolist()):
            own = -(-n // cache.page_size)
            assert (cache.block_table[row] >= 0).sum() == own
            if n % cache.page_size:
                assert users[int(cache.block_table[row, own - 1])] == 1


LAYOUTS = pytest.mark.parametrize("page", [None, 16])


# --- against lists ----------------------------------------


ACTIONS = ["append"] * 4 + ["ragged"] * 3 + ["place", "back", "back", "rows", "select", "reset", "fork", "load"]


@LAYOUTS
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_random_streams(page: int | None, search: bool, seed: int) -> None:
    """Two caches of one pool, the second a fork that comes and goes."""
    chance = random.Random(seed)
    caches = [cache_of(page=page, separate_search_keys=search, num_pages=None if page is None else 30)]
    models: list[Rows] = [[[], [], []]]
    count = 0.0
    for _ in range(60):
        at = chance.randrange(len(caches))
        cache, rows = caches[at], models[at]
        action = chance.choice(
            ["append"] * 4 + ["ragged"] * 3 + ["place", "back", "back", "rows", "select", "reset", "fork", "load"]
        )
        if action in ("append", "ragged", "place"):
            width = chance.choice([0, 1, 1, 3, 16, 17])
            width = min(width, *(50 - len(row) for row in rows)) if rows else width
            numbers = [[count + 100 * i + j for j in range(width)] for i in range(len(rows))]
            count += 1
            starts = [chance.randint(0, len(row)) if action == "place" else len(row) for row in rows]
            options: dict[str, Any] = {}
            real = [[True] * width for _ in rows]
            if action == "place":
                options["positions"] = torch.tensor(starts)
            elif action == "ragged":
                real = [[chance.random() < 0.7 for _ in range(width)] for _ in rows]
                places = [
                    [s + sum(r[:j]) if r[j] else -1 for j in range(width)] for s, r in zip(starts, real, strict=True)
                ]
                options["positions"] = torch.tensor(places, dtype=torch.int32).view(len(rows), width)
            append(cache, numbers, **options) if width else cache.append(
                torch.zeros(len(rows), 0, 2, 8), torch.zeros(len(rows), 0, 2, 5), **options,
                **({"search_keys": torch.zeros(len(rows), 0, 2, 8)} if search else {}),
            )  # fmt: skip
            if width:
                for i, row in enumerate(rows):
                    del row[starts[i] :]
                    row += [n for n, kept in zip(numbers[i], real[i], strict=True) if kept]
        elif action == "back":
            lens = [chance.randint(0, len(row)) for row in rows]
            cache.truncate(torch.tensor(lens)) if chance.random() < 0.5 else cache.rollback(
                cache.seq_lens - torch.tensor(lens)
            )
            for row, n in zip(rows, lens, strict=True):
                del row[n:]
        elif action in ("rows", "select"):
            picked = [
                chance.randrange(len(rows)) for _ in range(len(rows) if action == "rows" else chance.randint(2, 3))
            ]
            (cache.reorder if action == "rows" else cache.select)(torch.tensor(picked))
            models[at] = [list(rows[i]) for i in picked]
        elif action == "reset":
            mask = [chance.random() < 0.5 for _ in rows]
            cache.reset(torch.tensor(mask))
            models[at] = [[] if gone else row for gone, row in zip(mask, rows, strict=True)]
        elif action == "fork" and len(caches) == 1:
            caches.append(cache.fork())
            models.append([list(row) for row in rows])
        elif action == "fork":
            caches.pop().reset()
            models.pop()
        elif len(caches) == 1:
            state = copy.deepcopy(cache.state_dict())
            caches[0] = cache_of(2, page, separate_search_keys=search, num_pages=None if page is None else 7)
            caches[0].load_state_dict(state)
        for one, model in zip(caches, models, strict=True):
            holds(one, model)
        counted(*caches)


# --- pages ----------------------------------------


def test_a_pool_smaller_than_all_rows() -> None:
    """Pages go where tokens are, and come back."""
    cache = cache_of(3, 16, num_pages=5)
    append(cache, [[float(i) for i in range(16)]] * 3)
    append(cache, [[1.0, 2.0]] * 3, positions=torch.tensor([[16, 17], [16, 17], [-1, -1]]))
    before, table = copy.deepcopy(cache), cache.block_table
    assert table is not None and int(cache._pages.left) == 0  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"^num_pages: expected 1 more pages of the pool of 5, of which 0 are free"):
        append(cache, [[3.0]] * 3)
    assert same(cache, before)
    cache.reset(torch.tensor([True, False, False]))
    append(cache, [[3.0]] * 3, positions=torch.tensor([[-1], [18], [16]]))
    assert cache.seq_lens.tolist() == [0, 19, 17]
    counted(cache)


def test_forks_share_full_pages() -> None:
    cache = filled(16, (32, 33, 5))
    taken = lambda: int((cache._pages.users > 0).sum())  # type: ignore[union-attr]  # noqa: E731
    assert taken() == 6
    fork = cache.fork()
    assert taken() == 8 and torch.equal(fork.block_table[:2, :2], cache.block_table[:2, :2])  # type: ignore[index]
    both = [[stored(x, i) for i in range(3)] for x in (cache, fork)]
    assert both[0] == both[1] and fork.k is cache.k
    append(fork, [[7.0]] * 3)
    cache.truncate(torch.tensor([17, 0, 5]))
    append(cache, [[8.0]] * 3)
    assert stored(fork, 0) == [*both[0][0], 7.0] and stored(cache, 0) == [*both[0][0][:17], 8.0]
    assert stored(fork, 1) == [*both[0][1], 7.0] and stored(fork, 2) == [*both[0][2], 7.0]
    counted(cache, fork)
    fork.reset()
    counted(cache)


def test_beams_share_their_prompt() -> None:
    cache = filled(16, (40,), num_pages=6)
    cache.select(torch.tensor([0, 0, 0]))
    assert cache.block_table is not None and (cache.block_table[:, :2] == cache.block_table[0, :2]).all()
    append(cache, [[1.0], [2.0], [3.0]])
    assert [stored(cache, i)[-1] for i in range(3)] == [1.0, 2.0, 3.0]
    counted(cache)
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match=r"^num_pages: "):
        cache.fork()
    with pytest.raises(ValueError, match=r"^num_pages: "):
        cache.select(torch.tensor([0, 1, 2, 0, 1]))
    assert same(cache, before)
    counted(cache)


def test_a_cache_that_is_loaded_leaves_its_pool_to_the_fork() -> None:
    cache = filled(16, num_pages=12)
    state, rows = copy.deepcopy(cache.state_dict()), [stored(cache, i) for i in range(3)]
    fork = cache.fork()
    cache.load_state_dict(state)
    counted(fork), counted(cache)
    append(fork, [[float(i) for i in range(17)]] * 3)
    holds(cache, rows)
    counted(fork)


def test_without_pages_a_fork_is_a_copy() -> None:
    cache = filled()
    fork = cache.fork()
    append(fork, [[7.0]] * 3)
    fork.k.zero_()
    assert cache.seq_lens.tolist() == [20, 33, 5] and stored(cache, 1) == [100.0 + i for i in range(33)]


@LAYOUTS
def test_what_cannot_be_read_saturates(page: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: what does not fit is not stored, nobody else's tokens are touched, and `seq_lens` tells."""
    from subquad import _checks

    cache = filled(page, (49, 20, 5), num_pages=None if page is None else 8)
    rows = [stored(cache, i) for i in range(3)]
    monkeypatch.setattr(_checks, "readable", lambda _: False)
    append(cache, [[1.0, 2.0, 3.0]] * 3)
    assert cache.seq_lens.tolist() == [50, 23, 8] and stored(cache, 0) == [*rows[0], 1.0]
    append(cache, [[float(i) for i in range(20)]] * 3)
    assert cache.seq_lens.tolist() == ([50, 43, 28] if page is None else [50, 43, 16])
    assert stored(cache, 1) == [*rows[1], 1.0, 2.0, 3.0, *(float(i) for i in range(20))]
    assert stored(cache, 2)[:8] == [*rows[2], 1.0, 2.0, 3.0] and stored(cache, 0) == [*rows[0], 1.0]
    counted(cache)
    cache.rollback(torch.tensor([60, 0, -3]))
    assert cache.seq_lens.tolist()[:2] == [0, 43]
    cache.truncate(1000)
    assert cache.seq_lens.tolist()[:2] == [0, 43]
    counted(cache)


# --- as a state ----------------------------------------


def same(a: SuperlinearKVCache, b: SuperlinearKVCache) -> bool:
    one, other = a.tensors(), b.tensors()
    tensors = one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())
    if not tensors or a._pages is None or b._pages is None:
        return tensors and a._pages is b._pages
    return torch.equal(a._pages.users, b._pages.users) and torch.equal(a._pages.left, b._pages.left)


@LAYOUTS
@pytest.mark.parametrize("search", [False, True])
def test_copies_and_files(page: int | None, search: bool) -> None:
    cache = filled(page, separate_search_keys=search)
    assert isinstance(cache, State)
    loaded = cache_of(5, page, separate_search_keys=search)
    file = io.BytesIO()
    torch.save(cache.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    beside = cache_of(3, page, separate_search_keys=search)
    beside.load_state_dict(cache.state_dict())
    for other in (loaded, beside, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert same(other, cache)
        rows = [stored(cache, i) for i in range(3)]
        append(other, [[1.0]] * 3)
        holds(other, [[*row, 1.0] for row in rows])
        counted(other)
        other.k.zero_()
        assert [stored(cache, i) for i in range(3)] == rows
    assert cache.seq_lens.tolist() == [20, 33, 5]


@LAYOUTS
def test_the_protocol(page: int | None) -> None:
    cache = filled(page)
    assert cache.seen is cache.seq_lens and cache.kept == 5 and cache_of(0, page).kept == 0
    cache.keep(3)
    places = {name: x.data_ptr() for name, x in cache.tensors().items()}
    cache.reorder(torch.tensor([1, 1, 0]))
    cache.rollback(2)
    cache.truncate(torch.tensor([30, 3, 18], dtype=torch.int32))
    cache.reset(torch.tensor([False, True, False]))
    cache.to("cpu")
    append(cache, [[1.0]] * 3)
    assert cache.seq_lens.tolist() == [31, 1, 19]
    assert places == {name: x.data_ptr() for name, x in cache.tensors().items()}
    cache.reset()
    assert cache.seq_lens.tolist() == [0, 0, 0]
    tensors = sum(x.nbytes for x in cache.tensors().values())
    assert cache.nbytes == tensors + (0 if page is None else 4 * 2 * cache.k.shape[0] + 8)
    with pytest.raises(ValueError, match=r"^state: expected names of a SuperlinearKVCache, got 'x'"):
        cache.put("x", torch.zeros(1))


def test_shapes_and_repr() -> None:
    flat, paged = cache_of(dtype=torch.bfloat16), cache_of(page=16, num_pages=7, separate_search_keys=True)
    assert flat.k.shape == (3, 50, 2, 8) and flat.v.shape == (3, 50, 2, 5) and flat.k.dtype is torch.bfloat16
    assert paged.k.shape == paged.search_keys.shape == (7, 16, 2, 8) and paged.block_table.shape == (3, 4)  # type: ignore[union-attr]
    assert cache_of(page=16).k.shape[0] == 12
    assert repr(flat) == (
        "SuperlinearKVCache(batch=3, num_kv_heads=2, max_len=50, head_dim=8, v_head_dim=5, dtype=torch.bfloat16, device=cpu)"
    )
    assert repr(paged).endswith("device=cpu, page_size=16, num_pages=7, separate_search_keys=True)")


def test_autocast_writes_the_dtype_of_the_cache() -> None:
    cache = cache_of(1)
    with torch.autocast("cpu", torch.bfloat16):
        cache.append(torch.ones(1, 2, 2, 8, dtype=torch.bfloat16), torch.ones(1, 2, 2, 5))
    assert (cache.k[0, :2] == 1).all() and cache.seq_lens.tolist() == [2]


# --- what is refused ----------------------------------------

MADE: list[tuple[dict[str, Any], str, type[Exception]]] = [
    ({"batch": -1}, "batch", ValueError),
    ({"batch": 1.0}, "batch", TypeError),
    ({"num_kv_heads": 0}, "num_kv_heads", ValueError),
    ({"max_len": 0}, "max_len", ValueError),
    ({"max_len": 2**31}, "max_len", ValueError),
    ({"max_len": None}, "max_len", TypeError),
    ({"head_dim": 257}, "head_dim", ValueError),
    ({"v_head_dim": 0}, "v_head_dim", ValueError),
    ({"dtype": torch.int8}, "dtype", TypeError),
    ({"page_size": 8}, "page_size", ValueError),
    ({"page_size": 24}, "page_size", ValueError),
    ({"page_size": 16.0}, "page_size", TypeError),
    ({"num_pages": 3}, "num_pages", ValueError),
    ({"page_size": 16, "num_pages": 0}, "num_pages", ValueError),
    ({"page_size": 16, "num_pages": 2**70}, "num_pages", ValueError),
    ({"batch": 2**70}, "batch", ValueError),
    ({"page_size": 2**70}, "page_size", ValueError),
    ({"device": "x"}, "device", ValueError),
    ({"device": 1.5}, "device", ValueError),
    ({"separate_search_keys": 1}, "separate_search_keys", TypeError),
]


@pytest.mark.parametrize(("changed", "name", "kind"), MADE, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_caches_that_cannot_be(changed: dict[str, Any], name: str, kind: type[Exception]) -> None:
    good = {"batch": 2, "num_kv_heads": 2, "max_len": 50, "head_dim": 8}
    with pytest.raises(kind, match=f"^{name}: expected"):
        SuperlinearKVCache(**{**good, **changed})


K, V = torch.zeros(3, 2, 2, 8), torch.zeros(3, 2, 2, 5)
APPENDED: dict[str, tuple[dict[str, Any], str, type[Exception]]] = {
    "no keys": ({"k": None}, "k", TypeError),
    "no values": ({"v": 3}, "v", TypeError),
    "keys of another dtype": ({"k": K.double()}, "k", TypeError),
    "keys of another batch": ({"k": K[:2]}, "k", ValueError),
    "keys of other heads": ({"k": K[:, :, :1]}, "k", ValueError),
    "keys of three dimensions": ({"k": K[:, 0]}, "k", ValueError),
    "values of another width": ({"v": K}, "v", ValueError),
    "values of other tokens": ({"v": V[:, :1]}, "v", ValueError),
    "search keys that are not wanted": ({"search_keys": K}, "search_keys", ValueError),
    "more than max_len": ({"k": torch.zeros(3, 18, 2, 8), "v": torch.zeros(3, 18, 2, 5)}, "k", ValueError),
    "positions as a list": ({"positions": [20, 33, 5]}, "positions", TypeError),
    "positions of floats": ({"positions": torch.zeros(3)}, "positions", TypeError),
    "positions of another batch": ({"positions": torch.zeros(2).int()}, "positions", ValueError),
    "positions of other tokens": ({"positions": torch.zeros(3, 3).int()}, "positions", ValueError),
    "a gap": ({"positions": torch.tensor([20, 34, 5])}, "positions", ValueError),
    "a gap in a row": ({"positions": torch.tensor([[20, 21], [33, 35], [5, 6]])}, "positions", ValueError),
    "a token twice": ({"positions": torch.tensor([[20, 21], [33, 33], [5, 6]])}, "positions", ValueError),
    "a token before 0": ({"positions": torch.tensor([20, -1, 5])}, "positions", ValueError),
    "below -1": ({"positions": torch.tensor([[20, 21], [-2, 33], [5, 6]])}, "positions", ValueError),
    "beyond max_len": ({"positions": torch.tensor([[20, 21], [33, 34], [2**40, 2**40 + 1]])}, "positions", ValueError),
    "a gradient": ({"k": K.clone().requires_grad_()}, "k", ValueError),
}


@LAYOUTS
@pytest.mark.parametrize("what", APPENDED)
def test_tokens_that_cannot_enter(page: int | None, what: str) -> None:
    changed, name, kind = APPENDED[what]
    cache = filled(page)
    before = copy.deepcopy(cache)
    with torch.enable_grad(), pytest.raises(kind, match=f"^{name}: "):
        cache.append(**{"k": K, "v": V, **changed})
    assert same(cache, before)


CALLS: dict[str, tuple[Any, str, type[Exception]]] = {
    "truncate to more": (lambda c: c.truncate(torch.tensor([20, 34, 5])), "lens", ValueError),
    "truncate to less than 0": (lambda c: c.truncate(-1), "lens", ValueError),
    "truncate to None": (lambda c: c.truncate(None), "lens", TypeError),
    "truncate another batch": (lambda c: c.truncate(torch.tensor([1])), "lens", ValueError),
    "truncate to floats": (lambda c: c.truncate(torch.ones(3)), "lens", TypeError),
    "take back more": (lambda c: c.rollback(6), "tokens", ValueError),
    "take back less than 0": (lambda c: c.rollback(torch.tensor([1, -1, 1])), "tokens", ValueError),
    "take back True": (lambda c: c.rollback(True), "tokens", TypeError),
    "keep less than 0": (lambda c: c.keep(-1), "tokens", ValueError),
    "reset by numbers": (lambda c: c.reset(torch.tensor([1, 0, 1])), "mask", TypeError),
    "reset another batch": (lambda c: c.reset(torch.tensor([True])), "mask", ValueError),
    "rows that are not there": (lambda c: c.select(torch.tensor([0, 3])), "rows", ValueError),
    "rows below 0": (lambda c: c.reorder(torch.tensor([0, -1, 1])), "rows", ValueError),
    "rows as a list": (lambda c: c.select([0]), "rows", TypeError),
    "other numbers of rows": (lambda c: c.reorder(torch.tensor([0, 1])), "rows", ValueError),
    "a state without k": (
        lambda c: c.load_state_dict({n: x for n, x in c.state_dict().items() if n != "k"}), "state", ValueError,
    ),
    "a state with more": (lambda c: c.load_state_dict(c.state_dict() | {"x": 1}), "state", ValueError),
    "a state of another length": (lambda c: c.load_state_dict(c.state_dict() | {"max_len": 60}), "max_len", ValueError),
    "a state of another width": (lambda c: c.load_state_dict(c.state_dict() | {"v": c.k}), "v", ValueError),
    "a state of another dtype": (lambda c: c.load_state_dict(c.state_dict() | {"k": c.k.half()}), "k", ValueError),
    "a state of other lens": (
        lambda c: c.load_state_dict(c.state_dict() | {"seq_lens": torch.tensor([51, 0, 0])}), "seq_lens", ValueError,
    ),
}  # fmt: skip


@LAYOUTS
@pytest.mark.parametrize("what", CALLS)
def test_calls_that_change_nothing(page: int | None, what: str) -> None:
    call, name, kind = CALLS[what]
    cache = filled(page)
    before = copy.deepcopy(cache)
    with pytest.raises(kind, match=f"^{name}: "):
        call(cache)
    assert same(cache, before)


def test_a_table_of_another_pool_is_refused() -> None:
    cache = filled(16)
    for table in (torch.full((3, 4), 12), torch.full((3, 4), -1)):
        with pytest.raises(ValueError, match=r"^block_table: expected"):
            cache.load_state_dict(cache.state_dict() | {"block_table": table.int()})
