"""Gated linear attention, forward, backward and one decoding step.

Forward: one kernel sums the gates of every chunk, one walks each sequence chunk by chunk with its state in registers (one program
per state head and block of value columns), so that no state goes to memory on the way. Backward: the gates again; a walk from
the start and one from the end, which leave the states before and their gradients after every chunk; dq and dk of a chunk; and
the sums of the gate gradients. Shared heads get one more kernel that adds their parts in order. No atomics, no autotuning.

Source: GLA (arXiv 2312.06635), LAWCAT (arXiv 2509.18467) for the normaliser; this form of chunks is this project's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from ._common.aot import AotCase
from ._common.linear import (
    HALF_RANGE,
    MODERATE,
    advance,
    beyond,
    decays,
    entering,
    leaving,
    outputs,
    pair_decay,
    row_gradients,
    row_of,
    rows_of,
    slot_of,
    span_of,
    token_tile,
)  # fmt: skip
from ._common.numerics import cast

LOG2E = tl.constexpr(1.4426950408889634)
CEILING = tl.constexpr(1e30)  # a gate of +inf would be subtracted from itself
FLOOR = tl.constexpr(-60.0)  # a decay of e^-60 is nothing in fp32, and its sums keep their digits


@triton.jit(do_not_specialize=["sequences", "chunks", "tokens"])
def _gate_sum_kernel(
    g_ptr, b_ptr, cu_ptr, sequence_ptr, offset_ptr, sequences, chunks, tokens, heads, width, g_b, g_t, g_h, g_c,
    VARLEN: tl.constexpr, C: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """b: gates summed from the first token of their chunk on, to base 2."""
    h = tl.program_id(1)
    _n, batch, t, end = slot_of(
        tl.program_id(0), cu_ptr, sequence_ptr, offset_ptr, sequences, chunks, tokens, VARLEN, C
    )
    rows = t + tl.arange(0, C)
    live = rows < end
    g = rows_of(g_ptr + batch * g_b + h * g_h, rows, live, g_t, g_c, width, 0, BW)
    g = tl.where(g > CEILING, CEILING, tl.where(g < FLOOR, FLOOR, g))
    b = tl.cumsum(g * LOG2E, 0)
    cols = tl.arange(0, BW)
    at = ((batch * tokens + rows)[:, None] * heads + h) * width + cols[None, :]
    tl.store(b_ptr + at, b, live[:, None] & (cols < width)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, b_ptr, s0_ptr, z0_ptr, cu_ptr, o_ptr, den_ptr, s_ptr, z_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, b_t, b_h, b_c, tokens, states, dk, dv, scale, eps,
    GROUP: tl.constexpr, K_SHARE: tl.constexpr, V_SHARE: tl.constexpr, G_SHARE: tl.constexpr,
    GATED: tl.constexpr, NORMALIZE: tl.constexpr, S0: tl.constexpr, Z0: tl.constexpr, VARLEN: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    n, s = tl.program_id(1) // states, tl.program_id(1) % states
    batch, start, end = span_of(n, cu_ptr, tokens, VARLEN)
    first = tl.program_id(0) * BV
    chan, cols = tl.arange(0, BK), first + tl.arange(0, BV)
    state_at = (tl.program_id(1).to(tl.int64) * dk + chan)[:, None] * dv + cols[None, :]
    inside = (chan < dk)[:, None] & (cols < dv)[None, :]
    z_at = tl.program_id(1).to(tl.int64) * dk + chan
    state = tl.load(s0_ptr + state_at, inside, other=0.0) if S0 else tl.zeros([BK, BV], tl.float32)
    z = tl.load(z0_ptr + z_at, chan < dk, other=0.0) if Z0 else tl.zeros([BK], tl.float32)
    k_ptr += batch * k_b + s // K_SHARE * k_h
    v_ptr += batch * v_b + s // V_SHARE * v_h
    if GATED:
        b_ptr += batch * tokens * b_t + s // G_SHARE * b_h
    order = tl.arange(0, C)
    for t in range(start, end, C):
        rows = t + order
        live = rows < end
        k = rows_of(k_ptr, rows, live, k_t, 1, dk, 0, BK)
        v = rows_of(v_ptr, rows, live, v_t, 1, dv, first, BV)
        centred, middle, whole = decays(b_ptr, rows, live, t, end, b_t, b_c, dk, GATED, C, BK)
        kb = k * tl.exp2(-centred)
        bad = beyond(centred, HALF_RANGE) + beyond(kb, MODERATE) + beyond(v, MODERATE)
        for h in range(GROUP):
            head = s * GROUP + h
            q = rows_of(q_ptr + batch * q_b + head * q_h, rows, live, q_t, 1, dk, 0, BK) * scale
            out, total = outputs(
                q, kb, v, state, z, centred, middle, bad, k_ptr, v_ptr, b_ptr, t, end, live, k_t, v_t, b_t, b_c, dk, dv, first,
                GATED, PRECISION, C, BK, BV,
            )  # fmt: skip
            row_at = (batch * tokens + rows) * (states * GROUP) + head
            if NORMALIZE:
                out = out / (total + eps)[:, None]
                tl.store(den_ptr + row_at, total, live & (order * 0 + first == 0))
            out_at = row_at[:, None] * dv + cols[None, :]
            tl.store(o_ptr + out_at, cast(out, o_ptr.dtype.element_ty), live[:, None] & (cols < dv)[None, :])
        state, z = advance(
            state, z, k, v, centred, middle, whole, live, k_ptr, v_ptr, b_ptr, t, end, k_t, v_t, b_t, b_c, dk, dv, first,
            GATED, PRECISION, C, BK, BV,
        )  # fmt: skip
    tl.store(s_ptr + state_at, state, inside)
    if NORMALIZE:
        tl.store(z_ptr + z_at, z, (chan < dk) & (chan * 0 + first == 0))


@triton.jit(do_not_specialize=["tokens", "chunks", "slots"])
def _walks_kernel(
    q_ptr, k_ptr, v_ptr, b_ptr, s0_ptr, z0_ptr, cu_ptr, offset_ptr, grad_ptr, grad_s_ptr, grad_z_ptr, den_ptr, delta_ptr,
    states_ptr, zs_ptr, dstates_ptr, dzs_ptr, ds0_ptr, dz0_ptr, dv_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, b_t, b_h, b_c, tokens, chunks, slots, states, dk, dv, total_rows, scale, eps,
    GROUP: tl.constexpr, K_SHARE: tl.constexpr, V_SHARE: tl.constexpr, G_SHARE: tl.constexpr,
    GATED: tl.constexpr, NORMALIZE: tl.constexpr, S0: tl.constexpr, Z0: tl.constexpr, VARLEN: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """From the start: the state before every chunk, and of every row the products of the numerators with the result's
    gradients (by block of columns). From the end: the gradient of the state after every chunk, and dv."""
    n, s = tl.program_id(1) // states, tl.program_id(1) % states
    batch, start, end = span_of(n, cu_ptr, tokens, VARLEN)
    base = tl.load(offset_ptr + n) if VARLEN else n.to(tl.int64) * chunks
    first = tl.program_id(0) * BV
    chan, cols = tl.arange(0, BK), first + tl.arange(0, BV)
    inside = (chan < dk)[:, None] & (cols < dv)[None, :]
    tile = chan[:, None] * dv + cols[None, :]
    own = tl.program_id(1).to(tl.int64)
    lead = (chan < dk) & (chan * 0 + first == 0)
    if GATED:
        b_ptr += batch * tokens * b_t + s // G_SHARE * b_h
    k_ptr += batch * k_b + s // K_SHARE * k_h
    order = tl.arange(0, C)
    count = (end - start + C - 1) // C
    if not REVERSE:
        state = tl.load(s0_ptr + own * dk * dv + tile, inside, other=0.0) if S0 else tl.zeros([BK, BV], tl.float32)
        z = tl.load(z0_ptr + own * dk + chan, chan < dk, other=0.0) if Z0 else tl.zeros([BK], tl.float32)
        v_ptr += batch * v_b + s // V_SHARE * v_h
        for c in range(count):
            t = start + c * C
            rows = t + order
            live = rows < end
            at = (base + c) * states + s
            fits = chan * 0 + base + c < slots
            tl.store(states_ptr + at * dk * dv + tile, state, inside & fits[:, None])
            if NORMALIZE:
                tl.store(zs_ptr + at * dk + chan, z, lead & fits)
            k = rows_of(k_ptr, rows, live, k_t, 1, dk, 0, BK)
            v = rows_of(v_ptr, rows, live, v_t, 1, dv, first, BV)
            centred, middle, whole = decays(b_ptr, rows, live, t, end, b_t, b_c, dk, GATED, C, BK)
            if NORMALIZE:
                kb = k * tl.exp2(-centred)
                bad = beyond(centred, HALF_RANGE) + beyond(kb, MODERATE) + beyond(v, MODERATE)
                for h in range(GROUP):
                    head = s * GROUP + h
                    q = rows_of(q_ptr + batch * q_b + head * q_h, rows, live, q_t, 1, dk, 0, BK) * scale
                    out, _total = outputs(
                        q, kb, v, state, z, centred, middle, bad, k_ptr, v_ptr, b_ptr, t, end, live, k_t, v_t, b_t, b_c, dk,
                        dv, first, GATED, PRECISION, C, BK, BV,
                    )  # fmt: skip
                    row_at = (batch * tokens + rows) * (states * GROUP) + head
                    part = tl.sum(out * rows_of(grad_ptr, row_at, live, dv, 1, dv, first, BV), 1)
                    tl.store(delta_ptr + tl.program_id(0) * total_rows + row_at, part, live)
            state, z = advance(
                state, z, k, v, centred, middle, whole, live, k_ptr, v_ptr, b_ptr, t, end, k_t, v_t, b_t, b_c, dk, dv, first,
                GATED, PRECISION, C, BK, BV,
            )  # fmt: skip
    else:
        dstate = tl.load(grad_s_ptr + own * dk * dv + tile, inside, other=0.0)
        dz = tl.zeros([BK], tl.float32)
        if NORMALIZE:
            dz = tl.load(grad_z_ptr + own * dk + chan, chan < dk, other=0.0)
        for i in range(count):
            c = count - 1 - i
            t = start + c * C
            rows = t + order
            live = rows < end
            at = (base + c) * states + s
            fits = chan * 0 + base + c < slots
            tl.store(dstates_ptr + at * dk * dv + tile, dstate, inside & fits[:, None])
            if NORMALIZE:
                tl.store(dzs_ptr + at * dk + chan, dz, lead & fits)
            k = rows_of(k_ptr, rows, live, k_t, 1, dk, 0, BK)
            centred, middle, whole = decays(b_ptr, rows, live, t, end, b_t, b_c, dk, GATED, C, BK)
            dv_out = tl.dot(leaving(k, centred, middle, whole, live), dstate, input_precision=PRECISION)
            kb = k * tl.exp2(-centred)
            bad = beyond(centred, HALF_RANGE) + beyond(kb, MODERATE)
            dstate = dstate * tl.exp2(whole)[:, None]
            dz = dz * tl.exp2(whole)
            for h in range(GROUP):
                head = s * GROUP + h
                q = rows_of(q_ptr + batch * q_b + head * q_h, rows, live, q_t, 1, dk, 0, BK) * scale
                row_at = (batch * tokens + rows) * (states * GROUP) + head
                dnum, dden = row_gradients(
                    grad_ptr, den_ptr, delta_ptr, row_at, live, first, dv, eps, total_rows, NORMALIZE, C, BV
                )
                qb = q * tl.exp2(centred)
                if bad + beyond(qb, MODERATE) + beyond(dnum, MODERATE) == 0:
                    scores = tl.dot(kb, tl.trans(qb), input_precision=PRECISION)
                    scores = tl.where(order[:, None] <= order[None, :], scores, 0.0)
                    dv_out += tl.dot(scores, dnum, input_precision=PRECISION)
                else:
                    for j in range(tl.minimum(C, end - t)):
                        later = (order >= j) & live
                        w = pair_decay(centred, middle, b_ptr, t + j, later, b_t, b_c, dk, GATED, BK)
                        key = row_of(k_ptr, t + j, k_t, 1, dk, 0, BK)
                        score = tl.sum(q * w * key[None, :], 1)
                        part = tl.sum(tl.where(later[:, None], score[:, None] * dnum, 0.0), 0)
                        dv_out += tl.where((order == j)[:, None], part[None, :], 0.0)
                qt = entering(q, centred, middle, live)
                dstate += tl.dot(tl.trans(qt), dnum, input_precision=PRECISION)
                dz += tl.sum(qt * dden[:, None], 0)
            at = ((batch * tokens + rows) * states + s)[:, None] * dv + cols[None, :]
            tl.store(dv_ptr + at, cast(dv_out, dv_ptr.dtype.element_ty), live[:, None] & (cols < dv)[None, :])
            dstate = tl.where((chan < dk)[:, None], dstate, 0.0)
        if S0:
            tl.store(ds0_ptr + own * dk * dv + tile, dstate, inside)
        if Z0:
            tl.store(dz0_ptr + own * dk + chan, dz, lead)


@triton.jit(do_not_specialize=["sequences", "chunks", "tokens"])
def _dqk_kernel(
    q_ptr, k_ptr, v_ptr, b_ptr, cu_ptr, sequence_ptr, offset_ptr, grad_ptr, den_ptr, delta_ptr,
    states_ptr, zs_ptr, dstates_ptr, dzs_ptr, dq_ptr, dk_ptr, dg_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, b_t, b_h, b_c, sequences, chunks, tokens, states, dk, dv, total_rows, scale, eps,
    GROUP: tl.constexpr, K_SHARE: tl.constexpr, V_SHARE: tl.constexpr, G_SHARE: tl.constexpr, GATED: tl.constexpr,
    NORMALIZE: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dq, dk, and what the gate gradients are sums of, of one chunk and state head."""
    slot, s = tl.program_id(0), tl.program_id(1)
    _n, batch, t, end = slot_of(slot, cu_ptr, sequence_ptr, offset_ptr, sequences, chunks, tokens, VARLEN, C)
    chan, order = tl.arange(0, BK), tl.arange(0, C)
    rows = t + order
    live = rows < end
    if t < end:
        k_ptr += batch * k_b + s // K_SHARE * k_h
        v_ptr += batch * v_b + s // V_SHARE * v_h
        if GATED:
            b_ptr += batch * tokens * b_t + s // G_SHARE * b_h
        k = rows_of(k_ptr, rows, live, k_t, 1, dk, 0, BK)
        centred, middle, whole = decays(b_ptr, rows, live, t, end, b_t, b_c, dk, GATED, C, BK)
        own = slot.to(tl.int64) * states + s
        z = tl.zeros([BK], tl.float32)
        dz = tl.zeros([BK], tl.float32)
        if NORMALIZE:
            z = tl.load(zs_ptr + own * dk + chan, chan < dk, other=0.0)
            dz = tl.load(dzs_ptr + own * dk + chan, chan < dk, other=0.0)
        carry = z * dz
        dk_out = tl.zeros([C, BK], tl.float32) + dz[None, :]
        far = tl.zeros([], tl.int32)
        for first in range(0, dv, BV):
            cols = first + tl.arange(0, BV)
            tile = own * dk * dv + chan[:, None] * dv + cols[None, :]
            inside = (chan < dk)[:, None] & (cols < dv)[None, :]
            dstate = tl.load(dstates_ptr + tile, inside, other=0.0)
            v = rows_of(v_ptr, rows, live, v_t, 1, dv, first, BV)
            far += beyond(v, MODERATE)
            dk_out += tl.dot(v, tl.trans(dstate), input_precision=PRECISION)
            carry += tl.sum(tl.load(states_ptr + tile, inside, other=0.0) * dstate, 1)
        kb = k * tl.exp2(-centred)
        bad = far + beyond(centred, HALF_RANGE) + beyond(kb, MODERATE)
        dk_out = tl.where(live[:, None], dk_out * tl.exp2((whole - middle)[None, :] - centred), 0.0)
        # The state's part of the gates: decay of what came in, and of what the chunk's tokens left.
        carry = carry * tl.exp2(whole) + tl.sum(k * dk_out, 0)
        flow = tl.zeros([C, BK], tl.float32)
        for h in range(GROUP):
            head = s * GROUP + h
            q = rows_of(q_ptr + batch * q_b + head * q_h, rows, live, q_t, 1, dk, 0, BK)
            row_at = (batch * tokens + rows) * (states * GROUP) + head
            _rows, dden = row_gradients(
                grad_ptr, den_ptr, delta_ptr, row_at, live, 0, dv, eps, total_rows, NORMALIZE, C, BV
            )
            dq = dden[:, None] * z[None, :]
            pairs = tl.zeros([C, C], tl.float32) + dden[:, None]
            flipped = tl.zeros([C, C], tl.float32) + dden[None, :]
            qb = q * tl.exp2(centred)
            steep = bad + beyond(qb, MODERATE)
            for first in range(0, dv, BV):
                cols = first + tl.arange(0, BV)
                tile = own * dk * dv + chan[:, None] * dv + cols[None, :]
                state = tl.load(states_ptr + tile, (chan < dk)[:, None] & (cols < dv)[None, :], other=0.0)
                v = rows_of(v_ptr, rows, live, v_t, 1, dv, first, BV)
                dnum, _dden = row_gradients(
                    grad_ptr, den_ptr, delta_ptr, row_at, live, first, dv, eps, total_rows, NORMALIZE, C, BV
                )
                steep += beyond(dnum, MODERATE)
                dq += tl.dot(dnum, tl.trans(state), input_precision=PRECISION)
                pairs += tl.dot(dnum, tl.trans(v), input_precision=PRECISION)
                flipped += tl.dot(v, tl.trans(dnum), input_precision=PRECISION)
            dq = entering(dq * scale, centred, middle, live)
            if steep == 0:
                pairs = tl.where(order[:, None] >= order[None, :], pairs * scale, 0.0)
                flipped = tl.where(order[:, None] <= order[None, :], flipped * scale, 0.0)
                dq += tl.exp2(centred) * tl.dot(pairs, kb, input_precision=PRECISION)
                dk_out += tl.exp2(-centred) * tl.dot(flipped, qb, input_precision=PRECISION)
            else:
                for j in range(tl.minimum(C, end - t)):
                    later = (order >= j) & live
                    w = pair_decay(centred, middle, b_ptr, t + j, later, b_t, b_c, dk, GATED, BK)
                    key = row_of(k_ptr, t + j, k_t, 1, dk, 0, BK)
                    ds = tl.sum(tl.where((order == j)[None, :], pairs, 0.0), 1) * scale
                    dq += tl.where(later[:, None], ds[:, None] * key[None, :] * w, 0.0)
                    part = tl.sum(tl.where(later[:, None], ds[:, None] * q * w, 0.0), 0)
                    dk_out += tl.where((order == j)[:, None], part[None, :], 0.0)
            flow += q * dq
            at = row_at[:, None] * dk + chan[None, :]
            tl.store(dq_ptr + at, cast(dq, dq_ptr.dtype.element_ty), live[:, None] & (chan < dk)[None, :])
        at = ((batch * tokens + rows) * states + s)[:, None] * dk + chan[None, :]
        mask = live[:, None] & (chan < dk)[None, :]
        tl.store(dk_ptr + at, cast(dk_out, dk_ptr.dtype.element_ty), mask)
        if GATED:
            flow -= k * dk_out
            last = rows == tl.minimum(t + C, end) - 1
            tl.store(dg_ptr + at, flow + tl.where(last[:, None], carry[None, :], 0.0), mask)


