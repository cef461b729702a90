"""Building blocks of chunked linear attention: rows of a chunk with their decays, and what a chunk does to itself.

Within a chunk b is the decay summed from its first token on, to base 2. Two ways lead to the sum over its pairs i >= j of
scale q_i k_j 2^(b_i - b_j): one product of q 2^(b - m) and k 2^(m - b), with m the b of the middle token, where exponents and
operands are moderate; and else token by token, where every exponent is a difference at or below zero and a NaN meets no earlier
token.
"""

from __future__ import annotations

import triton
import triton.language as tl

HALF_RANGE = tl.constexpr(57.7)  # 40 natural units
MODERATE = tl.constexpr(1e18)  # products of two operands below it cannot overflow


@triton.jit
def rows_of(ptr, rows, live, stride_t, stride_c, width, first, W: tl.constexpr):
    """fp32 [C, W]: columns first .. first + W of these rows, 0 outside."""
    cols = first + tl.arange(0, W)
    at = rows.to(tl.int64)[:, None] * stride_t + cols[None, :] * stride_c
    return tl.load(ptr + at, live[:, None] & (cols < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def row_of(ptr, row, stride_t, stride_c, width, first, W: tl.constexpr):
    """fp32 [W]: one row likewise."""
    cols = first + tl.arange(0, W)
    at = (tl.zeros([W], tl.int64) + row) * stride_t + cols * stride_c
    return tl.load(ptr + at, cols < width, other=0.0).to(tl.float32)


@triton.jit
def beyond(x, limit):
    """How many elements are not within the limit; NaN is not."""
    return tl.sum((~(tl.abs(x) <= limit)).to(tl.int32))


@triton.jit
def span_of(n, cu_ptr, tokens, VARLEN: tl.constexpr):
    """Batch row and tokens [start, end) of sequence n; bounds are not trusted."""
    if VARLEN:
        start = tl.minimum(tl.maximum(tl.load(cu_ptr + n), 0), tokens)
        end = tl.minimum(tl.maximum(tl.load(cu_ptr + n + 1), start), tokens)
        batch = tl.zeros_like(start)
    else:
        batch = n.to(tl.int64)
        start = batch * 0
        end = start + tokens
    return batch, start, end


@triton.jit
def slot_of(slot, cu_ptr, sequence_ptr, offset_ptr, sequences, chunks, tokens, VARLEN: tl.constexpr, C: tl.constexpr):
    """Sequence, batch row, first token and end of a chunk slot; an unused slot has no tokens."""
    if VARLEN:
        n = tl.load(sequence_ptr + slot)
        used = n < sequences
        n = tl.minimum(n, sequences - 1)
        batch, start, end = span_of(n, cu_ptr, tokens, VARLEN)
        start += (slot - tl.load(offset_ptr + n)) * C
        end = tl.where(used, end, start)
    else:
        n = (slot // chunks).to(tl.int64)
        batch, start, end = span_of(n, cu_ptr, tokens, VARLEN)
        start += (slot - n * chunks) * C
    return n, batch, start, end


@triton.jit
def decays(b_ptr, rows, live, t, end, b_t, b_c, dk, GATED: tl.constexpr, C: tl.constexpr, BK: tl.constexpr):
    """b - m [C, BK], m and the last b [BK]; m is 0 when it is NaN, which must stay in its row."""
    if GATED:
        last = tl.minimum(t + C, end) - 1
        middle = row_of(b_ptr, t + (last - t) // 2, b_t, b_c, dk, 0, BK)
        middle = tl.where(middle == middle, middle, 0.0)
        whole = row_of(b_ptr, last, b_t, b_c, dk, 0, BK)
        centred = tl.where(live[:, None], rows_of(b_ptr, rows, live, b_t, b_c, dk, 0, BK) - middle[None, :], 0.0)
    else:
        centred = tl.zeros([C, BK], tl.float32)
        middle = tl.zeros([BK], tl.float32)
        whole = tl.zeros([BK], tl.float32)
    return centred, middle, whole


@triton.jit
def leaving(k, centred, middle, whole, live):
    """k 2^(whole - b): what each token leaves in the state."""
    return tl.where(live[:, None], k * tl.exp2((whole - middle)[None, :] - centred), 0.0)


@triton.jit
def advance(
    state, z, k, v, centred, middle, whole, live, k_ptr, v_ptr, b_ptr, t, end, k_t, v_t, b_t, b_c, dk, dv, first,
    GATED: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The state and z after a chunk. Token by token where positive gates overflow, for infinities must not meet in a sum."""
    chan = tl.arange(0, BK)
    rise = tl.where(live[:, None], (whole - middle)[None, :] - centred, 0.0)
    if tl.sum((~(rise <= 126.0)).to(tl.int32)) == 0:
        kh = leaving(k, centred, middle, whole, live)
        state = state * tl.exp2(whole)[:, None] + tl.dot(tl.trans(kh), v, input_precision=PRECISION)
        z = z * tl.exp2(whole) + tl.sum(kh, 0)
    else:
        before = tl.zeros([BK], tl.float32)
        for j in range(tl.minimum(C, end - t)):
            key = row_of(k_ptr, t + j, k_t, 1, dk, 0, BK)
            value = row_of(v_ptr, t + j, v_t, 1, dv, first, BV)
            now = before
            if GATED:
                now = row_of(b_ptr, t + j, b_t, b_c, dk, 0, BK)
            decay = tl.exp2(now - before)
            state = state * decay[:, None] + key[:, None] * value[None, :]
            z = z * decay + key
            before = now
    inside = chan < dk
    return tl.where(inside[:, None], state, 0.0), tl.where(inside, z, 0.0)  # padding times infinity


@triton.jit
def entering(q, centred, middle, live):
    """q 2^b: how each token sees the state."""
    return tl.where(live[:, None], q * tl.exp2(centred + middle[None, :]), 0.0)


@triton.jit
def pair_decay(centred, middle, b_ptr, row, later, b_t, b_c, dk, GATED: tl.constexpr, BK: tl.constexpr):
    """2^(b_i - b_j) [C, BK] of one token j and those after it; 1 before."""
    if GATED:
        key = row_of(b_ptr, row, b_t, b_c, dk, 0, BK) - middle
        centred = tl.exp2(tl.where(later[:, None], centred - key[None, :], 0.0))
    else:
        centred += 1.0
    return centred


@triton.jit
def outputs(
    q, kb, v, state, z, centred, middle, bad, k_ptr, v_ptr, b_ptr, t, end, live, k_t, v_t, b_t, b_c, dk, dv, first,
    GATED: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Numerators [C, BV] and denominators [C] of a chunk for one query head; q is scaled."""
    order = tl.arange(0, C)
    qt = entering(q, centred, middle, live)
    out = tl.dot(qt, state, input_precision=PRECISION)
    total = tl.sum(qt * z[None, :], 1)
    qb = q * tl.exp2(centred)
    if bad + beyond(qb, MODERATE) == 0:
        scores = tl.dot(qb, tl.trans(kb), input_precision=PRECISION)
        scores = tl.where(order[:, None] >= order[None, :], scores, 0.0)
        out += tl.dot(scores, v, input_precision=PRECISION)
        total += tl.sum(scores, 1)
    else:
        for j in range(tl.minimum(C, end - t)):
            later = order >= j
            w = pair_decay(centred, middle, b_ptr, t + j, later, b_t, b_c, dk, GATED, BK)
            key = row_of(k_ptr, t + j, k_t, 1, dk, 0, BK)
            score = tl.where(later, tl.sum(q * w * key[None, :], 1), 0.0)
            value = row_of(v_ptr, t + j, v_t, 1, dv, first, BV)
            out += tl.where(later[:, None], score[:, None] * value[None, :], 0.0)
            total += score
    return out, total


@triton.jit
def row_gradients(
    grad_ptr, den_ptr, delta_ptr, row_at, live, first, dv, eps, total_rows, NORMALIZE: tl.constexpr, C: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """Gradients of the numerators (columns from `first` on) [C, BV] and of the denominators [C]."""
    inverse = tl.full([C], 1.0, tl.float32)
    dden = tl.zeros([C], tl.float32)
    if NORMALIZE:
        inverse = tl.where(live, 1.0 / (tl.load(den_ptr + row_at, live, other=1.0) + eps), 0.0)
        for block in range(tl.cdiv(dv, BV)):
            dden += tl.load(delta_ptr + block * total_rows + row_at, live, other=0.0)
        dden = -dden * inverse * inverse
    return rows_of(grad_ptr, row_at, live, dv, 1, dv, first, BV) * inverse[:, None], dden


@triton.jit
def token_tile(s_ptr, rows, some, cols, dv, key, decay, value, UPDATE: tl.constexpr):
    """A tile of a state [K, dv] after one token, 0 outside; with UPDATE it is written, else it was."""
    at = rows[:, None] * dv + cols[None, :]
    mask = some[:, None] & (cols < dv)[None, :]
    state = tl.load(s_ptr + at, mask, other=0.0)
    if UPDATE:
        state = tl.where(mask, state * decay[:, None] + key[:, None] * value[None, :], 0.0)
        tl.debug_barrier()  # small tiles are held by several threads: all have read before one writes
        tl.store(s_ptr + at, state, mask)
    return state
