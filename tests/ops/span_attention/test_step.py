"""`superlinear_attention_step`: every row is that of the whole prompt, whatever the cache and whatever lies behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import subquad
from subquad import SuperlinearConfig, SuperlinearKVCache
from subquad.recipes import superlinear as module

from ..span_search.dense import README, RELEASED, exact
from .dense import error, superlinear, with_backends

CLOSE = 1e-6
CONFIGS = {
    "default": SuperlinearConfig(),
    "README": README,
    "group": SuperlinearConfig(sw_index=1, route_per="group", num_spans=5, forward_factor=0.5),
    "fractional": SuperlinearConfig(
        sw_index=2, backward_factor=3.0, span_power=0.55, search_power=0.55, inv_search_power_int=None
    ),
}
configurations = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def drawn(batch: int, tokens: int, heads: int = 4, kv_heads: int = 2, d: int = 8) -> tuple[torch.Tensor, ...]:
    """q_search, q, k, v."""
    q_search, k = exact(batch, tokens, heads, d), exact(batch, tokens, kv_heads, d)
    return q_search, torch.randn(batch, tokens, heads, d), k, torch.randn(batch, tokens, kv_heads, d)


def dirty(cache: SuperlinearKVCache) -> SuperlinearKVCache:
    """NaN wherever no token is."""
    for x in (cache.k, cache.v, cache.search_keys):
        if x is not None:
            x.fill_(torch.nan)
    return cache


@with_backends()
@configurations
def test_decoding_at_every_position(config: SuperlinearConfig, backend: str) -> None:
    """Positions 0..200 as rows of a batch, each with NaN behind its own: outputs and places of the prompt's rows."""
    n = 201 if backend in ("native", "reference") else 40
    q_search, q, k, v = drawn(1, n, 2, 1)
    whole, aux = subquad.superlinear_attention(q_search, q, k, v, config=config, return_aux=True, backend=backend)
    behind = (torch.arange(n) > torch.arange(n)[:, None])[:, :, None, None]
    keys, values = (x.expand(n, -1, -1, -1).masked_fill(behind, torch.nan) for x in (k, v))
    rows = [x.transpose(0, 1) for x in (q_search, q)]
    found = subquad.superlinear_attention_step(*rows, (keys, values), torch.arange(n), config=config, backend=backend)
    assert error(found[:, 0], whole[0]) < CLOSE
    places = subquad.span_search(rows[0], keys, config=config, cache_position=torch.arange(n)[:, None], backend=backend)
    for name in ("anchor", "start", "end"):
        assert torch.equal(getattr(places, name)[:, 0], getattr(aux.search, name)[0]), name


@with_backends()
@pytest.mark.parametrize("page", [None, 16, 32])
@configurations
def test_a_prompt_then_tokens(config: SuperlinearConfig, page: int | None, backend: str) -> None:
    """Chunks of 1, 7 and 64 and single tokens through a cache: spans cross its pages."""
    widths = (1, 7, 64, 1, 1, 30, 1)
    x = drawn(2, sum(widths))
    whole = subquad.superlinear_attention(*x, config=config, backend=backend)
    cache = dirty(SuperlinearKVCache(2, 2, 120, 8, page_size=page))
    begin = 0
    for width in widths:
        q_search, q, k, v = (y[:, begin : begin + width] for y in x)
        cache.append(k, v)
        out = subquad.superlinear_attention_step(
            q_search, q, cache, cache.seq_lens - width, config=config, backend=backend
        )
        assert error(out, whole[:, begin : begin + width]) < CLOSE
        begin += width
    assert cache.seq_lens.tolist() == [begin] * 2


