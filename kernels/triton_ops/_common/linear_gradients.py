"""Gradients of one chunk of linear attention, given the states before it and the gradients of those after it; shared heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .linear import (
    FLOOR,
    MODERATE,
    advance,
    decay_of,
    decays,
    denominator,
    exact_rows_of,
    exact_sums,
    operand,
    retreat,
    row_of,
    rows_of,
    size,
    tile_of,
    vector_of,
)  # fmt: skip
from .numerics import cast


@triton.jit
def dqk_of_chunk(
    slot, s, batch, t, end, channel, blocks, q_ptr, k_ptr, v_ptr, g_ptr, b_ptr, m_ptr, s_ptr, z_ptr, grad_ptr, den_ptr,
    dden_ptr, u_ptr, ds_ptr, dz_ptr, dq_ptr, dk_ptr, dg_ptr, q_t, q_h, k_t, v_t, g_t, g_c, tokens, states, dk, dv, scale, eps,
    GROUP: tl.constexpr, G_SHARE: tl.constexpr, GATE: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dq, dk and the gate gradients in the channels channel .. channel + BK."""
    chan, order = channel + tl.arange(0, BK), tl.arange(0, C)
    rows = t + order
    live = rows < end
    mask = live[:, None] & (chan < dk)[None, :]
    row_at = (batch * tokens + rows) * states + s
    dk_at = row_at[:, None] * dk + chan[None, :]
    own = slot * states + s
    later = order[:, None] <= order[None, :]
    z = vector_of(z_ptr, own, dk, channel, NORMALIZE, BK)
    dz = vector_of(dz_ptr, own, dk, channel, NORMALIZE, BK)
    centred, middle, _rest = decays(
        b_ptr, m_ptr, slot, batch * tokens, t, end, states // G_SHARE, s // G_SHARE, dk, channel, GATE, C, BK
    )
    largest = size(rows_of(k_ptr, rows, live, k_t, 1, dk, channel, BK) * tl.exp2(-centred)) + size(middle)
    for h in range(GROUP):
        q = rows_of(q_ptr + h * q_h, rows, live, q_t, 1, dk, channel, BK) * scale
        largest += size(q * tl.exp2(centred))
    moderate = largest <= MODERATE
    # flow: what the gates' gradients are sums of, q dq - k dk.
    # carry: what all gates of the chunk owe to the state after it: decay of the state before, and of what the tokens left.
    carry = tl.zeros([BK], tl.float32)
    if moderate:
        # Loaded again, and again below: what is alive must fit the registers.
        centred, middle, rest = decays(
            b_ptr, m_ptr, slot, batch * tokens, t, end, states // G_SHARE, s // G_SHARE, dk, channel, GATE, C, BK
        )
        dk_out = tl.zeros([C, BK], tl.float32) + (dz * tl.exp2(rest))[None, :]
        for first in range(0, dv, BV):
            tile, inside = tile_of(own, dk, dv, channel, first, BK, BV)
            dstate = tl.load(ds_ptr + tile, inside, other=0.0) * tl.exp2(rest)[:, None]
            if GATE > 0:
                carry += tl.sum(tl.load(s_ptr + tile, inside, other=0.0) * dstate, 1)
            v = rows_of(v_ptr, rows, live, v_t, 1, dv, first, BV)
            dk_out = tl.dot(v, tl.trans(operand(dstate, PRECISION)), dk_out, input_precision=PRECISION)
        kb = rows_of(k_ptr, rows, live, k_t, 1, dk, channel, BK) * tl.exp2(-centred)
        kb = operand(kb, PRECISION)
        carry = (carry + z * dz * tl.exp2(rest)) * tl.exp2(middle) + tl.sum(kb * dk_out, 0)
        for h in range(GROUP):
            at = row_at * GROUP + h
            inverse, dden = denominator(den_ptr, dden_ptr, at, live, eps, NORMALIZE)
            pairs = tl.zeros([C, C], tl.float32)
            for first in range(0, dv, BV):
                v = exact_rows_of(v_ptr, rows, live, v_t, 1, dv, first, BV)
                grad = exact_rows_of(grad_ptr, at, live, dv, 1, dv, first, BV)
                pairs = tl.dot(v, tl.trans(grad), pairs, input_precision=PRECISION)
            pairs = tl.where(later, pairs * inverse[None, :] + dden[None, :], 0.0)
            q = rows_of(q_ptr + h * q_h, rows, live, q_t, 1, dk, channel, BK) * scale
            qb = operand(q * tl.exp2(centred), PRECISION)
            dk_out = tl.dot(operand(pairs, PRECISION), qb, dk_out, input_precision=PRECISION)
        tl.store(dk_ptr + dk_at, cast(dk_out * tl.exp2(-centred), dk_ptr.dtype.element_ty), mask)
        flow = -kb * dk_out
        sums = tl.zeros([C, BK], tl.float32)
        if NORMALIZE:
            earlier = (order[:, None] >= order[None, :]).to(tl.float32)
            sums = tl.dot(earlier, kb, input_precision=PRECISION) + (z * tl.exp2(middle))[None, :]
        for h in range(GROUP):
            inverse, dden = denominator(den_ptr, dden_ptr, row_at * GROUP + h, live, eps, NORMALIZE)
            at = (row_at * GROUP + h)[:, None] * dk + chan[None, :]
            dq = tl.load(u_ptr + at, mask, other=0.0) * tl.exp2(-centred) * inverse[:, None] + sums * dden[:, None]
            q = rows_of(q_ptr + h * q_h, rows, live, q_t, 1, dk, channel, BK) * scale
            flow += operand(q * tl.exp2(centred), PRECISION) * dq
            tl.store(dq_ptr + at, cast(dq * tl.exp2(centred) * scale, dq_ptr.dtype.element_ty), mask)
    else:
        dk_out = tl.zeros([C, BK], tl.float32)
        for first in range(0, dv, BV):
            tile, inside = tile_of(own, dk, dv, channel, first, BK, BV)
            dstate = tl.load(ds_ptr + tile, inside, other=0.0)
            if GATE > 0:
                state = tl.load(s_ptr + tile, inside, other=0.0)
                now = z
                for row in range(t, tl.minimum(t + C, end)):
                    state, now = advance(
                        state, now, row, k_ptr, v_ptr, g_ptr, k_t, v_t, g_t, g_c, dk, dv, channel, first, GATE, BK, BV
                    )
                carry += tl.sum(state * dstate, 1) + tl.where(first == 0, now * dz, 0.0)
            now = dz
            for j in range(tl.minimum(C, end - t)):
                row = tl.minimum(t + C, end) - 1 - j
                dstate, now = retreat(
                    dstate, now, row, ((batch * tokens + row) * states + s) * GROUP, q_ptr, grad_ptr, den_ptr, dden_ptr,
                    q_t, q_h, dk, dv, channel, first, scale, eps, GROUP, NORMALIZE, BK, BV,
                )  # fmt: skip
                part = tl.sum(dstate * row_of(v_ptr, row, v_t, 1, dv, first, BV)[None, :], 1)
                part += tl.where(first == 0, now, 0.0)
                dk_out += tl.where((rows == row)[:, None], part[None, :], 0.0)
                decay = decay_of(g_ptr, row, g_t, g_c, dk, channel, GATE, BK)
                dstate = dstate * decay[:, None]
                now = now * decay
        tl.store(dk_ptr + dk_at, cast(dk_out, dk_ptr.dtype.element_ty), mask)
        flow = -rows_of(k_ptr, rows, live, k_t, 1, dk, channel, BK) * dk_out
        sums = tl.zeros([C, BK], tl.float32)
        if NORMALIZE:
            for row in range(t, tl.minimum(t + C, end)):
                key = row_of(k_ptr, row, k_t, 1, dk, channel, BK)
                z = z * decay_of(g_ptr, row, g_t, g_c, dk, channel, GATE, BK) + key
                sums += tl.where((rows == row)[:, None], z[None, :], 0.0)
        for h in range(GROUP):
            inverse, dden = denominator(den_ptr, dden_ptr, row_at * GROUP + h, live, eps, NORMALIZE)
            at = (row_at * GROUP + h)[:, None] * dk + chan[None, :]
            dq = tl.load(u_ptr + at, mask, other=0.0) * inverse[:, None] + sums * dden[:, None]
            q = rows_of(q_ptr + h * q_h, rows, live, q_t, 1, dk, channel, BK) * scale
            flow += q * dq
            tl.store(dq_ptr + at, cast(dq * scale, dq_ptr.dtype.element_ty), mask)
    if GATE == 2:
        if size(flow) <= MODERATE:
            dg = exact_sums(later.to(tl.float32), flow)
        else:
            dg = tl.zeros([C, BK], tl.float32)
            for j in range(C):
                part = tl.sum(tl.where((order == j)[:, None], flow, 0.0), 0)
                dg += tl.where((order <= j)[:, None], part[None, :], 0.0)
        g = rows_of(g_ptr, rows, live, g_t, g_c, dk, channel, BK)
        dg = tl.where(g < FLOOR, 0.0, dg + carry[None, :])
        tl.store(dg_ptr + dk_at, cast(dg, dg_ptr.dtype.element_ty), mask)
    if GATE == 1:
        dg = tl.sum(tl.where(later, tl.sum(flow, 1)[None, :], 0.0), 1) + tl.sum(carry)
        g = tl.load(g_ptr + rows.to(tl.int64) * g_t, live, other=0.0).to(tl.float32)
        dg = tl.where(g < FLOOR, 0.0, dg)
        tl.store(dg_ptr + row_at * blocks + channel // BK, cast(dg, dg_ptr.dtype.element_ty), live)


@triton.jit
def dv_of_chunk(
    slot, s, batch, t, end, first, q_ptr, k_ptr, g_ptr, b_ptr, m_ptr, grad_ptr, den_ptr, dden_ptr, ds_ptr, dv_ptr,
    q_t, q_h, k_t, g_t, g_c, tokens, states, dk, dv, scale, eps,
    GROUP: tl.constexpr, G_SHARE: tl.constexpr, GATE: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dv in the columns first .. first + BV."""
    cols, order = first + tl.arange(0, BV), tl.arange(0, C)
    rows = t + order
    live = rows < end
    row_at = (batch * tokens + rows) * states + s
    own = slot * states + s
    largest = 0.0
    dv_out = tl.zeros([C, BV], tl.float32)
    for h in range(GROUP):
        scores = tl.zeros([C, C], tl.float32)
        for channel in range(0, dk, BK):
            centred, middle, rest = decays(
                b_ptr, m_ptr, slot, batch * tokens, t, end, states // G_SHARE, s // G_SHARE, dk, channel, GATE, C, BK
            )
            qb = rows_of(q_ptr + h * q_h, rows, live, q_t, 1, dk, channel, BK) * scale * tl.exp2(centred)
            kb = rows_of(k_ptr, rows, live, k_t, 1, dk, channel, BK) * tl.exp2(-centred)
            largest += size(tl.abs(qb) + tl.abs(kb)) + size(middle)
            qb, kb = operand(qb, PRECISION), operand(kb, PRECISION)
            scores = tl.dot(kb, tl.trans(qb), scores, input_precision=PRECISION)
            if h == 0:
                tile, inside = tile_of(own, dk, dv, channel, first, BK, BV)
                dstate = tl.load(ds_ptr + tile, inside, other=0.0) * tl.exp2(rest)[:, None]
                dv_out = tl.dot(kb, operand(dstate, PRECISION), dv_out, input_precision=PRECISION)
        at = row_at * GROUP + h
        inverse, _dden = denominator(den_ptr, dden_ptr, at, live, eps, NORMALIZE)
        scores = tl.where(order[:, None] <= order[None, :], scores * inverse[None, :], 0.0)
        grad = rows_of(grad_ptr, at, live, dv, 1, dv, first, BV)
        largest += size(grad)
        dv_out = tl.dot(operand(scores, PRECISION), grad, dv_out, input_precision=PRECISION)
    if ~(largest <= MODERATE):
        dv_out = tl.zeros([C, BV], tl.float32)
        for channel in range(0, dk, BK):
            tile, inside = tile_of(own, dk, dv, channel, first, BK, BV)
            dstate = tl.load(ds_ptr + tile, inside, other=0.0)
            dz = tl.zeros([BK], tl.float32)
            for j in range(tl.minimum(C, end - t)):
                row = tl.minimum(t + C, end) - 1 - j
                dstate, dz = retreat(
                    dstate, dz, row, ((batch * tokens + row) * states + s) * GROUP, q_ptr, grad_ptr, den_ptr, dden_ptr,
                    q_t, q_h, dk, dv, channel, first, scale, eps, GROUP, NORMALIZE, BK, BV,
                )  # fmt: skip
                part = tl.sum(row_of(k_ptr, row, k_t, 1, dk, channel, BK)[:, None] * dstate, 0)
                dv_out += tl.where((rows == row)[:, None], part[None, :], 0.0)
                dstate = dstate * decay_of(g_ptr, row, g_t, g_c, dk, channel, GATE, BK)[:, None]
    at = row_at[:, None] * dv + cols[None, :]
    tl.store(dv_ptr + at, cast(dv_out, dv_ptr.dtype.element_ty), live[:, None] & (cols < dv)[None, :])


@triton.jit
def _share_kernel(x_ptr, y_ptr, width, numel, SHARE: tl.constexpr, BLOCK: tl.constexpr):
    """y [rows, width]: sums of SHARE neighbouring rows of x, in order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, c = i // width, i % width
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(SHARE):
        total += tl.load(x_ptr + (row * SHARE + j) * width + c, i < numel, other=0.0)
    tl.store(y_ptr + i, cast(total, y_ptr.dtype.element_ty), i < numel)


def sum_of_shared(x: torch.Tensor, share: int, dtype: torch.dtype) -> torch.Tensor:
    """Gradients of heads that `share` states read."""
    if share == 1:
        return x
    y = torch.empty((*x.shape[:2], x.shape[2] // share, *x.shape[3:]), dtype=dtype, device=x.device)
    if y.numel():
        width = x.shape[3] if x.dim() == 4 else 1
        _share_kernel[(triton.cdiv(y.numel(), 1024),)](x, y, width, y.numel(), SHARE=share, BLOCK=1024, num_warps=4)
    return y
