"""What only the structure of the CUDA kernels makes special, run in the emulator."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from subquad.reference.span_attention import span_attention as reference

from ..span_search.raw import RawCall, Results, assert_same

INF = torch.inf
KINDS = ["gated", "joint", "plain"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Call(RawCall):
    """One call of the raw operator: tensors from a seed; spans of 1 to `longest` keys, a base unless `based` is False."""

    operator = "span_attention_fwd"
    rows = ("q", "start", "end", "gate", "base_out", "base_lse")

    def __init__(
        self,
        tokens: int = 2,
        keys: int = 40,
        kv_heads: int = 2,
        group: int = 1,
        d: int = 8,
        dv: int | None = None,
        *,
        batch: int = 1,
        spans: int = 2,
        longest: int = 20,
        kind: str = "gated",
        based: bool = True,
        masked: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(tokens * 1000 + keys)
        rows = (batch, tokens, kv_heads * group)
        start = self.integers(0, max(keys, 1), *rows, spans)
        dv = dv or d
        self.args: dict[str, Any] = {
            "q": self.normal(*rows, d).to(dtype),
            "k": self.normal(batch, keys, kv_heads, d).to(dtype),
            "v": self.normal(batch, keys, kv_heads, dv).to(dtype),
            "start": start,
            "end": start + self.integers(0, longest, *rows, spans),
            "gate": torch.softmax(self.normal(*rows, spans), -1) if kind == "gated" else None,
            "base_out": self.normal(*rows, dv).to(dtype) if based else None,
            "base_lse": self.normal(*rows) if based else None,
            "key_mask": self.integers(0, 3, batch, keys) > 0 if masked else None,
            "block_table": None,
            "scale": 0.3,
        }

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def spans_are(self, *spans: tuple[int, int]) -> None:
        """The same spans for every row: first key, last key."""
        start, end = torch.tensor(spans, dtype=torch.int32).T
        like = self.args["start"]
        self.args |= {"start": start.expand_as(like).contiguous(), "end": end.expand_as(like).contiguous()}

    def check(self) -> Results:
        out, lse = self.run()
        wide = {n: self.args[n].double() for n in ("q", "k", "v")}
        want_out, want_lse = reference(**(self.args | wide))
        dtype = self.args["q"].dtype
        assert out.dtype == dtype and lse.dtype == torch.float32 and out.is_contiguous() and lse.is_contiguous()
        limit = LIMIT[dtype]
        torch.testing.assert_close(out.double(), want_out, rtol=limit, atol=limit)
        torch.testing.assert_close(lse.double(), want_lse.double(), rtol=1e-5, atol=1e-5)
        return out, lse


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 31, 511, 512, 513, 1024, 1025, 1500])
def test_lengths_around_pieces(emulator: ctypes.CDLL, length: int, kind: str) -> None:
    call = Call(1, 1600, 1, 2, kind=kind, based=length % 2 == 0)
    call.spans_are((37, 36 + length), (1600 - length, 1599))
    call.check()


def test_a_span_longer_than_all_pieces(emulator: ctypes.CDLL) -> None:
    """Above 64 pieces of 512 keys pieces grow."""
    call = Call(1, 40_000, 1, 1, 4, spans=1)
    call.spans_are((1234, 39_990))
    call.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "dv"), [(1, 3), (33, 7), (64, 256), (256, 1), (255, 200)])
def test_head_dimensions(emulator: ctypes.CDLL, dtype: torch.dtype, d: int, dv: int) -> None:
    call = Call(2, 50, 2, 2, d, dv, dtype=dtype, masked=True)
    call.args["scale"] = d**-0.5
    call.check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [1, 3, 7])
def test_heads_have_spans_of_their_own(emulator: ctypes.CDLL, group: int, kind: str) -> None:
    Call(3, 70, 2, group, 12, batch=2, spans=3, kind=kind, masked=True).check()


def test_bits_depend_on_the_span_alone(emulator: ctypes.CDLL) -> None:
    """One query has a block for every piece; among many, one block walks all pieces of a span."""
    call = Call(700, 1300, 2, 2, spans=3, longest=1)
    for name in ("start", "end"):
        call.args[name].fill_(-1 if name == "end" else 0)
        call.args[name][0, 7] = torch.tensor([[3, 400, 5], [0, 0, 900], [1, 2, 3], [0, 700, 1299]])
    call.args["end"][0, 7] += torch.tensor([[1200, 700, 0], [1299, 512, 399], [511, 512, 513], [999, 599, 9]])
    found = call.run()
    assert_same(call.token(7).check(), tuple(x[:, 7:8] for x in found), "alone")


def test_a_long_prefill_goes_in_runs_of_tokens(emulator: ctypes.CDLL) -> None:
    """Scratch for 64 pieces of 64 spans is 4 MB a token: 15 tokens are a launch's."""
    call = Call(17, 33_000, 1, 8, 1, 256, spans=8, longest=9, dtype=torch.bfloat16)
    call.args["end"][0, 16, 3, 4] = 32_999
    call.args["start"][0, 16, 3, 4] = 31_000
    found = call.run()
    for n in (0, 14, 15, 16):
        assert_same(call.token(n).run(), tuple(x[:, n : n + 1] for x in found), f"token {n}")
    assert call.traffic(emulator).launches == 4
    assert call.token(3).traffic(emulator).launches == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_of_spans_are_loaded_once(emulator: ctypes.CDLL, dtype: torch.dtype) -> None:
    """And nothing else: neither the other keys of the cache nor those that are masked."""
    call = Call(2, 3000, 2, 2, 64, 40, dtype=dtype, based=False)
    call.spans_are((100, 799), (2500, 2599))
    keys = 2 * 4 * 800
    width = (64 + 40) * dtype.itemsize
    queries, merge = (
        24 * 16 * 64 * dtype.itemsize,
        8 * 128 * 4 * 14,
    )  # by the lanes of blocks; gates and 3 shares of a row
    small = queries + merge
    loaded = call.traffic(emulator).loaded
    assert keys * width <= loaded <= keys * width + small
    call.args["key_mask"] = torch.ones(1, 3000, dtype=torch.bool)
    call.args["key_mask"][:, 200:500] = False
    seen = 2 * 4 * 500 * width
    loaded = call.traffic(emulator).loaded
    assert seen <= loaded <= seen + small + keys * 8  # lanes of a key read its byte of the mask


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_row_does_not_see_is_never_touched(emulator: ctypes.CDLL, kind: str) -> None:
    call = Call(2, 700, 2, 2, kind=kind, masked=True)
    call.spans_are((20, 60), (580, 640))
    call.args["key_mask"][:, 20] = True
    call.args["base_lse"][0, 1] = -INF
    clean = call.check()
    hidden = ~call.args["key_mask"][0]
    hidden[:20], hidden[61:580], hidden[641:] = True, True, True
    call.args["k"][0, hidden], call.args["v"][0, hidden] = torch.nan, INF
    call.args["base_out"][0, 1] = torch.nan
    assert_same(call.run(), clean, "hidden")
    call.args["v"][0, 20, 0, 3] = torch.nan
    out, lse = call.run()
    assert bool(out[0, :, :2, 3].isnan().all()) and not out[0, :, 2:].isnan().any() and not lse.isnan().any()


