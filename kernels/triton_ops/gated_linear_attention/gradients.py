"""Gradients of one chunk, given the states before it and the gradients of those after it."""

from __future__ import annotations

import triton
import triton.language as tl

from .._common.numerics import cast
from .arguments import Rows, rows_of_query
from .chunk import (
    MAX_ABS_SUM,
    MIN_GATE,
    abs_sum,
    exact_sums,
    load_decay,
    load_decays,
    load_denominator,
    load_exact,
    load_row,
    load_rows,
    load_z,
    recurrent_step,
    recurrent_step_bwd,
    round_operand,
    state_tile,
)


@triton.jit
def dqk_of_chunk(
    chunk, shape, channel, blocks, q, q_stride_h, k, v, g, walked, grads, u_ptr, dstates, dq_ptr, dk_ptr, dg_ptr,
    FLAGS: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dq, dk and the gate gradients in the channels channel .. channel + BK."""
    t, end = chunk.start, chunk.end
    chan, order = channel + tl.arange(0, BK), tl.arange(0, C)
    rows = t + order
    live = rows < end
    mask = live[:, None] & (chan < shape.dk)[None, :]
    row_at = (chunk.batch * shape.tokens + rows) * shape.states + chunk.head
    dk_at = row_at[:, None] * shape.dk + chan[None, :]
    own = chunk.number * shape.states + chunk.head
    later = order[:, None] <= order[None, :]
    o_rows = Rows(grads.o, shape.dv, 1, shape.dv)
    z = load_z(walked.z, own, shape, channel, FLAGS.NORMALIZE, BK)  # [BK]
    dz = load_z(dstates.z, own, shape, channel, FLAGS.NORMALIZE, BK)  # [BK]
    g_cum, g_mid, _g_last = load_decays(walked, chunk, shape, channel, FLAGS, C, BK)
    magnitude = abs_sum(load_rows(k, rows, live, channel, BK) * tl.exp2(-g_cum)) + abs_sum(g_mid)
    for h in range(FLAGS.GROUP):
        b_q = load_rows(rows_of_query(q, q_stride_h, h), rows, live, channel, BK) * shape.scale
        magnitude += abs_sum(b_q * tl.exp2(g_cum))
    chunkwise = magnitude <= MAX_ABS_SUM
    # The gradient of a gate sums q dq - k dk over this and later tokens of the chunk, and dg_state of what is behind it:
    # the decay of the state before the chunk, and of what its tokens left.
    dg_state = tl.zeros([BK], tl.float32)
    if chunkwise:
        # Loaded again, and again below: what is alive must fit the registers.
        g_cum, g_mid, g_last = load_decays(walked, chunk, shape, channel, FLAGS, C, BK)
        dk = tl.zeros([C, BK], tl.float32) + (dz * tl.exp2(g_last))[None, :]
        for column in range(0, shape.dv, BV):
            tile, inside = state_tile(own, shape, channel, column, BK, BV)
            dstate = tl.load(dstates.s + tile, inside, other=0.0) * tl.exp2(g_last)[:, None]  # [BK, BV]
            if FLAGS.GATE > 0:
                dg_state += tl.sum(tl.load(walked.s + tile, inside, other=0.0) * dstate, 1)
            b_v = load_rows(v, rows, live, column, BV)  # [C, BV]
            dk = tl.dot(b_v, tl.trans(round_operand(dstate, FLAGS)), dk, input_precision=FLAGS.PRECISION)
        b_k = load_rows(k, rows, live, channel, BK) * tl.exp2(-g_cum)  # [C, BK]
        b_k = round_operand(b_k, FLAGS)
        dg_state = (dg_state + z * dz * tl.exp2(g_last)) * tl.exp2(g_mid) + tl.sum(b_k * dk, 0)
        for h in range(FLAGS.GROUP):
            at = row_at * FLAGS.GROUP + h
            inverse, dden = load_denominator(grads, at, live, shape.eps, FLAGS.NORMALIZE)  # [C]
            dscores = tl.zeros([C, C], tl.float32)
            for column in range(0, shape.dv, BV):
                b_v = load_exact(v, rows, live, column, BV)
                grad = load_exact(o_rows, at, live, column, BV)  # [C, BV]
                dscores = tl.dot(b_v, tl.trans(grad), dscores, input_precision=FLAGS.PRECISION)
            dscores = tl.where(later, dscores * inverse[None, :] + dden[None, :], 0.0)  # keys down, queries across
            b_q = load_rows(rows_of_query(q, q_stride_h, h), rows, live, channel, BK) * shape.scale
            b_q = round_operand(b_q * tl.exp2(g_cum), FLAGS)
            dk = tl.dot(round_operand(dscores, FLAGS), b_q, dk, input_precision=FLAGS.PRECISION)
        tl.store(dk_ptr + dk_at, cast(dk * tl.exp2(-g_cum), dk_ptr.dtype.element_ty), mask)
        dg_tokens = -b_k * dk  # [C, BK]
        z_rows = tl.zeros([C, BK], tl.float32)  # z after every token
        if FLAGS.NORMALIZE:
            earlier = (order[:, None] >= order[None, :]).to(tl.float32)
            z_rows = tl.dot(earlier, b_k, input_precision=FLAGS.PRECISION) + (z * tl.exp2(g_mid))[None, :]
        for h in range(FLAGS.GROUP):
            inverse, dden = load_denominator(grads, row_at * FLAGS.GROUP + h, live, shape.eps, FLAGS.NORMALIZE)
            at = (row_at * FLAGS.GROUP + h)[:, None] * shape.dk + chan[None, :]
            dq = tl.load(u_ptr + at, mask, other=0.0) * tl.exp2(-g_cum) * inverse[:, None] + z_rows * dden[:, None]
            b_q = load_rows(rows_of_query(q, q_stride_h, h), rows, live, channel, BK) * shape.scale
            dg_tokens += round_operand(b_q * tl.exp2(g_cum), FLAGS) * dq
            tl.store(dq_ptr + at, cast(dq * tl.exp2(g_cum) * shape.scale, dq_ptr.dtype.element_ty), mask)
    else:
        dk = tl.zeros([C, BK], tl.float32)
        for column in range(0, shape.dv, BV):
            tile, inside = state_tile(own, shape, channel, column, BK, BV)
            dstate = tl.load(dstates.s + tile, inside, other=0.0)
            if FLAGS.GATE > 0:
                state = tl.load(walked.s + tile, inside, other=0.0)
                now = z
                for row in range(t, tl.minimum(t + C, end)):
                    state, now = recurrent_step(state, now, row, k, v, g, channel, column, FLAGS.GATE, BK, BV)
                dg_state += tl.sum(state * dstate, 1) + tl.where(column == 0, now * dz, 0.0)
            now = dz
            for j in range(tl.minimum(C, end - t)):
                row = tl.minimum(t + C, end) - 1 - j
                at = ((chunk.batch * shape.tokens + row) * shape.states + chunk.head) * FLAGS.GROUP
                dstate, now = recurrent_step_bwd(
                    dstate, now, row, at, q, q_stride_h, grads, shape, channel, column, FLAGS, BK, BV
                )
                part = tl.sum(dstate * load_row(v, row, column, BV)[None, :], 1)
                part += tl.where(column == 0, now, 0.0)
                dk += tl.where((rows == row)[:, None], part[None, :], 0.0)
                decay = load_decay(g, row, channel, FLAGS.GATE, BK)
                dstate = dstate * decay[:, None]
                now = now * decay
        tl.store(dk_ptr + dk_at, cast(dk, dk_ptr.dtype.element_ty), mask)
        dg_tokens = -load_rows(k, rows, live, channel, BK) * dk
        z_rows = tl.zeros([C, BK], tl.float32)
        if FLAGS.NORMALIZE:
            for row in range(t, tl.minimum(t + C, end)):
                key = load_row(k, row, channel, BK)
                z = z * load_decay(g, row, channel, FLAGS.GATE, BK) + key
                z_rows += tl.where((rows == row)[:, None], z[None, :], 0.0)
        for h in range(FLAGS.GROUP):
            inverse, dden = load_denominator(grads, row_at * FLAGS.GROUP + h, live, shape.eps, FLAGS.NORMALIZE)
            at = (row_at * FLAGS.GROUP + h)[:, None] * shape.dk + chan[None, :]
            dq = tl.load(u_ptr + at, mask, other=0.0) * inverse[:, None] + z_rows * dden[:, None]
            b_q = load_rows(rows_of_query(q, q_stride_h, h), rows, live, channel, BK) * shape.scale
            dg_tokens += b_q * dq
            tl.store(dq_ptr + at, cast(dq * shape.scale, dq_ptr.dtype.element_ty), mask)
    if FLAGS.GATE == 2:
        if abs_sum(dg_tokens) <= MAX_ABS_SUM:
            dg = exact_sums(later.to(tl.float32), dg_tokens)  # [C, BK]
        else:
            dg = tl.zeros([C, BK], tl.float32)
            for j in range(C):
                part = tl.sum(tl.where((order == j)[:, None], dg_tokens, 0.0), 0)
                dg += tl.where((order <= j)[:, None], part[None, :], 0.0)
        b_g = load_rows(g, rows, live, channel, BK)
        dg = tl.where(b_g < MIN_GATE, 0.0, dg + dg_state[None, :])
        tl.store(dg_ptr + dk_at, cast(dg, dg_ptr.dtype.element_ty), mask)
    if FLAGS.GATE == 1:
        dg = tl.sum(tl.where(later, tl.sum(dg_tokens, 1)[None, :], 0.0), 1) + tl.sum(dg_state)  # [C]
        b_g = tl.load(g.ptr + rows.to(tl.int64) * g.stride, live, other=0.0).to(tl.float32)
        dg = tl.where(b_g < MIN_GATE, 0.0, dg)
        tl.store(dg_ptr + row_at * blocks + channel // BK, cast(dg, dg_ptr.dtype.element_ty), live)


@triton.jit
def dv_of_chunk(
    chunk, shape, column, q, q_stride_h, k, g, walked, grads, dstates, dv_ptr,
    FLAGS: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dv in the columns column .. column + BV."""
    t, end = chunk.start, chunk.end
    cols, order = column + tl.arange(0, BV), tl.arange(0, C)
    rows = t + order
    live = rows < end
    row_at = (chunk.batch * shape.tokens + rows) * shape.states + chunk.head
    own = chunk.number * shape.states + chunk.head
    magnitude = 0.0
    dv = tl.zeros([C, BV], tl.float32)
    for h in range(FLAGS.GROUP):
        scores = tl.zeros([C, C], tl.float32)  # keys down, queries across
        for channel in range(0, shape.dk, BK):
            g_cum, g_mid, g_last = load_decays(walked, chunk, shape, channel, FLAGS, C, BK)
            b_q = load_rows(rows_of_query(q, q_stride_h, h), rows, live, channel, BK) * shape.scale * tl.exp2(g_cum)
            b_k = load_rows(k, rows, live, channel, BK) * tl.exp2(-g_cum)  # [C, BK]
            magnitude += abs_sum(tl.abs(b_q) + tl.abs(b_k)) + abs_sum(g_mid)
            b_q, b_k = round_operand(b_q, FLAGS), round_operand(b_k, FLAGS)
            scores = tl.dot(b_k, tl.trans(b_q), scores, input_precision=FLAGS.PRECISION)
            if h == 0:
                tile, inside = state_tile(own, shape, channel, column, BK, BV)
                dstate = tl.load(dstates.s + tile, inside, other=0.0) * tl.exp2(g_last)[:, None]  # [BK, BV]
                dv = tl.dot(b_k, round_operand(dstate, FLAGS), dv, input_precision=FLAGS.PRECISION)
        at = row_at * FLAGS.GROUP + h
        inverse, _dden = load_denominator(grads, at, live, shape.eps, FLAGS.NORMALIZE)
        scores = tl.where(order[:, None] <= order[None, :], scores * inverse[None, :], 0.0)
        grad = load_rows(Rows(grads.o, shape.dv, 1, shape.dv), at, live, column, BV)  # [C, BV]
        magnitude += abs_sum(grad)
        dv = tl.dot(round_operand(scores, FLAGS), grad, dv, input_precision=FLAGS.PRECISION)
    if ~(magnitude <= MAX_ABS_SUM):
        dv = tl.zeros([C, BV], tl.float32)
        for channel in range(0, shape.dk, BK):
            tile, inside = state_tile(own, shape, channel, column, BK, BV)
            dstate = tl.load(dstates.s + tile, inside, other=0.0)
            dz = tl.zeros([BK], tl.float32)
            for j in range(tl.minimum(C, end - t)):
                row = tl.minimum(t + C, end) - 1 - j
                at = ((chunk.batch * shape.tokens + row) * shape.states + chunk.head) * FLAGS.GROUP
                dstate, dz = recurrent_step_bwd(
                    dstate, dz, row, at, q, q_stride_h, grads, shape, channel, column, FLAGS, BK, BV
                )
                part = tl.sum(load_row(k, row, channel, BK)[:, None] * dstate, 0)
                dv += tl.where((rows == row)[:, None], part[None, :], 0.0)
                dstate = dstate * load_decay(g, row, channel, FLAGS.GATE, BK)[:, None]
    at = row_at[:, None] * shape.dv + cols[None, :]
    tl.store(dv_ptr + at, cast(dv, dv_ptr.dtype.element_ty), live[:, None] & (cols < shape.dv)[None, :])
