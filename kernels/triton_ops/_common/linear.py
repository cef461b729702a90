"""Building blocks of chunked linear attention: rows of a chunk, its decays, and single tokens.

Within a chunk of C tokens b is the decay summed from its first token on, to base 2, and m its value at the middle token. Where
b - m is moderate everywhere, q 2^(b - m) and k 2^(m - b) are the operands of every product: with the state scaled by 2^m before
them and by 2^(b_C - m) after them, each product has its true decay. Elsewhere a chunk goes token by token, as the recurrence
is defined: no exponent is a difference there, and a NaN meets no earlier token.

Tiles are at most 64 x 64, blocks of tokens, key channels and value columns, so that what a program holds fits its registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import INTERPRET, widen_if_interpreted

LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-60.0)  # a decay of e^-60 is nothing in fp32
HALF_RANGE = tl.constexpr(57.7)  # 40 natural units: what b - m and m may reach
MODERATE = tl.constexpr(1e18)  # what the magnitudes of operands may sum to: their products cannot overflow


@triton.jit
def exact_rows_of(ptr, rows, live, stride_t, stride_c, width, first, W: tl.constexpr):
    """[C, W]: columns first .. first + W of these rows, 0 outside, as an operand of tl.dot that nothing rounds."""
    cols = first + tl.arange(0, W)
    at = rows.to(tl.int64)[:, None] * stride_t + cols[None, :] * stride_c
    return widen_if_interpreted(tl.load(ptr + at, live[:, None] & (cols < width)[None, :], other=0.0))


@triton.jit
def rows_of(ptr, rows, live, stride_t, stride_c, width, first, W: tl.constexpr):
    """The same in fp32."""
    return exact_rows_of(ptr, rows, live, stride_t, stride_c, width, first, W).to(tl.float32)


@triton.jit
def row_of(ptr, row, stride_t, stride_c, width, first, W: tl.constexpr):
    """fp32 [W]: one row likewise."""
    cols = first + tl.arange(0, W)
    at = (tl.zeros([W], tl.int64) + row) * stride_t + cols * stride_c
    return tl.load(ptr + at, cols < width, other=0.0).to(tl.float32)


@triton.jit
def tile_of(own, dk, dv, channel, first, BK: tl.constexpr, BV: tl.constexpr):
    """Offsets of a block of state number `own` from a key channel and a value column on, and which of them exist."""
    chan, cols = channel + tl.arange(0, BK), first + tl.arange(0, BV)
    at = (own * dk + chan)[:, None] * dv + cols[None, :]
    return at, (chan < dk)[:, None] & (cols < dv)[None, :]


@triton.jit
def vector_of(ptr, own, dk, channel, HERE: tl.constexpr, BK: tl.constexpr):
    """fp32 [BK]: channels of row `own`, 0 outside and where there is none."""
    x = tl.zeros([BK], tl.float32)
    if HERE:
        chan = channel + tl.arange(0, BK)
        x = tl.load(ptr + own * dk + chan, chan < dk, other=0.0)
    return x


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """`x` as an operand of a product: with 11 significant bits, to nearest, for tf32, whose hardware cuts off the others."""
    if PRECISION == "tf32":
        if INTERPRET:
            bits = x.to(tl.int32, bitcast=True)
            near = ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).to(tl.float32, bitcast=True)
            x = tl.where(tl.abs(x) < float("inf"), near, x)
        else:
            x = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r, r", [x], tl.float32, True, 1)
    return x


@triton.jit
def exact_sums(signs, x):
    """signs @ x for a matrix of -1, 0 and 1: three bf16 hold the 24 bits of every element of x."""
    signs = widen_if_interpreted(signs.to(tl.bfloat16))
    sums = tl.zeros(x.shape, tl.float32)
    for _ in tl.static_range(3):
        part = x.to(tl.bfloat16)
        sums = tl.dot(signs, widen_if_interpreted(part), sums)
        x -= part.to(tl.float32)
    return sums


@triton.jit
def size(x):
    """Sum of the magnitudes; a NaN anywhere makes it NaN."""
    return tl.sum(tl.abs(x))


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
    return batch, start.to(tl.int32), end.to(tl.int32)


@triton.jit
def slot_of(slot, cu_ptr, sequence_ptr, offset_ptr, sequences, chunks, tokens, VARLEN: tl.constexpr, C: tl.constexpr):
    """Batch row, first token and end of a chunk slot; an unused slot has no tokens."""
    if VARLEN:
        n = tl.load(sequence_ptr + slot)
        used = n < sequences
        n = tl.minimum(n, sequences - 1)
        batch, start, end = span_of(n, cu_ptr, tokens, VARLEN)
        start += ((slot - tl.load(offset_ptr + n)) * C).to(tl.int32)
        end = tl.where(used, end, start)
    else:
        n = (slot // chunks).to(tl.int64)
        batch, start, end = span_of(n, cu_ptr, tokens, VARLEN)
        start += ((slot - n * chunks) * C).to(tl.int32)
    return batch, start, end


@triton.jit
def gate_sums(g, C: tl.constexpr):
    """b - m [C, W] and m [W] of gates [C, W]; m is NaN where the decays are not moderate.

    b - m is summed from the middle in both directions, not as a difference: a steep gate costs the others no digits.
    """
    order = tl.arange(0, C)
    early = order < C // 2
    g = tl.where(g < FLOOR, FLOOR, g) * LOG2E
    after = (~early)[None, :] & (order[None, :] <= order[:, None])
    signs = after.to(tl.float32) - (early[None, :] & (order[None, :] > order[:, None])).to(tl.float32)
    ONE: tl.constexpr = g.shape[1] == 1
    centred = tl.sum(signs * tl.reshape(g, [1, C]), 1)[:, None] if ONE else exact_sums(signs, g)
    up, down = tl.sum(tl.where(early[:, None], tl.abs(g), 0.0), 0), tl.sum(tl.where(early[:, None], 0.0, tl.abs(g)), 0)
    middle = tl.sum(tl.where(early[:, None], g, 0.0), 0)
    return centred, tl.where((up <= HALF_RANGE) & (down <= HALF_RANGE), middle, float("nan"))


@triton.jit
def decays(
    b_ptr, m_ptr, slot, origin, t, end, heads, head, dk, channel, GATE: tl.constexpr, C: tl.constexpr, BK: tl.constexpr
):
    """b - m [C, BK], m and b_C - m [BK], as a walk left them; one column where a head has one gate (1) or none (0)."""
    if GATE == 0:
        centred = tl.zeros([C, 1], tl.float32)
        middle = tl.zeros([1], tl.float32)
        rest = tl.zeros([1], tl.float32)
    else:
        W: tl.constexpr = BK if GATE == 2 else 1
        width = dk if GATE == 2 else 1
        first = channel if GATE == 2 else 0
        rows = t + tl.arange(0, C)
        b_ptr += (origin * heads + head) * width
        centred = rows_of(b_ptr, rows, rows < end, heads * width, 1, width, first, W)
        rest = row_of(b_ptr, tl.minimum(t + C, end) - 1, heads * width, 1, width, first, W)
        middle = row_of(m_ptr + head * width, slot, heads * width, 1, width, first, W)
    return centred, middle, rest


@triton.jit
def decay_of(g_ptr, row, g_t, g_c, dk, channel, GATE: tl.constexpr, BK: tl.constexpr):
    """The decay of one token [BK]."""
    decay = tl.full([BK], 1.0, tl.float32)
    if GATE > 0:
        g = row_of(g_ptr, row, g_t, g_c, dk, channel, BK)
        decay = tl.exp2(tl.where(g < FLOOR, FLOOR, g) * LOG2E)
    return decay


@triton.jit
def advance(
    state, z, row, k_ptr, v_ptr, g_ptr, k_t, v_t, g_t, g_c, dk, dv, channel, first,
    GATE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The state and z after one more token."""
    decay = decay_of(g_ptr, row, g_t, g_c, dk, channel, GATE, BK)
    key = row_of(k_ptr, row, k_t, 1, dk, channel, BK)
    value = row_of(v_ptr, row, v_t, 1, dv, first, BV)
    _at, inside = tile_of(0, dk, dv, channel, first, BK, BV)
    state = tl.where(inside, state * decay[:, None] + key[:, None] * value[None, :], 0.0)  # padding times infinity
    return state, z * decay + key


