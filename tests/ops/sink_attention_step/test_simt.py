"""What only the structure of the CUDA kernels of the step makes special, run in the emulator."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

import subquad
from subquad.reference.sink_attention_step import quantised
from subquad.testing import Sampler
from subquad.testing.compare import assert_close, assert_same_bits
from subquad.testing.instruments import Traffic, traffic
from subquad.testing.spec import Sample
from subquad.testing.specs.sink_attention_step import CHANGED, QUANTISED, draw, oracle

KINDS = ["", "int8", "fp8"]
Result = dict[str, torch.Tensor]


def sample(dtype: torch.dtype = torch.float32, *args: Any, **options: Any) -> Sample:
    return draw(Sampler(dtype, seed=11), "simt", *args, **options)


def run(call: Sample) -> Result:
    """Results and states after the step; the sample stays as it is."""
    args = {n: x.clone() if n in CHANGED and x is not None else x for n, x in call.args.items()}
    out, lse = subquad.sink_attention_step(**args, **call.kwargs, backend="simt")  # type: ignore[arg-type]
    return {"out": out, "lse": lse} | {n: args[n] for n in CHANGED if args[n] is not None}  # type: ignore[misc]


def want(call: Sample) -> Result:
    wide = {n: x.double() if x is not None and n in ("q", "k", "v") else x for n, x in call.args.items()}
    (out, lse), *states = oracle(**wide, **call.kwargs)  # type: ignore[misc]
    names = [n for n in CHANGED if call.args[n] is not None]
    return {"out": out, "lse": lse} | dict(zip(names, states, strict=True))  # type: ignore[dict-item]


def check(call: Sample, limit: float = 5e-6) -> Result:
    found, expected = run(call), want(call)
    for name in ("out", "lse"):
        assert_close(found[name], expected[name], limit, name)
    for name in ("seen", "written"):
        assert torch.equal(found[name], expected[name]), name
    return found


def seeds(emulator: ctypes.CDLL, call: Sample, first: Result, *of: int) -> None:
    """No order of blocks, warps and lanes changes a bit of results and states."""
    try:
        for seed in of:
            emulator.subquad_simt_set_seed(seed)
            for name, x in run(call).items():
                assert_same_bits(x, first[name], f"{name}, seed {seed}")
    finally:
        emulator.subquad_simt_set_seed(1)


def moved(call: Sample) -> Sample:
    """Heads before time, and one element into a buffer: nothing of q, k and v is aligned; nor are the states."""
    args = dict(call.args)
    for name, x in call.args.items():
        if x is None or x.dtype is torch.int64:
            continue
        tokens = name in ("q", "k", "v")
        source = x.transpose(1, 2) if tokens else x
        buffer = torch.empty(x.numel() + 1, dtype=x.dtype)
        at = buffer[1:].view(source.shape).copy_(source)
        args[name] = at.transpose(1, 2) if tokens else at
    return call.replace(**args)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key_rope", ["pre", "post"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layout_and_schedule_do_not_change_a_bit(
    emulator: ctypes.CDLL, dtype: torch.dtype, key_rope: str, kind: str
) -> None:
    call = sample(
        dtype, (6, 2), 24, 40, tokens=5, sinks=3, window=130, slack=5, seen=(400, 90, 2), rotary=16, ring=kind, logits=-1.0,
        key_rope=key_rope, m=(5, 0, 3),
    )  # fmt: skip
    first = check(call, 5e-6 if dtype is torch.float32 else 1e-2)
    seeds(emulator, call, first, 2, 3, 4)
    aligned = run(call.replace())
    for name, x in run(moved(call)).items():  # clones of the states are aligned, tokens are not
        assert_same_bits(x, aligned[name], name)


@pytest.mark.parametrize("kind", KINDS)
def test_states_that_are_not_aligned(emulator: ctypes.CDLL, kind: str) -> None:
    call = sample(torch.bfloat16, (2, 2), 16, 16, tokens=2, window=40, seen=(90,), rotary=16, ring=kind)
    first, off = run(call), moved(call)
    args = dict(off.args)
    out, lse = subquad.sink_attention_step(**args, **off.kwargs, backend="simt")  # type: ignore[arg-type]
    for name, x in {"out": out, "lse": lse, **{n: args[n] for n in CHANGED if args[n] is not None}}.items():
        assert_same_bits(x, first[name], name)  # type: ignore[arg-type]


@pytest.mark.parametrize("slack", [0, 1, 40])
@pytest.mark.parametrize("tokens", [1, 4, 50])
def test_places_are_written_after_all_have_read(emulator: ctypes.CDLL, tokens: int, slack: int) -> None:
    """Without slack the places of the new tokens are those of tokens that the first rows still see; several shares read."""
    call = sample(
        torch.float32, (4, 2), 8, 8, tokens=tokens, sinks=2, window=300, slack=slack, seen=(700, 300), rotary=8
    )
    seeds(emulator, call, check(call), 2, 3)


@pytest.mark.parametrize("logit", [None, 0.0, 10.0, -10.0])
@pytest.mark.parametrize("seen", [0, 3, 40, 700, 5000])
def test_shares_with_nothing_to_see(emulator: ctypes.CDLL, seen: int, logit: float | None) -> None:
    """The ring is cut into shares by what it may hold: with a few tokens in it the first ones are empty."""
    call = sample(torch.float32, (2, 1), 8, 8, sinks=0, window=700, slack=3, seen=(seen,), rotary=8)
    if logit is not None:
        call.kwargs["sink_logits"] = torch.full((2,), logit)
    check(call)


@pytest.mark.parametrize("group", [1, 3, 8, 9])
@pytest.mark.parametrize("tokens", [1, 2, 7, 9])
def test_any_number_of_rows(emulator: ctypes.CDLL, tokens: int, group: int) -> None:
    call = sample(
        torch.float32, (group, 1), 5, 9, tokens=tokens, sinks=3, window=45, seen=(4, 80), rotary=4, logits=-1.0
    )
    check(call)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("d", "dv"), [(1, 3), (33, 7), (64, 256), (256, 1), (255, 200)])
def test_head_dimensions(emulator: ctypes.CDLL, d: int, dv: int, kind: str) -> None:
    call = sample(torch.float32, (4, 2), d, dv, tokens=2, window=40, seen=(60,), rotary=d // 2 * 2, ring=kind)
    check(call)


def test_every_number_of_float8(emulator: ctypes.CDLL) -> None:
    """Read from the ring, and written into it, ties included, as PyTorch converts them."""
    codes = torch.arange(256, dtype=torch.uint8)[None, None, None].view(torch.float8_e4m3fn)
    call = sample(torch.float32, (1, 1), 8, 256, sinks=0, window=2, slack=0, seen=(1,), ring="fp8")
    ring = call["ring_v"].clone()
    ring.view(torch.uint8)[:, :, :1] = codes.view(torch.uint8)
    q, v = torch.zeros_like(call["q"]), torch.zeros_like(call["v"])
    found = run(call.replace(q=q, v=v, ring_v=ring, v_scale=torch.ones_like(call["v_scale"])))
    torch.testing.assert_close(found["out"].flatten() * 2, codes.float().flatten(), rtol=0, atol=0, equal_nan=True)
    numbers = codes.float().flatten()[:127]
    between = (numbers[1:] + numbers[:-1]) / 2
    near = torch.cat([between, between.nextafter(torch.tensor(0.0)), between.nextafter(torch.tensor(1e9)), -between])
    for part in near.split(255):
        row = torch.cat([part, torch.full((256 - part.numel(),), 448.0)])  # the largest: the scale is 1
        found = run(call.replace(v=row.expand(1, 1, 1, 256).contiguous()))
        rows, scales = quantised(row, torch.float8_e4m3fn)
        assert scales.item() == 1.0 and found["v_scale"][0, 0, 1] == 1.0
        assert torch.equal(found["ring_v"][0, 0, 1].view(torch.uint8), rows.view(torch.uint8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key_rope", ["pre", "post"])
def test_drafts_that_are_rejected(emulator: ctypes.CDLL, key_rope: str, kind: str) -> None:
    """Rows go back by different numbers of tokens, across the wrap, again and again: every step as the definition has it."""
    call = sample(
        torch.float32, (2, 1), 8, 8, tokens=4, sinks=2, window=9, slack=4, seen=(0, 0, 0), rotary=8, key_rope=key_rope,
        ring=kind,
    )  # fmt: skip
    sampler, back = Sampler(seed=3), torch.tensor([[0, 1, 3], [4, 2, 0], [1, 1, 2], [3, 0, 4], [0, 4, 1]])
    for step in range(20):
        call = call.replace(**{n: sampler.normal(*call[n].shape) for n in ("q", "k", "v")})
        found, expected = run(call), want(call)
        for name, x in expected.items():
            if name in ("ring_k", "ring_v") and kind:
                held, right = found[name].float(), x.float()
                scale = found[f"{name[-1]}_scale"][..., None]
                apart = (
                    held - right
                ).abs() * scale  # a rotation that rounds otherwise may fall on the other side of a tie
                assert float(apart.max()) <= 2 ** (-6 if kind == "int8" else -3) * float((right.abs() * scale).max())
            else:
                assert_close(found[name], x, 5e-6, f"{name}, step {step}")
        states = {n: found[n] for n in CHANGED if n in found}
        states["seen"] = (found["seen"] - back[step % len(back)]).clamp_min(0)
        call = call.replace(**states)


def test_what_is_not_seen_is_not_loaded(emulator: ctypes.CDLL) -> None:
    """Sinks and window of a wide ring, each once for the heads that share them; two launches for a token, three for many."""

    def traffic_of(call: Sample) -> Traffic:
        return traffic(emulator, lambda: run(call))

    rows = (4 + 59) * 2 * 64 * 4  # sinks, and the window without the token itself
    loaded, _, launches, _ = traffic_of(sample(torch.float32, (4, 1), 64, sinks=4, window=60, slack=4000, seen=(9000,)))
    assert rows <= loaded < 2 * rows and launches == 2
    assert traffic_of(sample(torch.float32, (2, 2), 8, tokens=40, seen=(50,))).launches == 3
    assert traffic_of(sample(torch.float32, (2, 2), 8, tokens=4, seen=(50,), write_only=True)).launches == 1


def test_counters_are_not_trusted(emulator: ctypes.CDLL) -> None:
    """No result is promised; the emulator refuses what lies outside the tensors."""
    for seen in (-5, 2**62, 2**63 - 1000):
        for first in (-(2**62), 0, 2**62):
            call = sample(torch.float32, (2, 1), 8, tokens=3, seen=(seen, 9), first=(first, 2), rotary=8)
            run(call)
    call = sample(torch.float32, (2, 1), 8, tokens=3, seen=(20, 9))
    call.kwargs["m"] = torch.tensor([2, 3])
    clean = run(call)
    states = [call.args[n] if call.args[n] is None else call[n].clone() for n in CHANGED]
    handle = subquad.contract.HANDLES["simt"]["sink_attention_step_"]
    out, _ = handle(
        call["k"], call["v"], call["q"], *states, call["first"], torch.tensor([-7, 99]), None, None, 6, 8**-0.5, 1.0, False,
        False, False, False, True,
    )  # fmt: skip
    assert not out[0].any() and torch.equal(out[1], clean["out"][1])


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_offsets_beyond_32_bits(emulator: ctypes.CDLL, name: str) -> None:
    call = sample(torch.bfloat16, (1, 1), 24, 24, tokens=4, seen=(30,), rotary=8)
    stride = 2**31 // 3 + 8  # the last of the four tokens starts beyond element 2^31; only touched pages take memory
    far = torch.empty(3 * stride + 24, dtype=torch.bfloat16).as_strided((1, 4, 1, 24), (0, stride, 24, 1))
    found = run(call.replace(**{name: far.copy_(call[name])}))
    for key, x in run(call).items():
        assert_same_bits(found[key], x, key)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantised_rows_have_the_bits_of_the_definition(emulator: ctypes.CDLL, kind: str) -> None:
    call = sample(torch.bfloat16, (2, 2), 72, 40, tokens=30, sinks=3, window=20, slack=2, seen=(50, 0), ring=kind)
    k = call["k"].clone()
    k[0, -1, 0] = 0.0
    k[0, -2, 1, 5] = torch.inf
    k[1, -3, 0, 7] = torch.nan
    call = call.replace(k=k)
    found, expected = run(call), want(call.replace(k=k.float(), v=call["v"].float()))
    for name in ("ring_k", "ring_v"):
        assert found[name].dtype is QUANTISED[kind]
        assert torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8)), name
    for name in ("k_scale", "v_scale"):
        assert torch.equal(found[name].nan_to_num(-1.0), expected[name].nan_to_num(-1.0)), name
