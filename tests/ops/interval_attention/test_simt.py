"""What only the structure of the CUDA interval_attention kernels makes special, run in the emulator."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from subquad.contract import HANDLES
from subquad.reference.interval_attention import interval_attention as reference
from subquad.testing.instruments import traffic

INF = torch.inf


class Call:
    """One call of the raw operator: tensors from a seed, a causal mask unless `mask` names other arguments."""

    def __init__(
        self,
        batch: int = 1,
        tq: int = 2,
        tk: int = 40,
        kv_heads: int = 2,
        group: int = 1,
        d: int = 8,
        dv: int | None = None,
        slots: int = 1,
        dtype: torch.dtype = torch.float32,
        **mask: Any,
    ) -> None:
        self.generator = torch.Generator().manual_seed(tq * 1000 + tk)
        heads = kv_heads * group
        self.tensors = {
            "q": self.normal(batch, tq, heads, slots, d).to(dtype),
            "k": self.normal(batch, tk, kv_heads, d).to(dtype),
            "v": self.normal(batch, tk, kv_heads, dv or d).to(dtype),
        }
        none = dict.fromkeys(("starts", "ends", "key_start", "key_stop"))
        rest = {"sink_tokens": 0, "window": -1, "causal": True, "key_bias": None, "sink_logits": None}
        rest |= {"alibi_slopes": None, "scale": 0.3, "softcap": 0.0}
        self.mask: dict[str, Any] = none | rest | mask

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator, dtype=torch.int32)

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, _ = HANDLES["simt"]["interval_attention_fwd"](*self.tensors.values(), *self.mask.values(), [])
        return out, lse

    def want(self) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (t.double() for t in self.tensors.values())
        return reference(q, k, v, **self.mask)

    def check(self) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = self.run()
        want_out, want_lse = self.want()
        dtype = self.tensors["q"].dtype
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        assert out.dtype == dtype and lse.dtype == torch.float32 and out.is_contiguous() and lse.is_contiguous()
        torch.testing.assert_close(out.double(), want_out, rtol=tolerance, atol=tolerance, equal_nan=True)
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5, equal_nan=True)
        return out, lse


def canonical(call: Call, heads: int, tq: int, tk: int, m: int) -> dict[str, torch.Tensor]:
    """Random sorted intervals that may be empty at the end of a row; some rows see nothing."""
    edges = call.integers(0, tk + 1, 1, heads, tq, 2 * m).sort(-1).values
    starts, ends = edges[..., 0::2].clone(), edges[..., 1::2].clone()
    live = torch.arange(m) < call.integers(0, m + 1, 1, heads, tq, 1)
    live &= (starts < ends).int().cumprod(-1).bool()  # what follows an empty slot is empty
    return {"starts": starts.where(live, tk).contiguous(), "ends": ends.where(live, tk).contiguous()}


@pytest.mark.parametrize("tq", range(1, 18))
@pytest.mark.parametrize("group", [1, 3, 7])
def test_any_number_of_rows(emulator: ctypes.CDLL, tq: int, group: int) -> None:
    Call(tq=tq, tk=45, kv_heads=1, group=group, d=5, dv=9).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("d", "dv"), [(1, 3), (33, 7), (64, 256), (256, 1), (255, 200), (512, 257), (300, 512)])
def test_head_dimensions(emulator: ctypes.CDLL, dtype: torch.dtype, d: int, dv: int) -> None:
    Call(tq=3, tk=35, group=2, d=d, dv=dv, dtype=dtype, scale=d**-0.5).check()


@pytest.mark.parametrize("tq", [1, 5, 70])
@pytest.mark.parametrize(
    "mask",
    [
        {"causal": False},
        {"causal": True},
        {"window": 0, "sink_tokens": 3},
        {"window": 7},
        {"window": 9, "sink_tokens": 4},
        {"window": 45, "sink_tokens": 60},
    ],
)
def test_analytic_masks(emulator: ctypes.CDLL, tq: int, mask: dict[str, Any]) -> None:
    call = Call(tq=tq, tk=50, group=2, **mask)
    call.mask["sink_logits"] = call.normal(4)
    call.check()
    call.mask["sink_logits"] = None
    out, lse = call.check()
    if tq == 70 and call.mask["causal"]:
        assert bool((lse[:, :20] == -INF).all()) and bool((out[:, :20] == 0).all())


@pytest.mark.parametrize(("tq", "tk"), [(11, 50), (2, 700)])
@pytest.mark.parametrize("causal", [False, True])
def test_caps_and_slopes(emulator: ctypes.CDLL, causal: bool, tq: int, tk: int) -> None:
    call = Call(batch=2, tq=tq, tk=tk, group=3, d=12, causal=causal, softcap=0.8)
    call.mask["alibi_slopes"] = call.normal(2, 6) / 10
    call.check()
    call.mask["key_bias"], call.mask["sink_logits"] = call.normal(1, 6, tk), call.normal(6)
    call.mask["alibi_slopes"], call.mask["softcap"] = call.normal(1, 6) / 10, 0.0
    call.check()


def test_a_cap_of_the_largest_products(emulator: ctypes.CDLL) -> None:
    call = Call(tq=2, tk=40, d=1, softcap=3.0)
    call.tensors["k"] *= 3e38  # what overflows lies at the cap
    call.check()


@pytest.mark.parametrize("tk", [50, 700])
@pytest.mark.parametrize("m", [1, 3])
def test_intervals_lifetimes_and_biases(emulator: ctypes.CDLL, tk: int, m: int) -> None:
    tq, heads = 11, 6
    call = Call(batch=2, tq=tq, tk=tk, group=3, d=12)
    call.mask |= canonical(call, heads, tq, tk, m)
    call.check()
    call.mask["key_start"] = call.integers(-3, tq, 1, heads, tk)
    call.mask["key_stop"] = call.integers(0, tq + 3, 1, heads, tk)
    call.check()
    bias = call.normal(2, 1, tk)
    call.mask["key_bias"] = bias.masked_fill(bias > 0.7, -INF)
    call.mask["sink_logits"] = call.normal(heads)
    call.check()


def test_rows_that_share_loads_see_far_apart_keys(emulator: ctypes.CDLL) -> None:
    # The first interval of one row is where the second of another is; the last row sees all.
    starts = torch.tensor([[400, 600], [0, 500], [10, 30], [700, 700], [0, 700]], dtype=torch.int32)
    ends = torch.tensor([[401, 640], [9, 503], [20, 70], [700, 700], [700, 700]], dtype=torch.int32)
    Call(tq=5, tk=700, starts=starts[None, None], ends=ends[None, None]).check()


def test_indices_are_not_trusted(emulator: ctypes.CDLL) -> None:
    # The emulator refuses what lies outside the tensors; starts beyond ends are empty, the rest is clamped.
    starts = torch.tensor([[-5], [30], [-(2**31)], [2**31 - 1], [39], [60]], dtype=torch.int32)
    ends = torch.tensor([[7], [10], [2**31 - 1], [-(2**31)], [10**6], [80]], dtype=torch.int32)
    call = Call(tq=6, tk=40, starts=starts[None, None], ends=ends[None, None])
    _, lse = call.check()
    assert (lse[0, :, 0] == -INF).tolist() == [False, True, False, True, False, True]
    call.mask["key_start"], call.mask["key_stop"] = (
        call.integers(-(2**31), 5, 1, 1, 40),
        call.integers(0, 2**31 - 1, 1, 1, 40),
    )
    call.check()


def test_garbage_indices_stay_inside_the_tensors(emulator: ctypes.CDLL) -> None:
    # Neither sorted nor disjoint, so that no result is promised: the emulator refuses what lies outside the tensors.
    call = Call(tq=6, tk=600, group=2)
    call.mask |= {name: call.integers(-(2**31), 2**31 - 1, 1, 4, 6, 5) for name in ("starts", "ends")}
    call.mask |= {name: call.integers(-(2**31), 2**31 - 1, 1, 4, 600) for name in ("key_start", "key_stop")}
    assert bool(call.run()[0].isfinite().all())


@pytest.mark.parametrize("tk", [40, 600])
def test_slots_take_their_own_query(emulator: ctypes.CDLL, tk: int) -> None:
    call = Call(batch=2, tq=4, tk=tk, group=3, d=10, slots=3)
    mask = canonical(call, 6, 4, tk, 3)
    order = torch.tensor([2, 0, 1])  # not sorted, with empty slots between
    call.mask |= {name: t[..., order].contiguous() for name, t in mask.items()}
    call.mask["sink_logits"] = call.normal(6)
    call.check()


@pytest.mark.parametrize("window", [-1, 5, 300])
@pytest.mark.parametrize("sinks", [False, True])
def test_splits(emulator: ctypes.CDLL, window: int, sinks: bool) -> None:
    # 1500 keys are cut into 6 shares; with a window of 5 most have nothing to see, and the sink logit still counts once.
    call = Call(tq=2, tk=1500, kv_heads=1, group=2, window=window, sink_tokens=4)
    if sinks:
        call.mask["sink_logits"] = call.want()[1].float()[0].mean(0) + torch.tensor([1.0, -1.0])
    call.check()


def test_hidden_tiles_are_not_loaded(emulator: ctypes.CDLL) -> None:
    # Sinks and window are four tiles of 5000 keys' 157.
    loaded = []
    for window in (60, -1):
        call = Call(tq=1, tk=5000, kv_heads=1, d=64, window=window, sink_tokens=4)
        loaded.append(traffic(emulator, call.run).loaded)
    assert loaded[1] >= 5000 * 2 * 64 * 4
    assert loaded[0] < loaded[1] / 10


def test_what_a_row_does_not_see_is_never_touched(emulator: ctypes.CDLL) -> None:
    tq, tk = 6, 600
    call = Call(tq=tq, tk=tk, group=2, window=90, sink_tokens=3)
    clean = call.run()
    call.tensors["k"][:, 20:500], call.tensors["v"][:, 20:500] = torch.nan, INF
    for a, b in zip(call.run(), clean, strict=True):
        assert torch.equal(a, b)
    call.tensors["v"][:, tk - tq + 3] = torch.nan  # seen from row 3 on
    call.tensors["k"][:, tk - tq + 4] = torch.nan
    call.tensors["q"][:, 1, 0] = torch.nan
    out, lse = call.run()
    assert [bool(row) for row in out[0, :, 1].isnan().any(-1)] == [False, False, False, True, True, True]
    assert [bool(row) for row in lse[0, :, 1].isnan()] == [False, False, False, False, True, True]
    assert bool(out[0, 1, 0].isnan().all()) and bool(lse[0, 1, 0].isnan())
    for row in (0, 2):
        assert torch.equal(out[:, row], clean[0][:, row]) and torch.equal(lse[:, row], clean[1][:, row])


def test_hidden_by_bias_or_lifetime(emulator: ctypes.CDLL) -> None:
    call = Call(tq=3, tk=70, group=2, causal=False)
    bias = torch.zeros(1, 1, 70)
    bias[..., 5:12] = -INF
    start, stop = (
        torch.zeros(2, 1, 1, 70, dtype=torch.int32) + torch.tensor([0, 9], dtype=torch.int32)[:, None, None, None]
    )
    stop[..., 40:60] = 0
    call.mask |= {"key_bias": bias, "key_start": start, "key_stop": stop}
    clean = call.check()
    for name in ("k", "v"):
        call.tensors[name][:, 5:12] = call.tensors[name][:, 40:60].mean() * torch.nan
        call.tensors[name][:, 40:60] = INF
    for a, b in zip(call.run(), clean, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sinks", [False, True])
def test_keys_that_are_all_hidden(emulator: ctypes.CDLL, sinks: bool) -> None:
    call = Call(tq=2, tk=600, group=2, key_bias=torch.full((1, 1, 600), -INF))
    call.mask["sink_logits"] = torch.tensor([0.5, -300.0, 300.0, -INF]) if sinks else None
    out, lse = call.run()
    assert torch.equal(out, torch.zeros_like(out))
    torch.testing.assert_close(lse, (call.mask["sink_logits"] if sinks else torch.tensor(-INF)).expand_as(lse))


@pytest.mark.parametrize(("batch", "tq", "tk"), [(0, 2, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
def test_empty(emulator: ctypes.CDLL, batch: int, tq: int, tk: int) -> None:
    call = Call(batch=batch, tq=tq, tk=tk, sink_logits=torch.tensor([0.5, -1.0]))
    out, lse = call.run()
    assert out.shape == (batch, tq, 2, 8) and not out.any()
    assert torch.equal(lse, torch.tensor([0.5, -1.0]).expand(batch, tq, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layout_and_schedule_do_not_change_a_bit(emulator: ctypes.CDLL, dtype: torch.dtype) -> None:
    call = Call(batch=2, tq=5, tk=530, kv_heads=2, group=3, d=24, dv=40, dtype=dtype, window=300, sink_tokens=2)
    want = call.check()
    try:
        for seed in (2, 3, 4):
            emulator.subquad_simt_set_seed(seed)
            for a, b in zip(call.run(), want, strict=True):
                assert torch.equal(a, b)
    finally:
        emulator.subquad_simt_set_seed(1)
    for name, tensor in call.tensors.items():  # heads before time, and one element into a buffer: nothing is aligned
        buffer = torch.full((tensor.numel() + 1,), torch.nan, dtype=dtype)
        moved = tensor.transpose(1, 2)
        call.tensors[name] = buffer[1:].view(moved.shape).copy_(moved).transpose(1, 2)
    for a, b in zip(call.run(), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["k", "v"])
def test_offsets_beyond_32_bits(emulator: ctypes.CDLL, name: str) -> None:
    call = Call(tq=2, tk=4, kv_heads=1, d=24, dtype=torch.bfloat16, causal=False)
    want = call.run()
    stride = 2**31 // 3 + 8  # the last of the four keys starts beyond element 2^31; only touched pages take memory
    view = torch.empty(3 * stride + 24, dtype=torch.bfloat16).as_strided((1, 4, 1, 24), (0, stride, 24, 1))
    call.tensors[name] = view.copy_(call.tensors[name])
    for a, b in zip(call.run(), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("k", torch.zeros(1, 40, 2, 7)),
        ("v", torch.zeros(1, 39, 2, 8)),
        ("v", torch.zeros(1, 40, 2, 513)),
        ("starts", torch.zeros(1, 1, 2, 1, dtype=torch.int64)),
        ("ends", torch.zeros(1, 1, 3, 1, dtype=torch.int32)),
        ("key_stop", torch.zeros(1, 1, 39, dtype=torch.int32)),
        ("key_bias", torch.zeros(1, 3, 40)),
        ("sink_logits", torch.zeros(1)),
        ("alibi_slopes", torch.zeros(2)),
        ("alibi_slopes", torch.zeros(1, 3)),
        ("alibi_slopes", torch.zeros(2, 2)),
    ],
)
def test_errors_name_the_argument(emulator: ctypes.CDLL, name: str, bad: torch.Tensor) -> None:
    rows, keys = torch.zeros(1, 1, 2, 1, dtype=torch.int32), torch.zeros(1, 1, 40, dtype=torch.int32)
    call = Call(starts=rows, ends=rows, key_start=keys, key_stop=keys)
    (call.tensors if name in call.tensors else call.mask)[name] = bad
    with pytest.raises(RuntimeError, match=rf"\b{name}: expected"):
        call.run()
