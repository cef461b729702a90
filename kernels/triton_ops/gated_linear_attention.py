"""Gated linear attention, forward, backward and one decoding step.

Forward: a walk through every sequence leaves the state before each chunk of 64 tokens, one program per block of key channels
and of value columns; then the results of all chunks at once. Backward: the same walk; dq of all chunks, with the gradients of the
denominators; a walk from the end, which leaves the gradients of the states after every chunk; dk, dv and the gate gradients of
all chunks. Shared heads get one more kernel that adds their parts in order. No atomics, no autotuning.
Chunks first take the way of moderate decays, and go token by token if they turn out steep (see `_common/linear.py`).

Source: GLA (arXiv 2312.06635), LAWCAT (arXiv 2509.18467) for the normaliser; this form of chunks is this project's.
"""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Any

import torch
import triton
import triton.language as tl

from ._common.aot import AotCase
from ._common.linear import (
    MODERATE,
    advance,
    decay_of,
    decays,
    denominator,
    exact_rows_of,
    gate_sums,
    operand,
    retreat,
    row_of,
    rows_of,
    size,
    slot_of,
    span_of,
    tile_of,
    token_tile,
    vector_of,
)  # fmt: skip
from ._common.linear_gradients import dqk_of_chunk, dv_of_chunk, sum_of_shared
from ._common.numerics import INTERPRET, cast