@pytest.mark.parametrize("kind", KINDS)
def test_spans_are_not_trusted(emulator: ctypes.CDLL, kind: str) -> None:
    """The emulator refuses what lies outside the tensors."""
    low, high = -(2**31), 2**31 - 1
    call = Call(1, 600, 1, 1, spans=8, kind=kind)
    call.spans_are((low, high), (high, low), (-5, 6), (590, 700), (600, 700), (low, -1), (30, 29), (high, high))
    out, lse = call.check()
    call.args["base_lse"].fill_(-INF)
    call.check()
    call.spans_are(*[(700, 20)] * 8)
    out, lse = call.check()
    assert not out.any() and bool((lse == -INF).all())


@pytest.mark.parametrize("page", [1, 16, 64])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_pages_in_any_order(emulator: ctypes.CDLL, dtype: torch.dtype, page: int) -> None:
    call = Call(2, 192, 2, 2, 24, 40, batch=2, longest=90, dtype=dtype, masked=True)
    want = call.check()
    pages = 192 // page
    order = torch.randperm(2 * pages + 3, generator=call.generator)[: 2 * pages]
    for name in ("k", "v"):
        rows = call.args[name]
        pool = torch.full((2 * pages + 3, page, *rows.shape[2:]), torch.nan, dtype=dtype)
        pool[order] = rows.unflatten(1, (pages, page)).flatten(0, 1)
        call.args[name] = pool
    call.args["block_table"] = order.view(2, pages).int()
    assert_same(call.run(), want, "pages")
    call.args["block_table"] = call.integers(-(2**31), 2**31 - 1, 2, pages)  # refused outside of the pool
    call.run()


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_and_schedule_do_not_change_a_bit(emulator: ctypes.CDLL, dtype: torch.dtype) -> None:
    call = Call(3, 1100, 2, 3, 24, 40, batch=2, longest=900, dtype=dtype, masked=True)
    want = call.check()
    try:
        for seed in (2, 3, 4):
            emulator.subquad_simt_set_seed(seed)
            assert_same(call.run(), want, f"seed {seed}")
    finally:
        emulator.subquad_simt_set_seed(1)
    for name in ("q", "k", "v"):  # heads before time, and one element into a buffer: nothing is aligned
        tensor = call.args[name]
        moved = tensor.transpose(1, 2)
        buffer = torch.full((tensor.numel() + 1,), torch.nan, dtype=dtype)
        call.args[name] = buffer[1:].view(moved.shape).copy_(moved).transpose(1, 2)
    assert_same(call.run(), want, "layout")