@triton.jit
def retreat(
    dstate, dz, row, at, q_ptr, grad_ptr, den_ptr, dden_ptr, q_t, q_h, dk, dv, channel, first, scale, eps,
    GROUP: tl.constexpr, NORMALIZE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The gradients of the state and z with what one token's queries add, before its decay."""
    for h in range(GROUP):
        q = row_of(q_ptr + h * q_h, row, q_t, 1, dk, channel, BK) * scale
        inverse, dden = denominator(den_ptr, dden_ptr, at + h, at >= 0, eps, NORMALIZE)
        dstate += q[:, None] * (row_of(grad_ptr, at + h, dv, 1, dv, first, BV) * inverse)[None, :]
        dz += q * dden
    _at, inside = tile_of(0, dk, dv, channel, first, BK, BV)
    return tl.where(inside, dstate, 0.0), tl.where(channel + tl.arange(0, BK) < dk, dz, 0.0)  # padding times infinity


@triton.jit
def denominator(den_ptr, dden_ptr, at, live, eps, NORMALIZE: tl.constexpr):
    """1 / (D + eps) and the gradient of D, of rows or of one row; 1 and 0 where nothing is normalised."""
    if NORMALIZE:
        inverse = 1.0 / (tl.load(den_ptr + at, live, other=1.0) + eps)
        dden = tl.load(dden_ptr + at, live, other=0.0)
    else:
        dden = (at * 0).to(tl.float32)
        inverse = dden + 1.0
    return inverse, dden


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