@with_backends()
@pytest.mark.parametrize("page", [None, 16])
def test_rows_at_different_positions(page: int | None, backend: str) -> None:
    """Prompts of 5, 33, 0 and 60 tokens, then tokens for some rows; a row that waits comes out as 0."""
    lens = torch.tensor([5, 33, 0, 60])
    x = drawn(4, 70)
    whole = subquad.superlinear_attention(*x, config=README, backend=backend)
    cache = dirty(SuperlinearKVCache(4, 2, 70, 8, page_size=page, num_pages=None if page is None else 14))
    column = torch.arange(60)
    cache.append(x[2][:, :60], x[3][:, :60], positions=torch.where(column < lens[:, None], column, -1))
    assert torch.equal(cache.seq_lens, lens)
    for step in range(10):
        at = lens + step
        going = torch.tensor([True, step % 2 == 0, False, True])
        place = torch.where(going, torch.where(torch.arange(4) == 1, lens + (step + 1) // 2, at), -1)
        rows = [y[torch.arange(4), place.clamp(min=0)][:, None] for y in x]
        cache.append(rows[2], rows[3], positions=place[:, None])
        out = subquad.superlinear_attention_step(*rows[:2], cache, place, config=README, backend=backend)
        assert error(out[going, 0], whole[torch.arange(4), place.clamp(min=0)][going]) < CLOSE
        assert (out[~going] == 0).all()
    assert cache.seq_lens.tolist() == [15, 38, 0, 70]


@with_backends()
@pytest.mark.parametrize("page", [None, 16])
def test_truncate_and_write_again(page: int | None, backend: str) -> None:
    """Drafts that are thrown away, by truncation and by positions: nothing of them is seen."""
    x = drawn(2, 60)
    whole = subquad.superlinear_attention(*x, config=README, backend=backend)
    cache = dirty(SuperlinearKVCache(2, 2, 64, 8, page_size=page))
    cache.append(x[2][:, :40], x[3][:, :40])
    garbage = torch.full((2, 9, 2, 8), torch.nan)
    cache.append(garbage, garbage)
    cache.truncate(torch.tensor([40, 31]))
    cache.append(garbage, garbage)
    cache.rollback(torch.tensor([9, 9]))
    cache.append(garbage[:, :3], garbage[:, :3])
    place = torch.tensor([40, 31])
    for step in range(9):
        rows = [y[torch.arange(2), place + step][:, None] for y in x]
        cache.append(rows[2], rows[3], positions=place + step)
        out = subquad.superlinear_attention_step(*rows[:2], cache, place + step, config=README, backend=backend)
        assert error(out[:, 0], whole[torch.arange(2), place + step]) < CLOSE
    assert cache.seq_lens.tolist() == [49, 40]


@with_backends()
@pytest.mark.parametrize("page", [None, 16])
def test_separate_search_keys(page: int | None, backend: str) -> None:
    x, keys = drawn(1, 50), exact(1, 50, 2, 8)
    expected = superlinear(*x, README, search_keys=keys)
    cache = dirty(SuperlinearKVCache(1, 2, 50, 8, page_size=page, separate_search_keys=True))
    cache.append(x[2], x[3], search_keys=keys)
    at = torch.tensor([[49, 0, 17, 17]])
    rows = [y[:, at[0]] for y in x[:2]]
    out = subquad.superlinear_attention_step(*rows, cache, at, config=README, backend=backend)
    assert error(out, expected.out[:, at[0]]) < 2 * CLOSE
    triple = (x[2], x[3], keys)
    assert error(subquad.superlinear_attention_step(*rows, triple, at, config=README, backend=backend), out) < CLOSE


@with_backends()
def test_padding_of_a_static_cache(backend: str) -> None:
    """Left padding in the keys themselves, NaN there and behind: the row of the prompt."""
    x = drawn(2, 40)
    keep = torch.arange(40) >= torch.tensor([[7], [22]])
    keep[0, 19] = False
    whole = subquad.superlinear_attention(*x, config=README, attention_mask=keep, backend=backend)
    mask = torch.nn.functional.pad(keep, (0, 20), value=True)
    static = [torch.nn.functional.pad(y, (0, 0, 0, 0, 0, 20), value=torch.nan) for y in x[2:]]
    static = [y.masked_fill(~mask[:, :, None, None], torch.nan) for y in static]
    for at in (39, 25, 8, 3):
        rows = [y[:, at : at + 1] for y in x[:2]]
        place = torch.full((2,), at)
        out = subquad.superlinear_attention_step(
            *rows, tuple(static), place, config=README, attention_mask=mask, backend=backend
        )
        assert error(out, whole[:, at : at + 1]) < CLOSE


@with_backends("native", "reference")
def test_the_released_configuration(backend: str) -> None:
    x = drawn(1, 5_000, 2, 1, 16)
    at = torch.tensor([[2_030, 2_031, 2_032, 4_100, 4_999]])
    expected = superlinear(*(y[:, at[0]] for y in x[:2]), *x[2:], RELEASED, at)
    cache = SuperlinearKVCache(1, 1, 5_000, 16, page_size=64)
    cache.append(*x[2:])
    for given in (cache, (x[2], x[3])):
        rows = [y[:, at[0]] for y in x[:2]]
        assert (
            error(subquad.superlinear_attention_step(*rows, given, at, config=RELEASED, backend=backend), expected.out)
            < 2e-6
        )


@with_backends()
def test_few_and_many_queries_see_the_same_window(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a span and by interval attention."""
    x, calls = drawn(1, 60), []
    for name in ("span_window", "window"):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, f=function: (calls.append(name), f(*a))[1])
    many = subquad.superlinear_attention_step(
        *(y[:, 20:] for y in x[:2]), x[2:], torch.tensor([20]), config=README, backend=backend
    )
    few = subquad.superlinear_attention_step(
        *(y[:, 50:] for y in x[:2]), x[2:], torch.tensor([50]), config=README, backend=backend
    )
    assert calls == ["window", "span_window"]
    assert error(few, many[:, 30:]) < CLOSE


@with_backends()
def test_no_queries_and_no_rows(backend: str) -> None:
    q_search, q, k, v = drawn(2, 20)
    step = subquad.superlinear_attention_step
    assert step(q_search[:, :0], q[:, :0], (k, v), torch.tensor([3, 4]), backend=backend).shape == (2, 0, 4, 8)
    none = [y[:0] for y in (q_search, q, k, v)]
    assert step(*none[:2], tuple(none[2:]), torch.zeros(0, dtype=torch.int64), backend=backend).shape == (0, 20, 4, 8)


@pytest.mark.heavy
@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_steps(page: int | None, compiler: str) -> None:
    """One graph for all positions, in place: also where a page begins, and after a rollback."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    cache, eager = (SuperlinearKVCache(2, 2, 64, 8, page_size=page) for _ in range(2))

    @torch.compile(backend=counter, fullgraph=True)
    def step(
        q_search: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, back: torch.Tensor
    ) -> torch.Tensor:
        cache.append(k, v)
        out = subquad.superlinear_attention_step(
            q_search, q, cache, cache.seq_lens - 1, config=README, backend="reference"
        )
        cache.rollback(back)
        return out

    places = {name: x.data_ptr() for name, x in cache.tensors().items()}
    for i in range(50):
        x, back = drawn(2, 1), torch.tensor([i % 4 // 3, 0])
        eager.append(*x[2:])
        wanted = subquad.superlinear_attention_step(
            *x[:2], eager, eager.seq_lens - 1, config=README, backend="reference"
        )
        eager.rollback(back)
        assert torch.equal(step(*x, back), wanted)
    assert counter.frame_count == 1
    assert places == {name: x.data_ptr() for name, x in cache.tensors().items()}
    assert all(torch.equal(x, eager.tensors()[name]) for name, x in cache.tensors().items())


# --- what is refused ----------------------------------------


def cached(page: int | None = None) -> SuperlinearKVCache:
    cache = SuperlinearKVCache(2, 2, 20, 8, page_size=page)
    cache.append(torch.zeros(2, 10, 2, 8), torch.zeros(2, 10, 2, 8))
    return cache


ROW = torch.zeros(2, 1, 4, 8)
WRONG: dict[str, tuple[dict[str, Any], str, type[Exception]]] = {
    "no cache": ({"cache": None}, "cache", TypeError),
    "a cache of numbers": ({"cache": 3}, "cache", TypeError),
    "one tensor": ({"cache": (ROW,)}, "cache", ValueError),
    "four tensors": ({"cache": (ROW,) * 4}, "cache", ValueError),
    "no keys": ({"cache": (None, ROW)}, "k", TypeError),
    "no values": ({"cache": (ROW, None)}, "v", TypeError),
    "no positions": ({"positions": None}, "positions", TypeError),
    "an int": ({"positions": 9}, "positions", TypeError),
    "positions of floats": ({"positions": torch.ones(2)}, "positions", TypeError),
    "positions of another batch": ({"positions": torch.tensor([9])}, "positions", ValueError),
    "positions of other tokens": ({"positions": torch.zeros(2, 3).int()}, "positions", ValueError),
    "positions beyond seq_lens": ({"positions": torch.tensor([9, 10])}, "positions", ValueError),
    "positions below -1": ({"positions": torch.tensor([-2, 3])}, "positions", ValueError),
    "positions beyond the keys": (
        {"cache": (torch.zeros(2, 9, 2, 8),) * 2, "positions": torch.tensor([9, 3])}, "positions", ValueError,
    ),
    "config of an int": ({"config": 3}, "config", TypeError),
    "no q": ({"q": None}, "q", TypeError),
    "no q_search": ({"q_search": None}, "q_search", TypeError),
    "q_search of another shape": ({"q_search": torch.zeros(2, 1, 2, 8)}, "q_search", ValueError),
    "q of another dtype": ({"q": ROW.double(), "q_search": ROW.double()}, "q", TypeError),
    "q of another batch": ({"q": ROW[:1], "q_search": ROW[:1]}, "k", ValueError),
    "a mask of floats": ({"attention_mask": torch.ones(2, 20)}, "attention_mask", TypeError),
    "a mask too short": ({"attention_mask": torch.ones(2, 3).bool()}, "attention_mask", ValueError),
    "an unknown backend": ({"backend": "fast"}, "backend", ValueError),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(what: str) -> None:
    changed, name, kind = WRONG[what]
    arguments = {
        "q_search": ROW,
        "q": ROW,
        "cache": cached(),
        "positions": torch.tensor([9, 9]),
        "backend": "reference",
    }
    with pytest.raises(kind, match=f"^{name}: "):
        subquad.superlinear_attention_step(**{**arguments, **changed})


def test_gradients_through_pages() -> None:
    row = ROW.clone().requires_grad_()
    with torch.enable_grad():
        out = subquad.superlinear_attention_step(row, row, cached(), torch.tensor([9, 9]), backend="reference")
        assert out.requires_grad
        with pytest.raises(ValueError, match=r"^q_search: expected a tensor without requires_grad.*pages"):
            subquad.superlinear_attention_step(row, row, cached(16), torch.tensor([9, 9]), backend="reference")
        with pytest.raises(ValueError, match=r"^q: expected a tensor without requires_grad.*pages"):
            subquad.superlinear_attention_step(ROW, row, cached(16), torch.tensor([9, 9]), backend="reference")
