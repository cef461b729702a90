"""What only the structure of the CUDA kernels makes special, run in the emulator."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from subquad.reference.span_search import span_search as reference
from subquad.testing.instruments import traffic

from .raw import RawCall, Results, assert_same

INF = torch.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INT32 = (-(2**31), 2**31 - 1)


class Call(RawCall):
    """One call of the raw operator: elements that every dtype holds and whose products have exact sums, so that ties are
    ties; queries at the last keys, stripes at every `apart`-th key before them."""

    operator = "span_search_fwd"
    rows = ("q", "position", "first", "last", "back", "ahead")

    def __init__(
        self,
        tokens: int = 2,
        keys: int = 70,
        kv_heads: int = 2,
        group: int = 1,
        d: int = 8,
        *,
        batch: int = 1,
        spans: int = 3,
        apart: int = 1,
        per_group: bool = False,
        masked: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(tokens * 1000 + keys)
        place = torch.arange(keys - tokens, keys, dtype=torch.int32).expand(batch, tokens).contiguous()
        self.args: dict[str, Any] = {
            "q": self.elements(batch, tokens, kv_heads * group, d).to(dtype),
            "k": self.elements(batch, keys, kv_heads, d).to(dtype),
            "position": place,
            "first": self.integers(0, 3, batch, tokens),
            "last": place - 2,
            "back": self.integers(0, 9, batch, tokens),
            "ahead": self.integers(0, 9, batch, tokens),
            "offsets": torch.arange(1, keys + 1, apart, dtype=torch.int32),
            "key_mask": self.integers(0, 3, batch, keys) > 0 if masked else None,
            "block_table": None,
            "num_spans": spans,
            "scale": 0.5,
            "per_group": per_group,
        }

    def elements(self, *shape: int) -> torch.Tensor:
        return torch.randint(-8, 9, shape, generator=self.generator) / 4

    def check(self) -> Results:
        found = self.run()
        wide = {n: self.args[n].double() for n in ("q", "k")}
        for name, x, want in zip(
            ("score", "anchor", "start", "end"), found, reference(**(self.args | wide)), strict=True
        ):
            assert x.is_contiguous() and x.dtype == (torch.float32 if name == "score" else torch.int32)
            assert torch.equal(x, want.to(x.dtype)), name
        return found


@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("keys", [1, 2, 31, 32, 33, 64, 65, 700])
def test_stripes_around_shares(emulator: ctypes.CDLL, keys: int, per_group: bool) -> None:
    call = Call(1, keys, 2, 3, spans=8, per_group=per_group)
    call.check()
    assert call.traffic(emulator).launches == (1 if keys <= 32 else 2)


@pytest.mark.parametrize("spans", [1, 8])
@pytest.mark.parametrize("per_group", [False, True])
def test_the_farther_of_equals_in_all_shares(emulator: ctypes.CDLL, per_group: bool, spans: int) -> None:
    call = Call(2, 300, 1, 2, spans=spans, per_group=per_group)
    call.args["k"].fill_(0.25)
    call.args["q"].abs_()
    call.args["k"][0, [250, 20]] = 0.5  # in different shares
    anchor = call.check()[1]
    first = call.args["first"]
    wanted = [20, 250, *range(9)][:spans]
    for t in range(2):
        others = [int(first[0, t]) + n for n in range(6)]
        assert anchor[0, t, 0].tolist() == [*wanted[:2], *others][:spans]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 7, 33, 64, 256])
def test_head_dimensions(emulator: ctypes.CDLL, dtype: torch.dtype, d: int) -> None:
    Call(3, 90, 2, 2, d, batch=2, masked=True, dtype=dtype).check()


@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("group", [1, 4, 5, 33, 300])
def test_any_number_of_heads(emulator: ctypes.CDLL, group: int, per_group: bool) -> None:
    Call(2, 80, 2 if group < 33 else 1, group, spans=2, per_group=per_group).check()


def test_bits_depend_on_the_row_alone(emulator: ctypes.CDLL) -> None:
    """Among many queries shares are longer, and one share needs no merging."""
    call = Call(530, 600, 1, 2, 12, spans=5, apart=3)
    found = call.check()
    assert call.traffic(emulator).launches == 1 and call.token(3).traffic(emulator).launches == 2
    for n in (0, 200, 529):
        assert_same(call.token(n).check(), tuple(x[:, n : n + 1] for x in found), f"token {n}")


@pytest.mark.slow
def test_a_long_prefill_goes_in_runs_of_tokens(emulator: ctypes.CDLL) -> None:
    """128 shares of 256 heads are 512 KB of scratch a token: 128 tokens are a launch's."""
    call = Call(130, 4096, 1, 256, 1, spans=1)
    call.args["position"].fill_(3)
    call.args["position"][0, [0, 127, 128, 129]] = torch.tensor([40, 90, 5, 70], dtype=torch.int32)
    found: list[torch.Tensor] = []
    assert traffic(emulator, lambda: found.extend(call.run())).launches == 4
    for n in (0, 127, 128):
        assert_same(call.token(n).check(), tuple(x[:, n : n + 1] for x in found), f"token {n}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "passes"), [(1, 1), (32, 1), (33, 2)])
def test_heads_share_the_keys_that_are_loaded(
    emulator: ctypes.CDLL, group: int, passes: int, dtype: torch.dtype
) -> None:
    """Keys of stripes once for 32 heads, and nothing of other keys."""
    call = Call(1, 2000, 1, group, 128, apart=10, dtype=dtype)
    call.args["first"].fill_(1000)
    rows = 100 * 128 * dtype.itemsize * passes
    # Every lane has the offset of its key, every block the queries; then what the shares chose.
    others = 100 * 32 * 4 * passes + 4 * group * 128 * dtype.itemsize + 7 * 128 * 12 + group * 7 * 3 * 16 * 4
    loaded = call.traffic(emulator).loaded
    assert rows <= loaded <= rows + others


def test_what_is_no_stripe_is_never_touched(emulator: ctypes.CDLL) -> None:
    call = Call(2, 200, 2, 2, apart=3, masked=True)
    clean = call.check()
    stripes = call.args["position"][0, :, None] + 1 - call.args["offsets"]
    seen = (stripes >= call.args["first"][0, :, None]) & call.args["key_mask"][0, stripes.clamp(min=0)]
    hidden = torch.ones(200, dtype=torch.bool)
    hidden[stripes[seen]] = False
    assert 50 < int(hidden.sum()) < 150
    call.args["k"][0, hidden] = torch.nan
    assert_same(call.run(), clean, "hidden")


@pytest.mark.parametrize("per_group", [False, True])
def test_scores_that_are_not_finite(emulator: ctypes.CDLL, per_group: bool) -> None:
    """NaN and -inf are never chosen, inf before all others, in the first share and in the last."""
    call = Call(1, 300, 1, 2, 1, spans=8, per_group=per_group)
    call.args["q"].fill_(1.0)
    call.args["k"].fill_(-INF)
    call.args["first"].fill_(0)
    values = [torch.nan, INF, 0.5, -1.0, torch.nan, INF]
    call.args["k"][0, [0, 1, 2, 150, 298, 299], 0, 0] = torch.tensor(values)
    score, anchor, *_ = call.check()
    assert anchor[0, 0, 0].tolist() == [1, 299, 2, 150, -1, -1, -1, -1]
    assert score[0, 0, 0].tolist() == [INF, INF, 0.25, -0.5, *[-INF] * 4]


def test_positions_are_not_trusted(emulator: ctypes.CDLL) -> None:
    """The emulator refuses what lies outside the tensors."""
    call = Call(5, 60, 1, 2, batch=2)
    for name in ("position", "first", "last", "back", "ahead"):
        call.args[name] = call.integers(*INT32, 2, 5)
        call.args[name][0, :2] = torch.tensor(INT32)
    call.run()
    call.args["offsets"] = call.integers(*INT32, 60).sort().values
    call.run()
    call = Call(2, 60, 1, 2)
    call.args["position"][:] = torch.tensor([300, -7])  # some stripes are keys, none are
    _, anchor, *_ = call.check()
    assert bool((anchor[0, 1] == -1).all())


@pytest.mark.parametrize("page", [1, 8, 64])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_pages_in_any_order(emulator: ctypes.CDLL, dtype: torch.dtype, page: int) -> None:
    call = Call(2, 192, 2, 2, 24, batch=2, dtype=dtype, masked=True)
    want = call.check()
    pages, rows = 192 // page, call.args["k"]
    order = torch.randperm(2 * pages + 3, generator=call.generator)[: 2 * pages]
    call.args["k"] = torch.full((2 * pages + 3, page, *rows.shape[2:]), torch.nan, dtype=dtype)
    call.args["k"][order] = rows.unflatten(1, (pages, page)).flatten(0, 1)
    call.args["block_table"] = order.view(2, pages).int()
    assert_same(call.run(), want, "pages")
    call.args["block_table"] = call.integers(*INT32, 2, pages)  # refused outside of the pool
    call.run()


@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_and_schedule_do_not_change_a_bit(emulator: ctypes.CDLL, dtype: torch.dtype, per_group: bool) -> None:
    call = Call(3, 150, 2, 3, 24, batch=2, spans=5, masked=True, per_group=per_group, dtype=dtype)
    call.args |= {name: torch.randn(call.args[name].shape, generator=call.generator).to(dtype) for name in ("q", "k")}
    want = call.run()
    try:
        for seed in (2, 3, 4):
            emulator.subquad_simt_set_seed(seed)
            assert_same(call.run(), want, f"seed {seed}")
    finally:
        emulator.subquad_simt_set_seed(1)
    for name in ("q", "k"):  # heads before time, and one element into a buffer: nothing is aligned
        tensor = call.args[name]
        moved = tensor.transpose(1, 2)
        buffer = torch.full((tensor.numel() + 1,), torch.nan, dtype=dtype)
        call.args[name] = buffer[1:].view(moved.shape).copy_(moved).transpose(1, 2)
    assert_same(call.run(), want, "layout")


@pytest.mark.parametrize("paged", [False, True])
def test_offsets_beyond_32_bits(emulator: ctypes.CDLL, paged: bool) -> None:
    call = Call(2, 4, 1, 1, 24, dtype=torch.bfloat16)
    want = call.check()
    stride = 2**31 // 3 + 8  # the last of the four keys starts beyond element 2^31; only touched pages take memory
    far = torch.empty(3 * stride + 24, dtype=torch.bfloat16)
    rows = call.args["k"]
    if paged:
        call.args["block_table"] = torch.arange(4, dtype=torch.int32)[None]
        call.args["k"] = far.as_strided((4, 1, 1, 24), (stride, 24, 24, 1)).copy_(rows.transpose(0, 1))
    else:
        call.args["k"] = far.as_strided((1, 4, 1, 24), (0, stride, 24, 1)).copy_(rows)
    assert_same(call.run(), want, "far")


@pytest.mark.parametrize(("batch", "tokens", "keys"), [(0, 2, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
def test_empty(emulator: ctypes.CDLL, batch: int, tokens: int, keys: int) -> None:
    score, anchor, start, end = Call(tokens, keys, batch=batch).check()
    assert score.shape == (batch, tokens, 2, 3)
    if keys == 0:
        assert bool((score == -INF).all()) and all(bool((x == -1).all()) for x in (anchor, start, end))


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("k", torch.zeros(1, 70, 2, 7)),
        ("q", torch.zeros(1, 2, 2, 257)),
        ("position", torch.zeros(1, 2, dtype=torch.int64)),
        ("ahead", torch.zeros(1, 3, dtype=torch.int32)),
        ("offsets", torch.zeros(1, 2, dtype=torch.int32)),
        ("key_mask", torch.ones(1, 69, dtype=torch.bool)),
        ("num_spans", 9),
    ],
)
def test_errors_name_the_argument(emulator: ctypes.CDLL, name: str, bad: Any) -> None:
    call = Call()
    call.args[name] = bad
    called = "q_search" if name == "q" else name
    with pytest.raises(RuntimeError, match=rf"\b{called}: expected"):
        call.run()
