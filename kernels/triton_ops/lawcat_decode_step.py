"""LAWCAT's decoding step: one program per row and raw key head, with all states and queries that hang on it.

The 2f features of a head are two vectors of f, and so the states are two tiles. Queries beyond the first of a state read it
again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from ._common.aot import AotCase
from ._common.linear import token_tile
from ._common.numerics import cast


@triton.jit
def _convolved(
    x_ptr, past_ptr, taps_ptr, bias_ptr, chan, inside, TAPS: tl.constexpr, BIASED: tl.constexpr, SILU: tl.constexpr
):
    """act(bias + taps of [past, x]) of some channels of one head, 0 outside."""
    y = tl.zeros(chan.shape, tl.float32)
    if BIASED:
        y += tl.load(bias_ptr + chan, inside, other=0.0).to(tl.float32)
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
    x_ptr, past_ptr, taps_ptr, bias_ptr, map_ptr, d, f, fm_eps, TAPS: tl.constexpr, BIASED: tl.constexpr,
    SILU: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Both halves of the features of one head."""
    cols = tl.arange(0, BF)
    y = tl.zeros([BF], tl.float32)
    for first in range(0, d, BD):
        chan = first + tl.arange(0, BD)
        x = _convolved(x_ptr, past_ptr, taps_ptr, bias_ptr, chan, chan < d, TAPS, BIASED, SILU)
        mask = (chan < d)[:, None] & (cols < f)[None, :]
        y += tl.sum(
            x[:, None] * tl.load(map_ptr + chan[:, None] * f + cols[None, :], mask, other=0.0).to(tl.float32), 0
        )
    return _softmax(y, cols < f, fm_eps), _softmax(-y, cols < f, fm_eps)


@triton.jit
def _decay(u_ptr, at, some, tau, clamp_min, GATE: tl.constexpr):
    """exp(max(logsigmoid(u) / tau, clamp_min)) from `at` on; 1 without a gate."""
    decay = tl.where(some, 1.0, 1.0)
    if GATE > 0:
        offsets = at + (tl.arange(0, some.shape[0]) if GATE == 2 else tl.zeros([some.shape[0]], tl.int32))
        u = tl.load(u_ptr + offsets, some, other=0.0).to(tl.float32)
        e = tl.exp(-tl.abs(u))
        # log(1 + e) without the cancellation of small e
        one = 1.0 + e
        log = tl.where(one == 1.0, e, tl.log(one) * e / tl.where(one == 1.0, 1.0, one - 1.0))
        g = (tl.where(u > 0.0, 0.0, u) - log) / tau
        decay = tl.exp(tl.where(g < clamp_min, clamp_min, g))
    return decay


