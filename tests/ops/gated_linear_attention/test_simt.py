"""What only the structure of the CUDA gated linear attention kernels makes special, run in the emulator."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

import subquad
from subquad.contract import HANDLES
from subquad.testing import Sampler, assert_close, assert_same_bits
from subquad.testing.case import Case
from subquad.testing.instruments import traffic
from subquad.testing.specs import lawcat_decode_step as lawcat
from subquad.testing.specs.gated_linear_attention import STEP, draw, oracle, step_oracle


def token(heads: tuple[int, int, int, int], dk: int, dv: int, batch: int = 1, **options: Any) -> dict[str, Any]:
    sample = draw(Sampler(seed=dk + dv), "token", 1, heads, dk, dv, batch=batch, state=True, **options)
    rows = {n: None if x is None else x[:, 0] for n, x in sample.args.items() if n in ("q", "k", "v", "g")}
    return {**rows, "state": sample["s0"], "z": sample.args.get("z0")}


@pytest.mark.parametrize("heads", [1, 3, 4])
def test_a_step_reads_and_writes_the_state_once(emulator: ctypes.CDLL, heads: int) -> None:
    arguments = token((2 * heads, 2, 2, 2), 128, 128, normalize=True)
    state, z = arguments.pop("state"), arguments.pop("z")
    args = (*(arguments[n] for n in ("q", "k", "v", "g")), state, z, None, 1.0, 1e-10)
    loaded, stored, *_ = traffic(emulator, lambda: HANDLES["simt"]["gated_linear_attention_step_"](*args))
    small = 4 * sum(x.numel() for x in arguments.values())
    assert loaded == 4 * (state.numel() + z.numel()) + small
    assert stored == 4 * (state.numel() + z.numel() + 2 * heads * 128)


def test_many_query_heads_read_the_state_again_but_write_it_once(emulator: ctypes.CDLL) -> None:
    arguments = token((9, 1, 1, 1), 64, 64)
    state = arguments["state"].clone()
    args = (*(arguments[n] for n in ("q", "k", "v", "g")), state, None, None, 1.0, 1e-10)
    loaded, stored, *_ = traffic(emulator, lambda: HANDLES["simt"]["gated_linear_attention_step_"](*args))
    assert 3 * 4 * state.numel() <= loaded <= 3.2 * 4 * state.numel()
    assert 4 * state.numel() <= stored <= 1.2 * 4 * state.numel()


@pytest.mark.parametrize("tokens", [1, 4, 13])
def test_the_walk_keeps_the_state_in_registers(emulator: ctypes.CDLL, tokens: int) -> None:
    sample = draw(Sampler(), "walk", tokens, (1, 1, 1, 1), 128, 128, batch=1, state=True, normalize=True)
    args = (*(sample[n] for n in ("q", "k", "v", "g", "s0", "z0")), None, 1.0, 1e-10, True)
    loaded, stored, *_ = traffic(emulator, lambda: HANDLES["simt"]["gated_linear_attention_fwd"](*args))
    blocks = 4  # of columns: each reads q, k and g, and keeps a z of its own
    states = 4 * 128 * 128
    assert loaded == states + 4 * (tokens * (3 * blocks * 128 + 128) + blocks * 128)
    assert stored == states + 4 * (tokens * (128 + 1) + 128)


@pytest.mark.parametrize("states", [2, 8])
def test_a_lawcat_step_moves_its_states_and_little_else(emulator: ctypes.CDLL, states: int) -> None:
    """States are read and written once, maps and taps once for every head, also where keys share their past."""
    d, f, taps, heads, keys = 64, 32, 4, 8, 2
    sample = lawcat.draw(Sampler(), "layer", (heads, keys, states), d, f, d, batch=1)
    a = {n: x for n, x in sample.args.items() if x is not None}
    loaded, stored, *_ = traffic(emulator, lambda: subquad.lawcat_decode_step(**a, backend="simt"))
    moved = 4 * (a["state"].numel() + a["z"].numel())
    weights = 4 * (heads + states) * d * (f + taps)
    tokens = 4 * (heads + states) * d * taps + 4 * keys * d * taps + 4 * states * 3 * d  # past and present; v and u
    again = 0 if heads // states <= 4 else moved
    assert moved + weights <= loaded <= moved + weights + tokens + again
    past = 4 * (heads + keys) * d * (taps - 1)
    assert stored == moved + past + 4 * heads * d


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("heads", [(5, 1, 1, 1), (9, 1, 1, 1), (12, 2, 1, 2)])
@pytest.mark.parametrize(("dk", "dv"), [(5, 7), (65, 33), (129, 36), (256, 256)])
def test_more_query_heads_than_a_block_takes(heads: tuple[int, int, int, int], dk: int, dv: int) -> None:
    arguments = token(heads, dk, dv, batch=2, normalize=True)
    found = Case(STEP, "simt").invoke(arguments, {"backend": "simt"})
    wide = {n: x if x is None else x.double() for n, x in arguments.items()}
    for a, b in zip(found, step_oracle(**wide), strict=True):
        assert_close(a.double(), b, 1e-5)
    sample = draw(Sampler(), "walk", 6, heads, dk, dv, batch=1, state=True, normalize=True)
    whole = subquad.gated_linear_attention(
        *(sample[n] for n in "qkvg"), initial_state=(sample["s0"], sample["z0"]), normalize=True,
        output_final_state=True, backend="simt",
    )  # fmt: skip
    doubles: dict[str, Any] = {n: None if x is None else x.double() for n, x in sample.args.items()}
    expected = oracle(**doubles, normalize=True)
    for a, b in zip((whole[0], *whole[1]), expected, strict=True):  # type: ignore[misc]
        assert_close(a.double(), b, 1e-5)


def test_bounds_are_not_trusted(emulator: ctypes.CDLL) -> None:
    """Values outside 0 .. T are clamped: nothing outside the tensors is read or written, which the emulator would tell."""
    q, k, v = (torch.rand(1, 6, 2, 8) for _ in range(3))
    for bounds in ([-5, 3, 100], [4, 2, 1 << 40], [0, -(1 << 40), 6]):
        args = (q, k, v, None, None, None, torch.tensor(bounds), 1.0, 1e-10, True)
        HANDLES["simt"]["gated_linear_attention_fwd"](*args)


def test_a_lawcat_step_skips_places_outside_the_pools(emulator: ctypes.CDLL) -> None:
    sample = lawcat.draw(Sampler(), "places", (4, 2, 4), 8, 4, 8, batch=4)
    a = {n: sample.args.get(n) for n in lawcat.FLOATS}
    order = ("q0", "k0", "v", "u", "cq", "ck", "cq_bias", "ck_bias", "wphi", "wphi", *lawcat.POOLS)
    pools = {n: sample[n][:3].clone() for n in lawcat.POOLS}
    before = {n: x.clone() for n, x in pools.items()}
    tensors = [pools.get(n, a[n]) for n in order]
    indices = torch.tensor([-7, 3, 1 << 40, 1])
    options = (indices, False, 16.0, -torch.inf, 1.0, 1e-10, 1e-12)
    o = HANDLES["simt"]["lawcat_decode_step_"](*tensors, *options)
    assert not bool(o[:3].any()) and bool(o[3].all())
    for name, pool in pools.items():
        assert_same_bits(pool[[0, 2]], before[name][[0, 2]], name)
        assert not torch.equal(pool[1], before[name][1]), name


def test_places_outside_the_pool_are_skipped(emulator: ctypes.CDLL) -> None:
    q, k, v = (torch.rand(4, 2, 8) for _ in range(3))
    state, z = torch.rand(3, 2, 8, 8), torch.rand(3, 2, 8)
    before = state.clone(), z.clone()
    indices = torch.tensor([-7, 3, 1 << 40, 1])
    o = HANDLES["simt"]["gated_linear_attention_step_"](q, k, v, None, state, z, indices, 1.0, 1e-10)
    assert not bool(o[:3].any()) and bool(o[3].all())
    for now, then in zip((state, z), before, strict=True):
        assert_same_bits(now[[0, 2]], then[[0, 2]])
        assert not torch.equal(now[1], then[1])


@pytest.mark.parametrize("seed", range(1, 21))
def test_any_schedule_gives_the_same_bits(emulator: ctypes.CDLL, seed: int) -> None:
    sample = draw(Sampler(), "seeds", 9, (6, 1, 1, 1), 20, 40, batch=1, state=True, normalize=True)
    args = (*(sample[n] for n in ("q", "k", "v", "g", "s0", "z0")), None, 1.0, 1e-10, True)
    expected = HANDLES["simt"]["gated_linear_attention_fwd"](*args)
    arguments = token((6, 1, 1, 1), 20, 40, normalize=True)
    one = Case(STEP, "simt").invoke(arguments, {"backend": "simt"})
    emulator.subquad_simt_set_seed(seed)
    try:
        found = HANDLES["simt"]["gated_linear_attention_fwd"](*args)
        other = Case(STEP, "simt").invoke(arguments, {"backend": "simt"})
    finally:
        emulator.subquad_simt_set_seed(1)
    for a, b in zip((*found, *other), (*expected, *one), strict=True):
        assert_same_bits(a, b)
