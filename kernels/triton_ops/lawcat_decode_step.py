"""LAWCAT's decoding step: one program per row and raw key head, with all states and queries that hang on it.

The 2f features of a head are two vectors of f, and so the states are two tiles. Queries beyond the first of a state read it
again.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._common.aot import AotCase
from ._common.linear import token_tile
from ._common.numerics import cast


class Branch(NamedTuple):
    """Queries or keys before their convolution [B, heads, d], its taps [channels, TAPS], bias [channels] or None, pool of past
    tokens [P, heads, d, TAPS - 1], and matrices [maps, d, f]."""

    x: Any
    taps: Any
    bias: Any
    past: Any
    weight: Any
    maps: Any
    heads: Any


class State(NamedTuple):
    """Pools S [P, states, 2f, dv] and z [P, states, 2f] or None, fp32."""

    s: Any
    z: Any


class Gate(NamedTuple):
    """Raw gates u [B, heads] or [B, heads, 2f], or None; g = max(logsigmoid(u) / tau, clamp_min)."""

    u: Any
    heads: Any
    tau: Any
    clamp_min: Any


class Shape(NamedTuple):
    d: Any
    dv: Any
    f: Any
    fm_eps: Any


@triton.jit
def _convolved(x_ptr, past_ptr, branch, first, chan, inside, TAPS: tl.constexpr, SILU: tl.constexpr):
    """act(bias + taps of [past, x]) of channels chan of the head whose outputs begin at channel `first`, 0 outside."""
    taps_ptr = branch.taps + first * TAPS
    y = tl.zeros(chan.shape, tl.float32)
    if branch.bias is not None:
        y += tl.load(branch.bias + first + chan, inside, other=0.0).to(tl.float32)
    for j in tl.static_range(TAPS - 1):
        past = tl.load(past_ptr + chan * (TAPS - 1) + j, inside, other=0.0).to(tl.float32)
        y += tl.load(taps_ptr + chan * TAPS + j, inside, other=0.0).to(tl.float32) * past
    x = tl.load(x_ptr + chan, inside, other=0.0).to(tl.float32)
    y += tl.load(taps_ptr + chan * TAPS + TAPS - 1, inside, other=0.0).to(tl.float32) * x
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    return tl.where(inside, y, 0.0)


@triton.jit
def _shift(x_ptr, past_ptr, d, TAPS: tl.constexpr, BD: tl.constexpr):
    """The token of one head enters its past."""
    if TAPS > 1:
        for first in range(0, d, BD):
            chan = first + tl.arange(0, BD)
            inside = chan < d
            for j in tl.static_range(TAPS - 1):
                if j < TAPS - 2:
                    x = tl.load(past_ptr + chan * (TAPS - 1) + j + 1, inside, other=0.0)
                else:
                    x = tl.load(x_ptr + chan, inside, other=0.0)
                tl.debug_barrier()  # read by all threads before it is overwritten
                tl.store(past_ptr + chan * (TAPS - 1) + j, x, inside)


@triton.jit
def _softmax(y, some, fm_eps):
    """max(softmax(y), fm_eps), 0 outside."""
    y = tl.where(some, y, float("-inf"))
    e = tl.exp(y - tl.max(y, 0))
    e = e / tl.sum(e, 0)
    return tl.where(some, tl.where(e < fm_eps, fm_eps, e), 0.0)


@triton.jit
def _features(
    x_ptr, past_ptr, branch, head, heads, shape, TAPS: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr
):  # fmt: skip
    """Both halves of the features [BF] of output head `head` of `heads`, from one raw head and its past."""
    d, f = shape.d, shape.f
    cols = tl.arange(0, BF)
    w_ptr = branch.weight + head * branch.maps // heads * d * f
    y = tl.zeros([BF], tl.float32)
    for first in range(0, d, BD):
        chan = first + tl.arange(0, BD)
        x = _convolved(x_ptr, past_ptr, branch, head * d, chan, chan < d, TAPS, SILU)  # [BD]
        mask = (chan < d)[:, None] & (cols < f)[None, :]
        w = tl.load(w_ptr + chan[:, None] * f + cols[None, :], mask, other=0.0).to(tl.float32)  # [BD, BF]
        y += tl.sum(x[:, None] * w, 0)
    return _softmax(y, cols < f, shape.fm_eps), _softmax(-y, cols < f, shape.fm_eps)


@triton.jit
def _decay(gate, at, some, GATE: tl.constexpr):
    """exp(max(logsigmoid(u) / tau, clamp_min)) from `at` on; 1 without a gate."""
    decay = tl.where(some, 1.0, 1.0)
    if GATE > 0:
        offsets = at + (tl.arange(0, some.shape[0]) if GATE == 2 else tl.zeros([some.shape[0]], tl.int32))
        u = tl.load(gate.u + offsets, some, other=0.0).to(tl.float32)
        e = tl.exp(-tl.abs(u))
        # log(1 + e) without the cancellation of small e
        one = 1.0 + e
        log = tl.where(one == 1.0, e, tl.log(one) * e / tl.where(one == 1.0, 1.0, one - 1.0))
        g = (tl.where(u > 0.0, 0.0, u) - log) / gate.tau
        decay = tl.exp(tl.where(g < gate.clamp_min, gate.clamp_min, g))
    return decay


@triton.jit
def _decode_kernel(
    q, k, gate, state, v_ptr, v_heads, index_ptr, o_ptr, batch, pool, states, d, dv, f, scale, eps, fm_eps,
    GATE: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    b, head = (tl.program_id(0) % batch).to(tl.int64), (tl.program_id(0) // batch).to(tl.int64)
    place = b if index_ptr is None else tl.load(index_ptr + b)
    used = (place >= 0) & (place < pool)
    shape = Shape(d, dv, f, fm_eps)
    per_head, per_state = states // k.heads, q.heads // states
    half = tl.arange(0, BF)
    some = half < f
    raw_key = k.x + (b * k.heads + head) * d
    past_k = k.past + (place * k.heads + head) * d * (TAPS - 1)
    if not used:
        for i in range(per_head * per_state):
            for first in range(0, dv, BV):
                cols = first + tl.arange(0, BV)
                nothing = cast(tl.zeros([BV], tl.float32), o_ptr.dtype.element_ty)
                tl.store(o_ptr + (b * q.heads + head * per_head * per_state + i) * dv + cols, nothing, cols < dv)
    else:
        for i in range(per_head):
            s = head * per_head + i
            key_up, key_down = _features(raw_key, past_k, k, s, states, shape, TAPS, SILU, BD, BF)  # [BF]
            gate_at = b * gate.heads + s * gate.heads // states
            gate_at = gate_at * 2 * f if GATE == 2 else gate_at
            decay_up = _decay(gate, gate_at, some, GATE)
            decay_down = _decay(gate, gate_at + f if GATE == 2 else gate_at, some, GATE)
            own = (place * states + s) * 2 * f
            z_up = tl.zeros([BF], tl.float32)
            z_down = tl.zeros([BF], tl.float32)
            if state.z is not None:
                z_up = tl.load(state.z + own + half, some, other=0.0) * decay_up + key_up
                z_down = tl.load(state.z + own + f + half, some, other=0.0) * decay_down + key_down
                tl.debug_barrier()
                tl.store(state.z + own + half, z_up, some)
                tl.store(state.z + own + f + half, z_down, some)
            for r in range(per_state):
                h = s * per_state + r
                raw_query = q.x + (b * q.heads + h) * d
                past_q = q.past + (place * q.heads + h) * d * (TAPS - 1)
                up, down = _features(raw_query, past_q, q, h, q.heads, shape, TAPS, SILU, BD, BF)  # [BF]
                _shift(raw_query, past_q, d, TAPS, BD)
                up, down = up * scale, down * scale
                den = 1.0
                if state.z is not None:
                    den = tl.sum(up * z_up, 0) + tl.sum(down * z_down, 0) + eps
                for first in range(0, dv, BV):
                    cols = first + tl.arange(0, BV)
                    value_ptr = v_ptr + (b * v_heads + s * v_heads // states) * dv
                    value = tl.load(value_ptr + cols, cols < dv, other=0.0).to(tl.float32)  # [BV]
                    s_ptr = state.s + own * dv
                    if r == 0:
                        s_up = token_tile(s_ptr, half, some, cols, dv, key_up, decay_up, value, True)  # [BF, BV]
                        s_down = token_tile(s_ptr, f + half, some, cols, dv, key_down, decay_down, value, True)
                    else:
                        s_up = token_tile(s_ptr, half, some, cols, dv, key_up, decay_up, value, False)
                        s_down = token_tile(s_ptr, f + half, some, cols, dv, key_down, decay_down, value, False)
                    out = (tl.sum(up[:, None] * s_up, 0) + tl.sum(down[:, None] * s_down, 0)) / den
                    tl.store(o_ptr + (b * q.heads + h) * dv + cols, cast(out, o_ptr.dtype.element_ty), cols < dv)
                tl.debug_barrier()  # the state is written before the next query reads it
        _shift(raw_key, past_k, d, TAPS, BD)


# --- launcher ----------------------------------------


def lawcat_decode_step_(
    q0: Any, k0: Any, v: Any, u: Any, cq: Any, ck: Any, cq_bias: Any, ck_bias: Any, wphi: Any, wphi_k: Any, conv_q: Any,
    conv_k: Any, state: Any, z: Any, state_indices: Any, silu: bool, tau: float, clamp_min: float, scale: float, eps: float,
    fm_eps: float,
) -> torch.Tensor:  # fmt: skip
    """`subquad_triton::lawcat_decode_step_`."""
    batch, q_heads, d = q0.shape
    pool, states, keys, dv = state.shape
    k_heads, f, taps = k0.shape[1], keys // 2, cq.shape[1]
    o = q0.new_empty((batch, q_heads, dv))
    if batch:
        queries = Branch(q0, cq, cq_bias, conv_q, wphi, wphi.shape[0], q_heads)
        raw_keys = Branch(k0, ck, ck_bias, conv_k, wphi_k, wphi_k.shape[0], k_heads)
        _decode_kernel[(batch * k_heads,)](
            queries, raw_keys, Gate(u, 1 if u is None else u.shape[1], tau, clamp_min), State(state, z), v, v.shape[1],
            state_indices, o, batch, pool, states, d, dv, f, scale, eps, fm_eps, GATE=0 if u is None else u.dim() - 1,
            TAPS=taps, SILU=silu, BD=min(16, triton.next_power_of_2(d)), BF=triton.next_power_of_2(f),
            BV=min(16, triton.next_power_of_2(dv)), num_warps=8 if f > 32 else 4,
        )  # fmt: skip
    return o


def _aot_args(dtype: torch.dtype, d: int, heads: int, states: int) -> tuple[Any, ...]:
    meta = partial(torch.empty, device="meta", dtype=dtype)
    wide = partial(torch.empty, device="meta", dtype=torch.float32)
    rows, kv = 16, 8
    return (
        meta(rows, heads, d), meta(rows, kv, d), meta(rows, kv, d), meta(rows, kv, d), meta(heads * d, 4), meta(states * d, 4),
        None, None, meta(states, d, d // 2), meta(states, d, d // 2), meta(rows, heads * d, 3), meta(rows, kv * d, 3),
        wide(rows, states, d, d), wide(rows, states, d), None, False, 16.0, -torch.inf, d**-0.5, 1e-10, 1e-12,
    )  # fmt: skip


AOT = [
    # Taps are read per channel, in whatever width: "options".
    AotCase(f"{name} D{d} HS{states} options", lawcat_decode_step_, partial(_aot_args, dtype, d, 32, states))
    for name, dtype, d, states in (
        ("bf16", torch.bfloat16, 128, 32),
        ("bf16", torch.bfloat16, 64, 8),
        ("fp32", torch.float32, 128, 32),
    )
]

__all__ = ["AOT", "lawcat_decode_step_"]