@triton.jit(do_not_specialize=["sequences", "chunks", "tokens"])
def _gate_gradient_kernel(
    flow_ptr, g_ptr, dg_ptr, cu_ptr, sequence_ptr, offset_ptr, sequences, chunks, tokens, heads, dk, g_b, g_t, g_h, g_c,
    SHARE: tl.constexpr, CHANNEL: tl.constexpr, VARLEN: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dg of one chunk and gate head: sums from each token to the chunk's end, over the states that share the gate."""
    h = tl.program_id(1)
    _n, batch, t, end = slot_of(
        tl.program_id(0), cu_ptr, sequence_ptr, offset_ptr, sequences, chunks, tokens, VARLEN, C
    )
    rows = t + tl.arange(0, C)
    live = rows < end
    chan = tl.arange(0, BK)
    flow = tl.zeros([C, BK], tl.float32)
    for i in range(SHARE):
        state = (batch * tokens + rows) * (heads * SHARE) + h * SHARE + i
        flow += rows_of(flow_ptr, state, live, dk, 1, dk, 0, BK)
    dg = tl.cumsum(flow, 0, reverse=True)
    width = dk if CHANNEL else 1
    g = rows_of(g_ptr + batch * g_b + h * g_h, rows, live, g_t, g_c, dk, 0, BK)
    dg = tl.where(g < FLOOR, 0.0, dg)
    row_at = (batch * tokens + rows) * heads + h
    if CHANNEL:
        mask = live[:, None] & (chan < width)[None, :]
        tl.store(dg_ptr + row_at[:, None] * dk + chan[None, :], cast(dg, dg_ptr.dtype.element_ty), mask)
    else:
        tl.store(dg_ptr + row_at, cast(tl.sum(dg, 1), dg_ptr.dtype.element_ty), live)


@triton.jit
def _share_kernel(x_ptr, y_ptr, width, numel, SHARE: tl.constexpr, BLOCK: tl.constexpr):
    """y [rows, width]: sums of SHARE neighbouring rows of x, in order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, c = i // width, i % width
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(SHARE):
        total += tl.load(x_ptr + (row * SHARE + j) * width + c, i < numel, other=0.0)
    tl.store(y_ptr + i, cast(total, y_ptr.dtype.element_ty), i < numel)


@triton.jit
def _step_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, s_ptr, z_ptr, index_ptr, o_ptr, pool, q_heads, k_heads, v_heads, g_heads, states, dk, dv,
    scale, eps, GATE: tl.constexpr, NORMALIZE: tl.constexpr, INDEXED: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    row, s = (tl.program_id(0) // states).to(tl.int64), tl.program_id(0) % states
    place = tl.load(index_ptr + row) if INDEXED else row
    chan = tl.arange(0, BK)
    inside = (chan < dk) & (chan * 0 + place >= 0) & (chan * 0 + place < pool)
    key = tl.load(k_ptr + (row * k_heads + s * k_heads // states) * dk + chan, inside, other=0.0).to(tl.float32)
    decay = tl.full([BK], 1.0, tl.float32)
    if GATE > 0:
        gate = row * g_heads + s * g_heads // states
        at = gate * dk + chan if GATE == 2 else gate + 0 * chan
        decay = tl.exp(tl.load(g_ptr + at, inside, other=0.0).to(tl.float32))
    used = (place >= 0) & (place < pool)
    own = place * states + s
    z = tl.zeros([BK], tl.float32)
    if NORMALIZE:
        z = tl.load(z_ptr + own * dk + chan, inside, other=0.0) * decay + key
        tl.debug_barrier()  # few channels are held by several threads: all have read before one writes
        tl.store(z_ptr + own * dk + chan, z, inside)
    group = q_heads // states
    value_ptr = v_ptr + (row * v_heads + s * v_heads // states) * dv
    for first in range(0, dv, BV):
        cols = first + tl.arange(0, BV)
        value = tl.load(value_ptr + cols, cols < dv, other=0.0).to(tl.float32)
        state = token_tile(s_ptr + own * dk * dv, chan, inside, cols, dv, key, decay, value, True)
        for h in range(group):
            head = row * q_heads + s * group + h
            q = tl.load(q_ptr + head * dk + chan, inside, other=0.0).to(tl.float32) * scale
            out = tl.sum(q[:, None] * state, 0)
            if NORMALIZE:
                out = out / (tl.sum(q * z, 0) + eps)
            out = tl.where(used, out, 0.0)
            tl.store(o_ptr + head * dv + cols, cast(out, o_ptr.dtype.element_ty), cols < dv)


# --- launchers ----------------------------------------

# Scaled operands keep more digits than 16-bit inputs have: gradients and states are differences that would lose them.
_PRECISIONS = {torch.bfloat16: "tf32x3", torch.float16: "tf32x3", torch.float32: "ieee"}


class _Plan:
    """Sizes, strides and constants that the kernels of one call have in common."""

    def __init__(self, q: Any, k: Any, v: Any, g: Any, s0: Any, z0: Any, cu_seqlens: Any, normalize: bool) -> None:
        self.batch, self.tokens, heads, self.dk = q.shape
        self.dv = v.shape[3]
        gates = 0 if g is None else g.shape[2]
        self.states = max(k.shape[2], v.shape[2], gates)
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.block_k = max(16, triton.next_power_of_2(self.dk))
        self.block_v = max(16, triton.next_power_of_2(self.dv))
        self.chunk = 32 if self.block_k <= 128 else 16
        self.block_v = min(self.block_v, 32)
        self.warps = 8 if self.block_k >= 64 else 4
        self.share = {"K": self.states // k.shape[2], "V": self.states // v.shape[2], "G": self.states // max(gates, 1)}
        self.common: dict[str, Any] = {
            "GROUP": heads // self.states, "K_SHARE": self.share["K"], "G_SHARE": self.share["G"], "GATED": g is not None,
            "NORMALIZE": normalize, "VARLEN": cu_seqlens is not None, "PRECISION": _PRECISIONS[q.dtype], "C": self.chunk,
            "BK": self.block_k, "BV": self.block_v, "num_warps": self.warps, "num_stages": 1,
        }  # fmt: skip
        self.starts = {"S0": s0 is not None, "Z0": z0 is not None, "V_SHARE": self.share["V"]}
        self.strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        self.cu = cu_seqlens
        self.chunks = triton.cdiv(self.tokens, self.chunk)
        self.slots = self.sequences * self.chunks
        self.sequence = self.offset = None
        if cu_seqlens is not None:  # slots for any division of the tokens; no value is read on the host
            self.slots = self.tokens // self.chunk + self.sequences
            bounds = cu_seqlens.clamp(0, self.tokens)
            counts = ((bounds[1:] - bounds[:-1]).clamp_min(0) + self.chunk - 1) // self.chunk
            ends = counts.cumsum(0)
            self.offset = ends - counts
            self.sequence = torch.searchsorted(ends, torch.arange(self.slots, device=q.device), right=True)
        self.sums, self.gate_strides = None, (0, 0, 0)
        if g is not None:
            channel = g.dim() == 4
            width = self.dk if channel else 1
            self.gate = (g, g.stride(0), g.stride(1), g.stride(2), g.stride(3) if channel else 0)
            self.sums = q.new_empty((*g.shape[:3], width), dtype=torch.float32)
            self.gate_strides = (gates * width, width, 1 if channel else 0)
            self.chunked(_gate_sum_kernel, gates)(
                g, self.sums, *self.slot_arguments, gates, width, *self.gate[1:], VARLEN=cu_seqlens is not None, C=self.chunk,
                BW=max(1, triton.next_power_of_2(width)), num_warps=4,
            )  # fmt: skip

    @property
    def slot_arguments(self) -> tuple[Any, ...]:
        return self.cu, self.sequence, self.offset, self.sequences, self.chunks, self.tokens

    def chunked(self, kernel: Any, *grid: int) -> Any:
        """A launch over chunk slots; a no-op where there is none."""
        return kernel[(self.slots, *grid)] if self.slots else lambda *args, **options: None


def gated_linear_attention_fwd(
    q: Any, k: Any, v: Any, g: Any, s0: Any, z0: Any, cu_seqlens: Any, scale: float, eps: float, normalize: bool
) -> tuple[torch.Tensor, ...]:
    """`subquad_triton::gated_linear_attention_fwd`."""
    plan = _Plan(q, k, v, g, s0, z0, cu_seqlens, normalize)
    wide = {"dtype": torch.float32, "device": q.device}
    heads, count = q.shape[2], plan.sequences
    o = q.new_empty((*q.shape[:3], plan.dv))
    den = torch.empty((plan.batch if normalize else 0, plan.tokens, heads), **wide)
    s = torch.empty((count, plan.states, plan.dk, plan.dv), **wide)
    z = torch.empty((count if normalize else 0, plan.states, plan.dk), **wide)
    if count:
        _forward_kernel[(triton.cdiv(plan.dv, plan.block_v), count * plan.states)](
            q, k, v, plan.sums, s0, z0, cu_seqlens, o, den, s, z, *plan.strides, *plan.gate_strides, plan.tokens,
            plan.states, plan.dk, plan.dv, scale, eps, **plan.common, **plan.starts,
        )  # fmt: skip
    return o, den, s, z


def gated_linear_attention_bwd(
    grad_o: Any, grad_s: Any, grad_z: Any, den: Any, q: Any, k: Any, v: Any, g: Any, s0: Any, z0: Any,
    cu_seqlens: Any, scale: float, eps: float, normalize: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """`subquad_triton::gated_linear_attention_bwd`."""
    plan = _Plan(q, k, v, g, s0, z0, cu_seqlens, normalize)
    wide = {"dtype": torch.float32, "device": q.device}
    states, dk, dv, tokens = plan.states, plan.dk, plan.dv, plan.tokens
    before, after = (torch.empty((plan.slots, states, dk, dv), **wide) for _ in range(2))
    z_before, z_after = (torch.empty((plan.slots if normalize else 0, states, dk), **wide) for _ in range(2))
    ds0 = torch.empty((0, states, dk, dv) if s0 is None else s0.shape, **wide)
    dz0 = torch.empty((0, states, dk) if z0 is None else z0.shape, **wide)

    def of_states(x: Any, share: int) -> torch.Tensor:
        """A gradient by state heads: the result itself where no head is shared."""
        dtype = q.dtype if share == 1 else torch.float32
        return torch.empty((plan.batch, tokens, states, x.shape[3]), dtype=dtype, device=q.device)

    dk_out, dv_out = of_states(k, plan.share["K"]), of_states(v, plan.share["V"])
    blocks, rows = triton.cdiv(dv, plan.block_v), grad_o.shape[0] * tokens * grad_o.shape[2]
    delta = torch.empty((blocks, rows) if normalize else (0,), **wide)
    for reverse in (False, True) if plan.sequences else ():
        _walks_kernel[(blocks, plan.sequences * states)](
            q, k, v, plan.sums, s0, z0, cu_seqlens, plan.offset, grad_o, grad_s, grad_z, den, delta,
            before, z_before, after, z_after, ds0, dz0, dv_out, *plan.strides, *plan.gate_strides,
            tokens, plan.chunks, plan.slots, states, dk, dv, rows, scale, eps, REVERSE=reverse, **plan.common, **plan.starts,
        )  # fmt: skip
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    flow = torch.empty((0,) if g is None else (plan.batch, tokens, states, dk), **wide)
    sizes = (plan.sequences, plan.chunks, tokens, states, dk, dv, rows, scale, eps)
    ends = (cu_seqlens, plan.sequence, plan.offset, grad_o, den, delta)
    plan.chunked(_dqk_kernel, states)(
        q, k, v, plan.sums, *ends, before, z_before, after, z_after, dq, dk_out, flow, *plan.strides, *plan.gate_strides,
        *sizes, V_SHARE=plan.share["V"], **plan.common,
    )  # fmt: skip
    dg = torch.empty((0,), **wide)
    if g is not None:
        dg = torch.empty(g.shape, dtype=g.dtype, device=g.device)
        plan.chunked(_gate_gradient_kernel, g.shape[2])(
            flow, g, dg, *plan.slot_arguments, g.shape[2], dk, *plan.gate[1:], SHARE=plan.share["G"], CHANNEL=g.dim() == 4,
            VARLEN=cu_seqlens is not None, C=plan.chunk, BK=plan.block_k, num_warps=plan.warps,
        )  # fmt: skip
    return dq, _shared(dk_out, plan.share["K"], q.dtype), _shared(dv_out, plan.share["V"], q.dtype), dg, ds0, dz0


def _shared(x: torch.Tensor, share: int, dtype: torch.dtype) -> torch.Tensor:
    """Gradients of heads that `share` states read."""
    if share == 1:
        return x
    b, t, states, width = x.shape
    y = torch.empty((b, t, states // share, width), dtype=dtype, device=x.device)
    if y.numel():
        _share_kernel[(triton.cdiv(y.numel(), 1024),)](x, y, width, y.numel(), SHARE=share, BLOCK=1024, num_warps=4)
    return y


def gated_linear_attention_step_(
    q: Any, k: Any, v: Any, g: Any, state: Any, z: Any, state_indices: Any, scale: float, eps: float
) -> torch.Tensor:
    """`subquad_triton::gated_linear_attention_step_`."""
    rows, heads, dk = q.shape
    dv, states = v.shape[2], state.shape[1]
    o = q.new_empty((rows, heads, dv))
    if rows:
        _step_kernel[(rows * states,)](
            q, k, v, g, state, z, state_indices, o, state.shape[0], heads, k.shape[1], v.shape[1],
            1 if g is None else g.shape[1], states, dk, dv, scale, eps,
            GATE=0 if g is None else g.dim() - 1, NORMALIZE=z is not None, INDEXED=state_indices is not None,
            BK=triton.next_power_of_2(dk), BV=min(32, triton.next_power_of_2(dv)), num_warps=4,
        )  # fmt: skip
    return o


def _aot_args(dtype: torch.dtype, d: int, gate: str, backward: bool, shared: bool = False) -> tuple[Any, ...]:
    b, t, h = 2, 4096, 16
    meta = partial(torch.empty, device="meta")
    q, k, v, o = (meta(b, t, h, d, dtype=dtype) for _ in range(4))
    if shared:
        v = meta(b, t, 4, d, dtype=dtype)
    g = {"channel": meta(b, t, h, d), "head": meta(b, t, h), "none": None}[gate]
    options = (g, None, None, None, d**-0.5, 1e-10, True)
    if not backward:
        return (q, k, v, *options)
    return (o, meta(b, h, d, d), meta(b, h, d), meta(b, t, h), q, k, v, *options)


def _step_args() -> tuple[Any, ...]:
    meta = partial(torch.empty, device="meta")
    q, k, v = (meta(8, 16, 128, dtype=torch.bfloat16) for _ in range(3))
    return (q, k, v, meta(8, 16, 128), meta(8, 16, 128, 128), meta(8, 16, 128), None, 128**-0.5, 1e-10)


_SPILLS = dict.fromkeys(
    ("_forward_kernel", "_walks_kernel", "_dqk_kernel"),
    "the float32 tiles of a chunk do not fit together; they have yet to be split by key channels",
)
AOT = [
    AotCase(f"{name} D{d} {gate}", launcher, partial(_aot_args, dtype, d, gate, backward), _SPILLS)
    for name, dtype, d, gate in (
        ("bf16", torch.bfloat16, 128, "channel"),
        ("bf16", torch.bfloat16, 64, "channel"),
        ("bf16", torch.bfloat16, 128, "head"),
        ("fp32", torch.float32, 64, "channel"),
    )
    for launcher, backward in ((gated_linear_attention_fwd, False), (gated_linear_attention_bwd, True))
]
AOT += [
    AotCase(
        "bf16 D64 shared",
        gated_linear_attention_bwd,
        partial(_aot_args, torch.bfloat16, 64, "channel", True, shared=True),
        _SPILLS,
    ),
    AotCase("bf16 D128 step", gated_linear_attention_step_, _step_args),
]

__all__ = ["AOT", "gated_linear_attention_bwd", "gated_linear_attention_fwd", "gated_linear_attention_step_"]