@triton.jit(do_not_specialize=["tokens", "chunks", "slots"])
def _walk_kernel(
    k_ptr, v_ptr, g_ptr, s0_ptr, z0_ptr, cu_ptr, offset_ptr, s_ptr, z_ptr, b_ptr, m_ptr, last_s_ptr, last_z_ptr,
    k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, g_c, tokens, chunks, slots, states, dk, dv,
    K_SHARE: tl.constexpr, V_SHARE: tl.constexpr, G_SHARE: tl.constexpr, GATE: tl.constexpr, NORMALIZE: tl.constexpr,
    VARLEN: tl.constexpr, S0: tl.constexpr, Z0: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """From the start of a sequence: the state before every chunk, the chunk's gates summed, and the last state."""
    n, s = tl.program_id(1) // states, tl.program_id(1) % states
    batch, start, end = span_of(n, cu_ptr, tokens, VARLEN)
    base = tl.load(offset_ptr + n) if VARLEN else n.to(tl.int64) * chunks
    first, channel = tl.program_id(0) * BV, tl.program_id(2) * BK
    chan = channel + tl.arange(0, BK)
    lead = (chan < dk) & (chan * 0 + first == 0)
    own = tl.program_id(1).to(tl.int64)
    tile, inside = tile_of(own, dk, dv, channel, first, BK, BV)
    state = tl.load(s0_ptr + tile, inside, other=0.0) if S0 else tl.zeros([BK, BV], tl.float32)
    z = vector_of(z0_ptr, own, dk, channel, Z0, BK)
    k_ptr += batch * k_b + s // K_SHARE * k_h
    v_ptr += batch * v_b + s // V_SHARE * v_h
    if GATE > 0:
        g_ptr += batch * g_b + s // G_SHARE * g_h
    for t in range(start, end, C):
        rows = t + tl.arange(0, C)
        live = rows < end
        slot = base + (t - start) // C
        at = slot * states + s
        tile, inside = tile_of(at, dk, dv, channel, first, BK, BV)
        fits = chan * 0 + slot < slots
        tl.store(s_ptr + tile, state, inside & fits[:, None])
        if NORMALIZE:
            tl.store(z_ptr + at * dk + chan, z, lead & fits)
        if GATE > 0:
            W: tl.constexpr = BK if GATE == 2 else 1
            width = dk if GATE == 2 else 1
            corner = channel if GATE == 2 else 0
            g = rows_of(g_ptr, rows, live, g_t, g_c, width, corner, W)
            centred, middle = gate_sums(g, C)
            if (first == 0) & (channel == corner) & (s % G_SHARE == 0) & (slot < slots):
                gates = corner + tl.arange(0, W)
                row_at = (batch * tokens + rows) * (states // G_SHARE) + s // G_SHARE
                mask = live[:, None] & (gates < width)[None, :]
                tl.store(b_ptr + row_at[:, None] * width + gates[None, :], centred, mask)
                at = slot * (states // G_SHARE) + s // G_SHARE
                tl.store(m_ptr + at * width + gates, middle, gates < width)
            rest = tl.sum(tl.where((rows == tl.minimum(t + C, end) - 1)[:, None], centred, 0.0), 0)
        else:
            centred = tl.zeros([C, 1], tl.float32)
            middle = tl.zeros([1], tl.float32)
            rest = tl.zeros([1], tl.float32)
        kb = rows_of(k_ptr, rows, live, k_t, 1, dk, channel, BK) * tl.exp2(-centred)
        if size(kb) + size(middle) <= MODERATE:
            kb = operand(kb, PRECISION)
            v = rows_of(v_ptr, rows, live, v_t, 1, dv, first, BV)
            state = tl.dot(tl.trans(kb), v, state * tl.exp2(middle)[:, None], input_precision=PRECISION)
            state = state * tl.exp2(rest)[:, None]
            z = (z * tl.exp2(middle) + tl.sum(kb, 0)) * tl.exp2(rest)
        else:
            for row in range(t, tl.minimum(t + C, end)):
                state, z = advance(
                    state, z, row, k_ptr, v_ptr, g_ptr, k_t, v_t, g_t, g_c, dk, dv, channel, first, GATE, BK, BV
                )
    if LAST:
        tile, inside = tile_of(own, dk, dv, channel, first, BK, BV)
        tl.store(last_s_ptr + tile, state, inside)
        if NORMALIZE:
            tl.store(last_z_ptr + own * dk + chan, z, lead)


@triton.jit(do_not_specialize=["sequences", "chunks", "tokens"])
def _output_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, cu_ptr, sequence_ptr, offset_ptr, b_ptr, m_ptr, s_ptr, z_ptr, o_ptr, den_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, g_c, sequences, chunks, tokens, states, dk, dv, scale, eps,
    GROUP: tl.constexpr, K_SHARE: tl.constexpr, V_SHARE: tl.constexpr, G_SHARE: tl.constexpr, GATE: tl.constexpr,
    NORMALIZE: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """Results of one chunk and query head, a block of columns."""
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s = head // GROUP
    batch, t, end = slot_of(slot, cu_ptr, sequence_ptr, offset_ptr, sequences, chunks, tokens, VARLEN, C)
    if t < end:
        first = tl.program_id(2) * BV
        cols, order = first + tl.arange(0, BV), tl.arange(0, C)
        rows = t + order
        live = rows < end
        own = slot * states + s
        q_ptr += batch * q_b + head * q_h
        k_ptr += batch * k_b + s // K_SHARE * k_h
        v_ptr += batch * v_b + s // V_SHARE * v_h
        v = rows_of(v_ptr, rows, live, v_t, 1, dv, first, BV)
        largest = size(v)
        out = tl.zeros([C, BV], tl.float32)
        scores = tl.zeros([C, C], tl.float32)
        total = tl.zeros([C], tl.float32)
        for channel in range(0, dk, BK):
            centred, middle, _rest = decays(
                b_ptr, m_ptr, slot, batch * tokens, t, end, states // G_SHARE, s // G_SHARE, dk, channel, GATE, C, BK
            )
            qb = rows_of(q_ptr, rows, live, q_t, 1, dk, channel, BK) * scale * tl.exp2(centred)
            kb = rows_of(k_ptr, rows, live, k_t, 1, dk, channel, BK) * tl.exp2(-centred)
            largest += size(tl.abs(qb) + tl.abs(kb)) + size(middle)
            qb, kb = operand(qb, PRECISION), operand(kb, PRECISION)
            scores = tl.dot(qb, tl.trans(kb), scores, input_precision=PRECISION)
            tile, inside = tile_of(own, dk, dv, channel, first, BK, BV)
            state = tl.load(s_ptr + tile, inside, other=0.0) * tl.exp2(middle)[:, None]
            out = tl.dot(qb, operand(state, PRECISION), out, input_precision=PRECISION)
            if NORMALIZE:
                z = vector_of(z_ptr, own, dk, channel, True, BK) * tl.exp2(middle)
                total += tl.sum(qb * z[None, :], 1)
        scores = operand(tl.where(order[:, None] >= order[None, :], scores, 0.0), PRECISION)
        out = tl.dot(scores, v, out, input_precision=PRECISION)
        total += tl.sum(scores, 1)
        if ~(largest <= MODERATE):
            out = tl.zeros([C, BV], tl.float32)
            total = tl.zeros([C], tl.float32)
            if GATE > 0:
                g_ptr += batch * g_b + s // G_SHARE * g_h
            for channel in range(0, dk, BK):
                tile, inside = tile_of(own, dk, dv, channel, first, BK, BV)
                state = tl.load(s_ptr + tile, inside, other=0.0)
                z = vector_of(z_ptr, own, dk, channel, NORMALIZE, BK)
                for row in range(t, tl.minimum(t + C, end)):
                    state, z = advance(
                        state, z, row, k_ptr, v_ptr, g_ptr, k_t, v_t, g_t, g_c, dk, dv, channel, first, GATE, BK, BV
                    )
                    q = row_of(q_ptr, row, q_t, 1, dk, channel, BK) * scale
                    out += tl.where((rows == row)[:, None], tl.sum(q[:, None] * state, 0)[None, :], 0.0)
                    total += tl.where(rows == row, tl.sum(q * z, 0), 0.0)
        row_at = (batch * tokens + rows) * (states * GROUP) + head
        if NORMALIZE:
            out = out / (total + eps)[:, None]
            tl.store(den_ptr + row_at, total, live & (order * 0 + first == 0))
        at = row_at[:, None] * dv + cols[None, :]
        tl.store(o_ptr + at, cast(out, o_ptr.dtype.element_ty), live[:, None] & (cols < dv)[None, :])


@triton.jit(do_not_specialize=["sequences", "chunks", "tokens"])
def _dden_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, cu_ptr, sequence_ptr, offset_ptr, b_ptr, m_ptr, s_ptr, grad_ptr, den_ptr, u_ptr, dden_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, g_c, sequences, chunks, tokens, states, dk, dv, scale, eps,
    GROUP: tl.constexpr, K_SHARE: tl.constexpr, V_SHARE: tl.constexpr, G_SHARE: tl.constexpr, GATE: tl.constexpr,
    NORMALIZE: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """u = S dO of every token, and the gradients of the denominators, of one chunk and query head."""
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s = head // GROUP
    batch, t, end = slot_of(slot, cu_ptr, sequence_ptr, offset_ptr, sequences, chunks, tokens, VARLEN, C)
    if t < end:
        order = tl.arange(0, C)
        rows = t + order
        live = rows < end
        row_at = (batch * tokens + rows) * (states * GROUP) + head
        own = slot * states + s
        q_ptr += batch * q_b + head * q_h
        k_ptr += batch * k_b + s // K_SHARE * k_h
        v_ptr += batch * v_b + s // V_SHARE * v_h
        if GATE > 0:
            g_ptr += batch * g_b + s // G_SHARE * g_h
        pairs = tl.zeros([C, C], tl.float32)
        for first in range(0, dv, BV):
            grad = exact_rows_of(grad_ptr, row_at, live, dv, 1, dv, first, BV)
            v = exact_rows_of(v_ptr, rows, live, v_t, 1, dv, first, BV)
            pairs = tl.dot(grad, tl.trans(v), pairs, input_precision=PRECISION)
        pairs = operand(tl.where(order[:, None] >= order[None, :], pairs, 0.0), PRECISION)
        product = tl.zeros([C], tl.float32)  # numerators times gradients of the results
        for channel in range(0, dk, BK):
            chan = channel + tl.arange(0, BK)
            centred, middle, _rest = decays(
                b_ptr, m_ptr, slot, batch * tokens, t, end, states // G_SHARE, s // G_SHARE, dk, channel, GATE, C, BK
            )
            kb = rows_of(k_ptr, rows, live, k_t, 1, dk, channel, BK) * tl.exp2(-centred)
            moderate = size(kb) + size(middle) <= MODERATE
            u = tl.dot(pairs, operand(kb, PRECISION), input_precision=PRECISION)
            for first in range(0, dv, BV):
                tile, inside = tile_of(own, dk, dv, channel, first, BK, BV)
                state = tl.load(s_ptr + tile, inside, other=0.0) * tl.exp2(middle)[:, None]
                grad = rows_of(grad_ptr, row_at, live, dv, 1, dv, first, BV)
                u = tl.dot(grad, tl.trans(operand(state, PRECISION)), u, input_precision=PRECISION)
            u = u * tl.exp2(centred)
            if ~moderate:
                u = tl.zeros([C, BK], tl.float32)
                for first in range(0, dv, BV):
                    tile, inside = tile_of(own, dk, dv, channel, first, BK, BV)
                    state = tl.load(s_ptr + tile, inside, other=0.0)
                    z = tl.zeros([BK], tl.float32)
                    for row in range(t, tl.minimum(t + C, end)):
                        state, z = advance(
                            state, z, row, k_ptr, v_ptr, g_ptr, k_t, v_t, g_t, g_c, dk, dv, channel, first, GATE, BK, BV
                        )
                        at = (batch * tokens + row) * (states * GROUP) + head
                        part = tl.sum(state * row_of(grad_ptr, at, dv, 1, dv, first, BV)[None, :], 1)
                        u += tl.where((rows == row)[:, None], part[None, :], 0.0)
            q = rows_of(q_ptr, rows, live, q_t, 1, dk, channel, BK) * scale
            product += tl.sum(q * u, 1)
            tl.store(u_ptr + row_at[:, None] * dk + chan[None, :], u, live[:, None] & (chan < dk)[None, :])
        if NORMALIZE:
            inverse = 1.0 / (tl.load(den_ptr + row_at, live, other=1.0) + eps)
            tl.store(dden_ptr + row_at, -product * inverse * inverse, live)


@triton.jit(do_not_specialize=["tokens", "chunks", "slots"])
def _reverse_walk_kernel(
    q_ptr, g_ptr, cu_ptr, offset_ptr, b_ptr, m_ptr, grad_ptr, grad_s_ptr, grad_z_ptr, den_ptr, dden_ptr, ds_ptr, dz_ptr,
    ds0_ptr, dz0_ptr,
    q_b, q_t, q_h, g_b, g_t, g_h, g_c, tokens, chunks, slots, states, dk, dv, scale, eps,
    GROUP: tl.constexpr, G_SHARE: tl.constexpr, GATE: tl.constexpr, NORMALIZE: tl.constexpr, VARLEN: tl.constexpr,
    S0: tl.constexpr, Z0: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """From the end of a sequence: the gradients of the state after every chunk and of the first one."""
    n, s = tl.program_id(1) // states, tl.program_id(1) % states
    batch, start, end = span_of(n, cu_ptr, tokens, VARLEN)
    base = tl.load(offset_ptr + n) if VARLEN else n.to(tl.int64) * chunks
    first, channel = tl.program_id(0) * BV, tl.program_id(2) * BK
    chan = channel + tl.arange(0, BK)
    lead = (chan < dk) & (chan * 0 + first == 0)
    own = tl.program_id(1).to(tl.int64)
    tile, inside = tile_of(own, dk, dv, channel, first, BK, BV)
    dstate = tl.load(grad_s_ptr + tile, inside, other=0.0)
    dz = vector_of(grad_z_ptr, own, dk, channel, NORMALIZE, BK)
    q_ptr += batch * q_b + s * GROUP * q_h
    if GATE > 0:
        g_ptr += batch * g_b + s // G_SHARE * g_h
    count = (end - start + C - 1) // C
    for i in range(count):
        slot = base + count - 1 - i
        t = start + (count - 1 - i) * C
        rows = t + tl.arange(0, C)
        live = rows < end
        row_at = (batch * tokens + rows) * (states * GROUP) + s * GROUP
        at = slot * states + s
        tile, inside = tile_of(at, dk, dv, channel, first, BK, BV)
        fits = chan * 0 + slot < slots
        tl.store(ds_ptr + tile, dstate, inside & fits[:, None])
        if NORMALIZE:
            tl.store(dz_ptr + at * dk + chan, dz, lead & fits)
        centred, middle, rest = decays(
            b_ptr, m_ptr, slot, batch * tokens, t, end, states // G_SHARE, s // G_SHARE, dk, channel, GATE, C, BK
        )
        largest = size(middle)
        for h in range(GROUP):
            q = rows_of(q_ptr + h * q_h, rows, live, q_t, 1, dk, channel, BK) * scale
            largest += size(q * tl.exp2(centred))
        if largest <= MODERATE:
            dstate = dstate * tl.exp2(rest)[:, None]
            dz = dz * tl.exp2(rest)
            for h in range(GROUP):
                inverse, dden = denominator(den_ptr, dden_ptr, row_at + h, live, eps, NORMALIZE)
                qb = rows_of(q_ptr + h * q_h, rows, live, q_t, 1, dk, channel, BK) * scale * tl.exp2(centred)
                dz += tl.sum(qb * dden[:, None], 0)
                qb = operand(qb * inverse[:, None], PRECISION)
                grad = rows_of(grad_ptr, row_at + h, live, dv, 1, dv, first, BV)
                dstate = tl.dot(tl.trans(qb), grad, dstate, input_precision=PRECISION)
            dstate = dstate * tl.exp2(middle)[:, None]
            dz = dz * tl.exp2(middle)
        else:
            for j in range(tl.minimum(C, end - t)):
                row = tl.minimum(t + C, end) - 1 - j
                dstate, dz = retreat(
                    dstate, dz, row, (batch * tokens + row) * (states * GROUP) + s * GROUP, q_ptr, grad_ptr, den_ptr,
                    dden_ptr, q_t, q_h, dk, dv, channel, first, scale, eps, GROUP, NORMALIZE, BK, BV,
                )  # fmt: skip
                decay = decay_of(g_ptr, row, g_t, g_c, dk, channel, GATE, BK)
                dstate = dstate * decay[:, None]
                dz = dz * decay
    tile, inside = tile_of(own, dk, dv, channel, first, BK, BV)
    if S0:
        tl.store(ds0_ptr + tile, dstate, inside)
    if Z0:
        tl.store(dz0_ptr + own * dk + chan, dz, lead)


@triton.jit(do_not_specialize=["sequences", "chunks", "tokens"])
def _dqkv_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, cu_ptr, sequence_ptr, offset_ptr, b_ptr, m_ptr, s_ptr, z_ptr, grad_ptr, den_ptr, dden_ptr,
    u_ptr, ds_ptr, dz_ptr, dq_ptr, dk_ptr, dv_ptr, dg_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, g_c, sequences, chunks, tokens, states, dk, dv, scale, eps,
    GROUP: tl.constexpr, K_SHARE: tl.constexpr, V_SHARE: tl.constexpr, G_SHARE: tl.constexpr, GATE: tl.constexpr,
    NORMALIZE: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """Of one chunk and state head: dq, dk and dg of a block of key channels, or dv of a block of value columns."""
    slot, s, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    batch, t, end = slot_of(slot, cu_ptr, sequence_ptr, offset_ptr, sequences, chunks, tokens, VARLEN, C)
    if t < end:
        q_ptr += batch * q_b + s * GROUP * q_h
        k_ptr += batch * k_b + s // K_SHARE * k_h
        v_ptr += batch * v_b + s // V_SHARE * v_h
        if GATE > 0:
            g_ptr += batch * g_b + s // G_SHARE * g_h
        W: tl.constexpr = min(BK, 32)  # narrower than in the walks, for more tiles are alive
        blocks = tl.cdiv(dk, W)
        if block < blocks:
            dqk_of_chunk(
                slot, s, batch, t, end, block * W, blocks, q_ptr, k_ptr, v_ptr, g_ptr, b_ptr, m_ptr, s_ptr, z_ptr, grad_ptr,
                den_ptr, dden_ptr, u_ptr, ds_ptr, dz_ptr, dq_ptr, dk_ptr, dg_ptr, q_t, q_h, k_t, v_t, g_t, g_c, tokens, states,
                dk, dv, scale, eps, GROUP, G_SHARE, GATE, NORMALIZE, PRECISION, C, W, BV,
            )  # fmt: skip
        else:
            dv_of_chunk(
                slot, s, batch, t, end, (block - blocks) * BV, q_ptr, k_ptr, g_ptr, b_ptr, m_ptr, grad_ptr, den_ptr, dden_ptr,
                ds_ptr, dv_ptr, q_t, q_h, k_t, g_t, g_c, tokens, states, dk, dv, scale, eps,
                GROUP, G_SHARE, GATE, NORMALIZE, PRECISION, C, BK, BV,
            )  # fmt: skip


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

# Products of 16-bit inputs in tf32, whose operands keep the 11 bits of fp16 and the range of fp32.
_PRECISIONS = {torch.bfloat16: "tf32", torch.float16: "tf32", torch.float32: "ieee"}


def _tiles(dtype: torch.dtype) -> tuple[int, int]:
    """Tokens per chunk, and most key channels and value columns of a tile.

    A product on the tensor cores of sm_90 and sm_100 has 64 rows or more; what else computes, needs more registers for it.
    """
    if dtype is torch.float32:
        return 32, 32
    generation = 9 if INTERPRET.value else int(triton.runtime.driver.active.get_current_target().arch) // 10
    return 64 if generation in (9, 10) else 32, 64


class _Plan:
    """Sizes, strides and constants that the kernels of one call have in common, and what the walks leave for the others."""

    def __init__(self, q: Any, k: Any, v: Any, g: Any, s0: Any, z0: Any, cu_seqlens: Any, normalize: bool) -> None:
        self.batch, self.tokens, self.heads, self.dk = q.shape
        self.dv = v.shape[3]
        gates = 0 if g is None else g.shape[2]
        self.states = max(k.shape[2], v.shape[2], gates)
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.share = {"K": self.states // k.shape[2], "V": self.states // v.shape[2], "G": self.states // max(gates, 1)}
        chunk, block = _tiles(q.dtype)
        block_k, block_v = (min(block, max(16, triton.next_power_of_2(width))) for width in (self.dk, self.dv))
        self.blocks_k, self.blocks_v = triton.cdiv(self.dk, block_k), triton.cdiv(self.dv, block_v)
        self.narrow_k = triton.cdiv(self.dk, min(block_k, 32))  # as _dqkv_kernel has them
        self.constants: dict[str, Any] = {
            "G_SHARE": self.share["G"], "GATE": 0 if g is None else g.dim() - 2, "NORMALIZE": normalize,
            "VARLEN": cu_seqlens is not None, "PRECISION": _PRECISIONS[q.dtype], "C": chunk, "BK": block_k, "BV": block_v,
            "num_warps": 8, "num_stages": 1,
        }  # fmt: skip
        self.starts = {"S0": s0 is not None, "Z0": z0 is not None}
        self.shares = {"K_SHARE": self.share["K"], "V_SHARE": self.share["V"]}
        self.group = {"GROUP": self.heads // self.states}
        gate = (0, 0, 0, 0) if g is None else (*g.stride()[:3], g.stride(3) if g.dim() == 4 else 0)
        self.strides = (q.stride()[:3], k.stride()[:3], v.stride()[:3], gate)
        self.chunks = triton.cdiv(self.tokens, chunk)
        self.slots = self.sequences * self.chunks
        sequence = self.offset = None
        if cu_seqlens is not None:  # slots for any division of the tokens; no value is read on the host
            self.slots = self.tokens // chunk + self.sequences
            bounds = cu_seqlens.clamp(0, self.tokens)
            counts = ((bounds[1:] - bounds[:-1]).clamp_min(0) + chunk - 1) // chunk
            ends = counts.cumsum(0)
            self.offset = ends - counts
            sequence = torch.searchsorted(ends, torch.arange(self.slots, device=q.device), right=True)
        self.inputs = (q, k, v, g)
        self.first = (s0, z0, cu_seqlens, self.offset)
        self.where = (cu_seqlens, sequence, self.offset)
        self.sizes = (self.chunks, self.tokens, self.states, self.dk, self.dv)
        self.gates = (gates, 1 if g is None or g.dim() == 3 else self.dk)
        self.wide: dict[str, Any] = {"dtype": torch.float32, "device": q.device}

    def state_like(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for S and z."""
        z = count if self.constants["NORMALIZE"] else 0
        return (
            torch.empty((count, self.states, self.dk, self.dv), **self.wide),
            torch.empty((z, self.states, self.dk), **self.wide),
        )

    def walk(self, kernel: Any) -> Any:
        """A launch over blocks of value columns, states of sequences, and blocks of key channels."""
        grid = (self.blocks_v, self.sequences * self.states, self.blocks_k)
        return partial(kernel[grid], **self.constants, **self.starts) if self.sequences else _nothing

    def by_chunk(self, kernel: Any, *grid: int) -> Any:
        """A launch over chunks and more."""
        options = {**self.constants, **self.shares, **self.group}
        return partial(kernel[(self.slots, *grid)], **options) if self.slots else _nothing

    def walk_forwards(self, *last: Any) -> tuple[torch.Tensor, ...]:
        """The gates summed in every chunk, to its middle, S and z before it; S and z in the end go into `last`."""
        b = torch.empty((self.batch, self.tokens, *self.gates), **self.wide)
        m = torch.empty((self.slots, *self.gates), **self.wide)
        s, z = self.state_like(self.slots)
        self.walk(_walk_kernel)(
            *self.inputs[1:], *self.first, s, z, b, m, *(last or (None, None)), *chain(*self.strides[1:]), self.tokens,
            self.chunks, self.slots, self.states, self.dk, self.dv, LAST=bool(last), **self.shares,
        )  # fmt: skip
        return b, m, s, z


def _nothing(*args: Any, **options: Any) -> None:
    """The launch of an empty grid."""


def gated_linear_attention_fwd(
    q: Any, k: Any, v: Any, g: Any, s0: Any, z0: Any, cu_seqlens: Any, scale: float, eps: float, normalize: bool
) -> tuple[torch.Tensor, ...]:
    """`subquad_triton::gated_linear_attention_fwd`."""
    plan = _Plan(q, k, v, g, s0, z0, cu_seqlens, normalize)
    o = q.new_empty((*q.shape[:3], plan.dv))
    den = torch.empty((plan.batch if normalize else 0, plan.tokens, plan.heads), **plan.wide)
    last = plan.state_like(plan.sequences)
    before = plan.walk_forwards(*last)
    plan.by_chunk(_output_kernel, plan.heads, plan.blocks_v)(
        q, k, v, g, *plan.where, *before, o, den, *chain(*plan.strides), plan.sequences, *plan.sizes, scale, eps
    )
    return o, den, *last


def gated_linear_attention_bwd(
    grad_o: Any, grad_s: Any, grad_z: Any, den: Any, q: Any, k: Any, v: Any, g: Any, s0: Any, z0: Any,
    cu_seqlens: Any, scale: float, eps: float, normalize: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """`subquad_triton::gated_linear_attention_bwd`."""
    plan = _Plan(q, k, v, g, s0, z0, cu_seqlens, normalize)
    b, m, s, z = plan.walk_forwards()
    u, dden = torch.empty(q.shape, **plan.wide), torch.empty_like(den)
    plan.by_chunk(_dden_kernel, plan.heads)(
        q, k, v, g, *plan.where, b, m, s, grad_o, den, u, dden, *chain(*plan.strides), plan.sequences, *plan.sizes, scale, eps
    )  # fmt: skip
    ds, dz = plan.state_like(plan.slots)
    ds0 = torch.empty((0, plan.states, plan.dk, plan.dv) if s0 is None else s0.shape, **plan.wide)
    dz0 = torch.empty((0, plan.states, plan.dk) if z0 is None else z0.shape, **plan.wide)
    plan.walk(_reverse_walk_kernel)(
        q, g, cu_seqlens, plan.offset, b, m, grad_o, grad_s, grad_z, den, dden, ds, dz, ds0, dz0, *plan.strides[0],
        *plan.strides[3], plan.tokens, plan.chunks, plan.slots, plan.states, plan.dk, plan.dv, scale, eps, **plan.group,
    )  # fmt: skip

    def of_states(x: torch.Tensor, share: int, width: int) -> torch.Tensor:
        """A gradient by state heads: the result itself where no head is shared."""
        dtype = x.dtype if share == 1 else torch.float32
        return torch.empty((plan.batch, plan.tokens, plan.states, width), dtype=dtype, device=q.device)

    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = of_states(k, plan.share["K"], plan.dk), of_states(v, plan.share["V"], plan.dv)
    dg, parts = torch.empty((0,), **plan.wide), plan.share["G"]
    if g is not None:
        # One gate per head: every block of key channels has a part of its gradient.
        width = plan.dk if g.dim() == 4 else plan.narrow_k
        parts *= 1 if g.dim() == 4 else plan.narrow_k
        dg = of_states(g, parts, width)
    plan.by_chunk(_dqkv_kernel, plan.states, plan.narrow_k + plan.blocks_v)(
        q, k, v, g, *plan.where, b, m, s, z, grad_o, den, dden, u, ds, dz, dq, dk, dv, dg, *chain(*plan.strides),
        plan.sequences, *plan.sizes, scale, eps,
    )  # fmt: skip
    dk, dv = sum_of_shared(dk, plan.share["K"], q.dtype), sum_of_shared(dv, plan.share["V"], q.dtype)
    if g is not None:
        dg = sum_of_shared(dg if g.dim() == 4 else dg.flatten(2), parts, g.dtype)
    return dq, dk, dv, dg, ds0, dz0


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


_SPILLS = {"_dden_kernel": "in float32, whose products take registers instead of matrix units: a few words"}
AOT = [
    AotCase(
        f"{name} D{d} {gate}",
        launcher,
        partial(_aot_args, dtype, d, gate, backward),
        _SPILLS if dtype is torch.float32 else {},
    )
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
        "bf16 D64 shared", gated_linear_attention_bwd, partial(_aot_args, torch.bfloat16, 64, "channel", True, True)
    ),
    AotCase("bf16 D128 step", gated_linear_attention_step_, _step_args),
]

__all__ = ["AOT", "gated_linear_attention_bwd", "gated_linear_attention_fwd", "gated_linear_attention_step_"]
