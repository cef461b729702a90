"""Backward kernels: gradients of the denominators, the walk from the end, all other gradients of every chunk, shared heads."""

from __future__ import annotations

import triton
import triton.language as tl

from .._common.numerics import cast
from .arguments import Chunk, Rows, Shape, place_of_chunk, place_of_walk, rows_of_head, rows_of_query
from .chunk import (
    MAX_ABS_SUM,
    abs_sum,
    chunk_bounds,
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
    sequence_bounds,
    state_tile,
)
from .gradients import dqk_of_chunk, dv_of_chunk


@triton.jit(do_not_specialize=["sequence_count", "chunks", "tokens"])
def chunk_bwd_den_kernel(
    q, k, v, g, sequences, walked, grads, u_ptr, sequence_count, chunks, tokens, states, dk, dv, scale, eps,
    FLAGS: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """u = S dO of every token, and the gradients of the denominators, of one chunk and query head."""
    number, head = place_of_chunk(sequences, sequence_count, chunks, tokens, C)
    s = head // FLAGS.GROUP
    shape = Shape(tokens, states, dk, dv, scale, eps)
    batch, t, end = chunk_bounds(number, sequences, sequence_count, chunks, tokens, C)
    if t < end:
        chunk = Chunk(number, batch, t, end, s)
        order = tl.arange(0, C)
        rows = t + order
        live = rows < end
        row_at = (batch * tokens + rows) * (states * FLAGS.GROUP) + head
        own = number * states + s
        q_rows = rows_of_head(q, batch, head, dk)
        k_rows = rows_of_head(k, batch, s // FLAGS.K_SHARE, dk)
        v_rows = rows_of_head(v, batch, s // FLAGS.V_SHARE, dv)
        g_rows = rows_of_head(g, batch, s // FLAGS.G_SHARE, dk)
        o_rows = Rows(grads.o, dv, 1, dv)
        dscores = tl.zeros([C, C], tl.float32)
        for column in range(0, dv, BV):
            grad = load_exact(o_rows, row_at, live, column, BV)  # [C, BV]
            b_v = load_exact(v_rows, rows, live, column, BV)  # [C, BV]
            dscores = tl.dot(grad, tl.trans(b_v), dscores, input_precision=FLAGS.PRECISION)
        dscores = round_operand(tl.where(order[:, None] >= order[None, :], dscores, 0.0), FLAGS)
        product = tl.zeros([C], tl.float32)  # numerators times gradients of the results
        for channel in range(0, dk, BK):
            chan = channel + tl.arange(0, BK)
            g_cum, g_mid, _g_last = load_decays(walked, chunk, shape, channel, FLAGS, C, BK)
            b_k = load_rows(k_rows, rows, live, channel, BK) * tl.exp2(-g_cum)  # [C, BK]
            chunkwise = abs_sum(b_k) + abs_sum(g_mid) <= MAX_ABS_SUM
            u = tl.dot(dscores, round_operand(b_k, FLAGS), input_precision=FLAGS.PRECISION)  # [C, BK]
            for column in range(0, dv, BV):
                tile, inside = state_tile(own, shape, channel, column, BK, BV)
                state = tl.load(walked.s + tile, inside, other=0.0) * tl.exp2(g_mid)[:, None]  # [BK, BV]
                grad = load_rows(o_rows, row_at, live, column, BV)
                u = tl.dot(grad, tl.trans(round_operand(state, FLAGS)), u, input_precision=FLAGS.PRECISION)
            u = u * tl.exp2(g_cum)
            if ~chunkwise:
                u = tl.zeros([C, BK], tl.float32)
                for column in range(0, dv, BV):
                    tile, inside = state_tile(own, shape, channel, column, BK, BV)
                    state = tl.load(walked.s + tile, inside, other=0.0)
                    z = tl.zeros([BK], tl.float32)
                    for row in range(t, tl.minimum(t + C, end)):
                        state, z = recurrent_step(
                            state, z, row, k_rows, v_rows, g_rows, channel, column, FLAGS.GATE, BK, BV
                        )
                        at = (batch * tokens + row) * (states * FLAGS.GROUP) + head
                        part = tl.sum(state * load_row(o_rows, at, column, BV)[None, :], 1)
                        u += tl.where((rows == row)[:, None], part[None, :], 0.0)
            b_q = load_rows(q_rows, rows, live, channel, BK) * scale  # [C, BK]
            product += tl.sum(b_q * u, 1)
            tl.store(u_ptr + row_at[:, None] * dk + chan[None, :], u, live[:, None] & (chan < dk)[None, :])
        if FLAGS.NORMALIZE:
            inverse = 1.0 / (tl.load(grads.den + row_at, live, other=1.0) + eps)
            tl.store(grads.dden + row_at, -product * inverse * inverse, live)


@triton.jit(do_not_specialize=["tokens", "chunks", "count"])
def chunk_bwd_state_kernel(
    q, g, sequences, walked, grads, final, dstates, dinitial, tokens, chunks, count, states, dk, dv, scale, eps,
    FLAGS: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """From the end of a sequence: the gradients of the state after every chunk and of the initial one.

    `final` are the gradients of the final state; `chunks` and `count` as in `chunk_fwd_state_kernel`.
    """
    column, own, channel = place_of_walk(dk, dv, BK, BV)
    n, s = own // states, own % states
    shape = Shape(tokens, states, dk, dv, scale, eps)
    batch, start, end = sequence_bounds(n, sequences, tokens)
    base = n.to(tl.int64) * chunks if sequences.cu_seqlens is None else tl.load(sequences.first_chunk + n)
    chan = channel + tl.arange(0, BK)
    of_z = (chan < dk) & (chan * 0 + column == 0)  # what the first block of columns writes of dz
    own = own.to(tl.int64)
    tile, inside = state_tile(own, shape, channel, column, BK, BV)
    dstate = tl.load(final.s + tile, inside, other=0.0)  # [BK, BV]
    dz = load_z(final.z, own, shape, channel, FLAGS.NORMALIZE, BK)  # [BK]
    q_rows = rows_of_head(q, batch, s * FLAGS.GROUP, dk)
    g_rows = rows_of_head(g, batch, s // FLAGS.G_SHARE, dk)
    o_rows = Rows(grads.o, dv, 1, dv)
    own_chunks = (end - start + C - 1) // C
    for i in range(own_chunks):
        number = base + own_chunks - 1 - i
        t = start + (own_chunks - 1 - i) * C
        chunk = Chunk(number, batch, t, end, s)
        rows = t + tl.arange(0, C)
        live = rows < end
        row_at = (batch * tokens + rows) * (states * FLAGS.GROUP) + s * FLAGS.GROUP
        at = number * states + s
        tile, inside = state_tile(at, shape, channel, column, BK, BV)
        fits = chan * 0 + number < count
        tl.store(dstates.s + tile, dstate, inside & fits[:, None])
        if FLAGS.NORMALIZE:
            tl.store(dstates.z + at * dk + chan, dz, of_z & fits)
        g_cum, g_mid, g_last = load_decays(walked, chunk, shape, channel, FLAGS, C, BK)
        magnitude = abs_sum(g_mid)
        for h in range(FLAGS.GROUP):
            b_q = load_rows(rows_of_query(q_rows, q.stride_h, h), rows, live, channel, BK) * scale  # [C, BK]
            magnitude += abs_sum(b_q * tl.exp2(g_cum))
        if magnitude <= MAX_ABS_SUM:
            dstate = dstate * tl.exp2(g_last)[:, None]
            dz = dz * tl.exp2(g_last)
            for h in range(FLAGS.GROUP):
                inverse, dden = load_denominator(grads, row_at + h, live, eps, FLAGS.NORMALIZE)  # [C]
                b_q = load_rows(rows_of_query(q_rows, q.stride_h, h), rows, live, channel, BK) * scale
                b_q = b_q * tl.exp2(g_cum)
                dz += tl.sum(b_q * dden[:, None], 0)
                b_q = round_operand(b_q * inverse[:, None], FLAGS)
                grad = load_rows(o_rows, row_at + h, live, column, BV)  # [C, BV]
                dstate = tl.dot(tl.trans(b_q), grad, dstate, input_precision=FLAGS.PRECISION)
            dstate = dstate * tl.exp2(g_mid)[:, None]
            dz = dz * tl.exp2(g_mid)
        else:
            for j in range(tl.minimum(C, end - t)):
                row = tl.minimum(t + C, end) - 1 - j
                token_at = (batch * tokens + row) * (states * FLAGS.GROUP) + s * FLAGS.GROUP
                dstate, dz = recurrent_step_bwd(
                    dstate, dz, row, token_at, q_rows, q.stride_h, grads, shape, channel, column, FLAGS, BK, BV
                )
                decay = load_decay(g_rows, row, channel, FLAGS.GATE, BK)
                dstate = dstate * decay[:, None]
                dz = dz * decay
    tile, inside = state_tile(own, shape, channel, column, BK, BV)
    if dinitial.s is not None:
        tl.store(dinitial.s + tile, dstate, inside)
    if dinitial.z is not None:
        tl.store(dinitial.z + own * dk + chan, dz, of_z)


@triton.jit(do_not_specialize=["sequence_count", "chunks", "tokens"])
def chunk_bwd_dqkv_kernel(
    q, k, v, g, sequences, walked, grads, u_ptr, dstates, dq_ptr, dk_ptr, dv_ptr, dg_ptr,
    sequence_count, chunks, tokens, states, dk, dv, scale, eps,
    FLAGS: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Of one chunk and state head: dq, dk and dg of a block of key channels, or dv of a block of value columns."""
    number, program = place_of_chunk(sequences, sequence_count, chunks, tokens, C)
    s, block = program % states, program // states
    shape = Shape(tokens, states, dk, dv, scale, eps)
    batch, t, end = chunk_bounds(number, sequences, sequence_count, chunks, tokens, C)
    if t < end:
        chunk = Chunk(number, batch, t, end, s)
        q_rows = rows_of_head(q, batch, s * FLAGS.GROUP, dk)
        k_rows = rows_of_head(k, batch, s // FLAGS.K_SHARE, dk)
        v_rows = rows_of_head(v, batch, s // FLAGS.V_SHARE, dv)
        g_rows = rows_of_head(g, batch, s // FLAGS.G_SHARE, dk)
        W: tl.constexpr = min(BK, 32)  # narrower than in the walks, for more tiles are alive
        blocks = tl.cdiv(dk, W)
        if block < blocks:
            dqk_of_chunk(
                chunk, shape, block * W, blocks, q_rows, q.stride_h, k_rows, v_rows, g_rows, walked, grads, u_ptr, dstates,
                dq_ptr, dk_ptr, dg_ptr, FLAGS, C, W, BV,
            )  # fmt: skip
        else:
            column = (block - blocks) * BV
            dv_of_chunk(
                chunk,
                shape,
                column,
                q_rows,
                q.stride_h,
                k_rows,
                g_rows,
                walked,
                grads,
                dstates,
                dv_ptr,
                FLAGS,
                C,
                BK,
                BV,
            )


@triton.jit
def sum_shared_kernel(x_ptr, y_ptr, width, numel, SHARE: tl.constexpr, BLOCK: tl.constexpr):
    """y [rows, width]: sums of SHARE neighbouring rows of x, in order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, c = i // width, i % width
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(SHARE):
        total += tl.load(x_ptr + (row * SHARE + j) * width + c, i < numel, other=0.0)
    tl.store(y_ptr + i, cast(total, y_ptr.dtype.element_ty), i < numel)