@pytest.mark.parametrize(("name", "paged"), [("k", False), ("v", True)])
def test_offsets_beyond_32_bits(emulator: ctypes.CDLL, name: str, paged: bool) -> None:
    call = Call(2, 4, 1, 1, 24, dtype=torch.bfloat16)
    call.spans_are((0, 3), (3, 3))
    want = call.run()
    stride = 2**31 // 3 + 8  # the last of the four keys starts beyond element 2^31; only touched pages take memory
    far = torch.empty(3 * stride + 24, dtype=torch.bfloat16)
    if paged:
        call.args["block_table"] = torch.arange(4, dtype=torch.int32)[None]
        call.args |= {n: call.args[n].transpose(0, 1).contiguous() for n in ("k", "v")}
        view = far.as_strided((4, 1, 1, 24), (stride, 24, 24, 1))
    else:
        view = far.as_strided((1, 4, 1, 24), (0, stride, 24, 1))
    call.args[name] = view.copy_(call.args[name])
    assert_same(call.run(), want, "far")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "tokens", "keys"), [(0, 2, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
def test_empty(emulator: ctypes.CDLL, batch: int, tokens: int, keys: int, kind: str) -> None:
    call = Call(tokens, keys, batch=batch, kind=kind)
    out, lse = call.check()
    assert out.shape == (batch, tokens, 2, 8) and lse.shape == (batch, tokens, 2, 2 if kind == "gated" else 1)


@pytest.mark.parametrize("score", [INF, -INF, torch.nan])
def test_scores_that_are_not_finite(emulator: ctypes.CDLL, score: float) -> None:
    """-inf is a weight of 0, alone too; NaN and inf are seen."""
    call = Call(1, 1200, 1, 1, 1, 1, spans=2, kind="joint", based=False)
    call.args["q"].fill_(1.0)
    call.args["k"][0, 700] = score
    call.spans_are((690, 710), (100, 1199))
    if score == -INF:
        call.check()
        call.spans_are((700, 700), (700, 700))
        out, lse = call.check()
        assert not out.any() and bool((lse == -INF).all())
    else:
        assert all(bool(x.isnan().all()) for x in call.run())


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("k", torch.zeros(1, 40, 2, 7)),
        ("v", torch.zeros(1, 39, 2, 8)),
        ("q", torch.zeros(1, 2, 2, 257)),
        ("start", torch.zeros(1, 2, 2, 2, dtype=torch.int64)),
        ("end", torch.zeros(1, 2, 2, 1, dtype=torch.int32)),
        ("gate", torch.zeros(1, 2, 2, 3)),
        ("base_lse", None),
        ("key_mask", torch.ones(1, 39, dtype=torch.bool)),
    ],
)
def test_errors_name_the_argument(emulator: ctypes.CDLL, name: str, bad: torch.Tensor | None) -> None:
    call = Call()
    call.args[name] = bad
    with pytest.raises(RuntimeError, match=rf"\b{name}: expected"):
        call.run()
