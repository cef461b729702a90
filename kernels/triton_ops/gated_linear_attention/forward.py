"""Forward kernels: the walk that leaves the state before every chunk, the results of all chunks at once, one decoding step."""

from __future__ import annotations

import triton
import triton.language as tl

from .._common.linear import token_tile
from .._common.numerics import cast
from .arguments import Chunk, Shape, place_of_chunk, place_of_walk, rows_of_head
from .chunk import (
    MAX_ABS_SUM,
    abs_sum,
    chunk_bounds,
    chunk_cumsum,
    load_decays,
    load_row,
    load_rows,
    load_z,
    recurrent_step,
    round_operand,
    sequence_bounds,
    state_tile,
)


@triton.jit(do_not_specialize=["tokens", "chunks", "count"])
def chunk_fwd_state_kernel(
    k, v, g, sequences, initial, walked, final, tokens, chunks, count, states, dk, dv,
    FLAGS: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """From the start of a sequence: the state before every chunk, the chunk's gates summed, and the final state; what there is
    room for.

    `chunks` is of one sequence, where all are equally long; `count` of all together.
    """
    column, own, channel = place_of_walk(dk, dv, BK, BV)
    n, s = own // states, own % states
    shape = Shape(tokens, states, dk, dv, 1.0, 0.0)
    batch, start, end = sequence_bounds(n, sequences, tokens)
    base = n.to(tl.int64) * chunks if sequences.cu_seqlens is None else tl.load(sequences.first_chunk + n)
    chan = channel + tl.arange(0, BK)
    of_z = (chan < dk) & (chan * 0 + column == 0)  # what the first block of columns writes of z
    own = own.to(tl.int64)
    tile, inside = state_tile(own, shape, channel, column, BK, BV)
    state = tl.zeros([BK, BV], tl.float32)
    if initial.s is not None:
        state = tl.load(initial.s + tile, inside, other=0.0)
    z = load_z(initial.z, own, shape, channel, initial.z is not None, BK)  # [BK]
    k_rows = rows_of_head(k, batch, s // FLAGS.K_SHARE, dk)
    v_rows = rows_of_head(v, batch, s // FLAGS.V_SHARE, dv)
    g_rows = rows_of_head(g, batch, s // FLAGS.G_SHARE, dk)
    for t in range(start, end, C):
        rows = t + tl.arange(0, C)
        live = rows < end
        number = base + (t - start) // C
        at = number * states + s
        if walked.s is not None:
            tile, inside = state_tile(at, shape, channel, column, BK, BV)
            fits = chan * 0 + number < count
            tl.store(walked.s + tile, state, inside & fits[:, None])
            if FLAGS.NORMALIZE:
                tl.store(walked.z + at * dk + chan, z, of_z & fits)
        if FLAGS.GATE > 0:
            W: tl.constexpr = BK if FLAGS.GATE == 2 else 1
            width = dk if FLAGS.GATE == 2 else 1
            corner = channel if FLAGS.GATE == 2 else 0
            g_cum, g_mid = chunk_cumsum(load_rows(g_rows, rows, live, corner, W), C)  # [C, W], [W]
            if walked.g_cum is not None:
                first = (column == 0) & (channel == corner) & (s % FLAGS.G_SHARE == 0)
                if first & (number < count):
                    gates = corner + tl.arange(0, W)
                    row_at = (batch * tokens + rows) * (states // FLAGS.G_SHARE) + s // FLAGS.G_SHARE
                    mask = live[:, None] & (gates < width)[None, :]
                    tl.store(walked.g_cum + row_at[:, None] * width + gates[None, :], g_cum, mask)
                    at = number * (states // FLAGS.G_SHARE) + s // FLAGS.G_SHARE
                    tl.store(walked.g_mid + at * width + gates, g_mid, gates < width)
            g_last = tl.sum(tl.where((rows == tl.minimum(t + C, end) - 1)[:, None], g_cum, 0.0), 0)  # [W]
        else:
            g_cum = tl.zeros([C, 1], tl.float32)
            g_mid = tl.zeros([1], tl.float32)
            g_last = tl.zeros([1], tl.float32)
        b_k = load_rows(k_rows, rows, live, channel, BK) * tl.exp2(-g_cum)  # [C, BK]
        if abs_sum(b_k) + abs_sum(g_mid) <= MAX_ABS_SUM:
            b_k = round_operand(b_k, FLAGS)
            b_v = load_rows(v_rows, rows, live, column, BV)  # [C, BV]
            state = tl.dot(tl.trans(b_k), b_v, state * tl.exp2(g_mid)[:, None], input_precision=FLAGS.PRECISION)
            state = state * tl.exp2(g_last)[:, None]
            z = (z * tl.exp2(g_mid) + tl.sum(b_k, 0)) * tl.exp2(g_last)
        else:
            for row in range(t, tl.minimum(t + C, end)):
                state, z = recurrent_step(state, z, row, k_rows, v_rows, g_rows, channel, column, FLAGS.GATE, BK, BV)
    if final.s is not None:
        tile, inside = state_tile(own, shape, channel, column, BK, BV)
        tl.store(final.s + tile, state, inside)
        if FLAGS.NORMALIZE:
            tl.store(final.z + own * dk + chan, z, of_z)


@triton.jit(do_not_specialize=["sequence_count", "chunks", "tokens"])
def chunk_fwd_out_kernel(
    q, k, v, g, sequences, walked, o_ptr, den_ptr, sequence_count, chunks, tokens, states, dk, dv, scale, eps,
    FLAGS: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Results of one chunk and query head, a block of columns."""
    number, program = place_of_chunk(sequences, sequence_count, chunks, tokens, C)
    heads = states * FLAGS.GROUP
    head = program % heads
    s = head // FLAGS.GROUP
    shape = Shape(tokens, states, dk, dv, scale, eps)
    batch, t, end = chunk_bounds(number, sequences, sequence_count, chunks, tokens, C)
    if t < end:
        chunk = Chunk(number, batch, t, end, s)
        column = program // heads * BV
        cols, order = column + tl.arange(0, BV), tl.arange(0, C)
        rows = t + order
        live = rows < end
        own = number * states + s
        q_rows = rows_of_head(q, batch, head, dk)
        k_rows = rows_of_head(k, batch, s // FLAGS.K_SHARE, dk)
        v_rows = rows_of_head(v, batch, s // FLAGS.V_SHARE, dv)
        b_v = load_rows(v_rows, rows, live, column, BV)  # [C, BV]
        magnitude = abs_sum(b_v)
        out = tl.zeros([C, BV], tl.float32)
        scores = tl.zeros([C, C], tl.float32)
        den = tl.zeros([C], tl.float32)
        for channel in range(0, dk, BK):
            g_cum, g_mid, _g_last = load_decays(walked, chunk, shape, channel, FLAGS, C, BK)
            b_q = load_rows(q_rows, rows, live, channel, BK) * scale * tl.exp2(g_cum)  # [C, BK]
            b_k = load_rows(k_rows, rows, live, channel, BK) * tl.exp2(-g_cum)  # [C, BK]
            magnitude += abs_sum(tl.abs(b_q) + tl.abs(b_k)) + abs_sum(g_mid)
            b_q, b_k = round_operand(b_q, FLAGS), round_operand(b_k, FLAGS)
            scores = tl.dot(b_q, tl.trans(b_k), scores, input_precision=FLAGS.PRECISION)
            tile, inside = state_tile(own, shape, channel, column, BK, BV)
            state = tl.load(walked.s + tile, inside, other=0.0) * tl.exp2(g_mid)[:, None]  # [BK, BV]
            out = tl.dot(b_q, round_operand(state, FLAGS), out, input_precision=FLAGS.PRECISION)
            if FLAGS.NORMALIZE:
                z = load_z(walked.z, own, shape, channel, True, BK) * tl.exp2(g_mid)  # [BK]
                den += tl.sum(b_q * z[None, :], 1)
        scores = round_operand(tl.where(order[:, None] >= order[None, :], scores, 0.0), FLAGS)  # [C, C]
        out = tl.dot(scores, b_v, out, input_precision=FLAGS.PRECISION)
        den += tl.sum(scores, 1)
        if ~(magnitude <= MAX_ABS_SUM):
            out = tl.zeros([C, BV], tl.float32)
            den = tl.zeros([C], tl.float32)
            g_rows = rows_of_head(g, batch, s // FLAGS.G_SHARE, dk)
            for channel in range(0, dk, BK):
                tile, inside = state_tile(own, shape, channel, column, BK, BV)
                state = tl.load(walked.s + tile, inside, other=0.0)
                z = load_z(walked.z, own, shape, channel, FLAGS.NORMALIZE, BK)
                for row in range(t, tl.minimum(t + C, end)):
                    state, z = recurrent_step(
                        state, z, row, k_rows, v_rows, g_rows, channel, column, FLAGS.GATE, BK, BV
                    )
                    query = load_row(q_rows, row, channel, BK) * scale
                    out += tl.where((rows == row)[:, None], tl.sum(query[:, None] * state, 0)[None, :], 0.0)
                    den += tl.where(rows == row, tl.sum(query * z, 0), 0.0)
        row_at = (batch * tokens + rows) * (states * FLAGS.GROUP) + head
        if FLAGS.NORMALIZE:
            out = out / (den + eps)[:, None]
            tl.store(den_ptr + row_at, den, live & (order * 0 + column == 0))
        at = row_at[:, None] * dv + cols[None, :]
        tl.store(o_ptr + at, cast(out, o_ptr.dtype.element_ty), live[:, None] & (cols < dv)[None, :])


@triton.jit
def recurrent_step_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, state, index_ptr, o_ptr, pool, q_heads, k_heads, v_heads, g_heads, states, dk, dv,
    scale, eps, GATE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One decoding step: a row and a state head, with the queries that read it. All tensors are contiguous."""
    row, s = (tl.program_id(0) // states).to(tl.int64), tl.program_id(0) % states
    place = row if index_ptr is None else tl.load(index_ptr + row)
    chan = tl.arange(0, BK)
    inside = (chan < dk) & (chan * 0 + place >= 0) & (chan * 0 + place < pool)
    key = tl.load(k_ptr + (row * k_heads + s * k_heads // states) * dk + chan, inside, other=0.0).to(tl.float32)  # [BK]
    decay = tl.full([BK], 1.0, tl.float32)
    if GATE > 0:
        gate = row * g_heads + s * g_heads // states
        at = gate * dk + chan if GATE == 2 else gate + 0 * chan
        decay = tl.exp(tl.load(g_ptr + at, inside, other=0.0).to(tl.float32))
    used = (place >= 0) & (place < pool)
    own = place * states + s
    z = tl.zeros([BK], tl.float32)
    if state.z is not None:
        z = tl.load(state.z + own * dk + chan, inside, other=0.0) * decay + key
        tl.debug_barrier()  # few channels are held by several threads: all have read before one writes
        tl.store(state.z + own * dk + chan, z, inside)
    group = q_heads // states
    value_ptr = v_ptr + (row * v_heads + s * v_heads // states) * dv
    for column in range(0, dv, BV):
        cols = column + tl.arange(0, BV)
        value = tl.load(value_ptr + cols, cols < dv, other=0.0).to(tl.float32)  # [BV]
        tile = token_tile(state.s + own * dk * dv, chan, inside, cols, dv, key, decay, value, True)  # [BK, BV]
        for h in range(group):
            head = row * q_heads + s * group + h
            query = tl.load(q_ptr + head * dk + chan, inside, other=0.0).to(tl.float32) * scale
            out = tl.sum(query[:, None] * tile, 0)
            if state.z is not None:
                out = out / (tl.sum(query * z, 0) + eps)
            out = tl.where(used, out, 0.0)
            tl.store(o_ptr + head * dv + cols, cast(out, o_ptr.dtype.element_ty), cols < dv)