@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, u_ptr, cq_ptr, ck_ptr, cq_bias_ptr, ck_bias_ptr, wphi_ptr, wphi_k_ptr, conv_q_ptr, conv_k_ptr, s_ptr,
    z_ptr, index_ptr, o_ptr, batch, pool, q_heads, k_heads, v_heads, g_heads, states, maps, key_maps, d, dv, f, tau, clamp_min,
    scale, eps, fm_eps, GATE: tl.constexpr, NORMALIZE: tl.constexpr, INDEXED: tl.constexpr, TAPS: tl.constexpr,
    Q_BIAS: tl.constexpr, K_BIAS: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    b, head = (tl.program_id(0) % batch).to(tl.int64), (tl.program_id(0) // batch).to(tl.int64)
    place = tl.load(index_ptr + b) if INDEXED else b
    used = (place >= 0) & (place < pool)
    per_head, per_state = states // k_heads, q_heads // states
    half = tl.arange(0, BF)
    some = half < f
    raw_key = k_ptr + (b * k_heads + head) * d
    past_k = conv_k_ptr + (place * k_heads + head) * d * (TAPS - 1)
    if not used:
        for i in range(per_head * per_state):
            for first in range(0, dv, BV):
                cols = first + tl.arange(0, BV)
                nothing = cast(tl.zeros([BV], tl.float32), o_ptr.dtype.element_ty)
                tl.store(o_ptr + (b * q_heads + head * per_head * per_state + i) * dv + cols, nothing, cols < dv)
    else:
        for i in range(per_head):
            s = head * per_head + i
            key_up, key_down = _features(
                raw_key, past_k, ck_ptr + s * d * TAPS, ck_bias_ptr + s * d if K_BIAS else ck_ptr,
                wphi_k_ptr + s * key_maps // states * d * f, d, f, fm_eps, TAPS, K_BIAS, SILU, BD, BF,
            )  # fmt: skip
            gate = b * g_heads + s * g_heads // states
            gate = gate * 2 * f if GATE == 2 else gate
            decay_up = _decay(u_ptr, gate, some, tau, clamp_min, GATE)
            decay_down = _decay(u_ptr, gate + f if GATE == 2 else gate, some, tau, clamp_min, GATE)
            own = (place * states + s) * 2 * f
            z_up = tl.zeros([BF], tl.float32)
            z_down = tl.zeros([BF], tl.float32)
            if NORMALIZE:
                z_up = tl.load(z_ptr + own + half, some, other=0.0) * decay_up + key_up
                z_down = tl.load(z_ptr + own + f + half, some, other=0.0) * decay_down + key_down
                tl.debug_barrier()
                tl.store(z_ptr + own + half, z_up, some)
                tl.store(z_ptr + own + f + half, z_down, some)
            for r in range(per_state):
                h = s * per_state + r
                raw = q_ptr + (b * q_heads + h) * d
                past_q = conv_q_ptr + (place * q_heads + h) * d * (TAPS - 1)
                up, down = _features(
                    raw, past_q, cq_ptr + h * d * TAPS, cq_bias_ptr + h * d if Q_BIAS else cq_ptr,
                    wphi_ptr + h * maps // q_heads * d * f, d, f, fm_eps, TAPS, Q_BIAS, SILU, BD, BF,
                )  # fmt: skip
                _shift(raw, past_q, d, TAPS, BD)
                up, down = up * scale, down * scale
                total = 1.0
                if NORMALIZE:
                    total = tl.sum(up * z_up, 0) + tl.sum(down * z_down, 0) + eps
                for first in range(0, dv, BV):
                    cols = first + tl.arange(0, BV)
                    value = tl.load(v_ptr + (b * v_heads + s * v_heads // states) * dv + cols, cols < dv, other=0.0).to(
                        tl.float32
                    )
                    if r == 0:
                        state_up = token_tile(s_ptr + own * dv, half, some, cols, dv, key_up, decay_up, value, True)
                        state_down = token_tile(
                            s_ptr + own * dv, f + half, some, cols, dv, key_down, decay_down, value, True
                        )
                    else:
                        state_up = token_tile(s_ptr + own * dv, half, some, cols, dv, key_up, decay_up, value, False)
                        state_down = token_tile(
                            s_ptr + own * dv, f + half, some, cols, dv, key_down, decay_down, value, False
                        )
                    out = (tl.sum(up[:, None] * state_up, 0) + tl.sum(down[:, None] * state_down, 0)) / total
                    tl.store(o_ptr + (b * q_heads + h) * dv + cols, cast(out, o_ptr.dtype.element_ty), cols < dv)
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
        _decode_kernel[(batch * k_heads,)](
            q0, k0, v, u, cq, ck, cq_bias, ck_bias, wphi, wphi_k, conv_q, conv_k, state, z, state_indices, o, batch, pool,
            q_heads, k_heads, v.shape[1], 1 if u is None else u.shape[1], states, wphi.shape[0], wphi_k.shape[0], d, dv, f, tau,
            clamp_min, scale, eps, fm_eps, GATE=0 if u is None else u.dim() - 1, NORMALIZE=z is not None,
            INDEXED=state_indices is not None, TAPS=taps, Q_BIAS=cq_bias is not None, K_BIAS=ck_bias is not None, SILU=silu,
            BD=min(16, triton.next_power_of_2(d)), BF=triton.next_power_of_2(f), BV=min(16, triton.next_power_of_2(dv)),
            num_warps=8 if f > 32 else 4,
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
