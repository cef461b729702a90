"""Building blocks of chunked linear attention: rows of a chunk, its decays, and single tokens.

Within a chunk of C tokens b is the decay summed from its first token on, to base 2, and m its value at the middle token. Where
b - m is moderate everywhere, q 2^(b - m) and k 2^(m - b) are the operands of every product: with the state scaled by 2^m before
them and by 2^(b_C - m) after them, each product has its true decay. Elsewhere a chunk goes token by token, as the recurrence
is defined: no exponent is a difference there, and a NaN meets no earlier token.

g_cum is b - m [C, BK], g_mid is m [BK], g_last is b_C - m [BK]. Tiles are at most 64 x 64, blocks of tokens, key channels and
value columns, so that what a program holds fits its registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._common.numerics import INTERPRET, LOG2E, widen_if_interpreted
from .arguments import Rows, rows_of_query

MIN_GATE = tl.constexpr(-60.0)  # a decay of e^-60 is nothing in fp32
HALF_RANGE = tl.constexpr(57.7)  # 40 natural units: what b - m and m may reach
MAX_ABS_SUM = tl.constexpr(1e18)  # what the magnitudes of operands may sum to: their products cannot overflow


@triton.jit
def load_exact(x, rows, live, first, W: tl.constexpr):
    """[C, W]: columns first .. first + W of these rows, 0 outside, as an operand of tl.dot that nothing rounds."""
    cols = first + tl.arange(0, W)
    at = rows.to(tl.int64)[:, None] * x.stride + cols[None, :] * x.stride_c
    return widen_if_interpreted(tl.load(x.ptr + at, live[:, None] & (cols < x.width)[None, :], other=0.0))


@triton.jit
def load_rows(x, rows, live, first, W: tl.constexpr):
    """The same in fp32."""
    return load_exact(x, rows, live, first, W).to(tl.float32)


@triton.jit
def load_row(x, row, first, W: tl.constexpr):
    """fp32 [W]: one row likewise."""
    cols = first + tl.arange(0, W)
    at = (tl.zeros([W], tl.int64) + row) * x.stride + cols * x.stride_c
    return tl.load(x.ptr + at, cols < x.width, other=0.0).to(tl.float32)


@triton.jit
def state_tile(own, shape, channel, column, BK: tl.constexpr, BV: tl.constexpr):
    """Offsets [BK, BV] of a block of state number `own` from a key channel and a value column on, and which of them exist."""
    chan, cols = channel + tl.arange(0, BK), column + tl.arange(0, BV)
    at = (own * shape.dk + chan)[:, None] * shape.dv + cols[None, :]
    return at, (chan < shape.dk)[:, None] & (cols < shape.dv)[None, :]


@triton.jit
def load_z(ptr, own, shape, channel, HERE: tl.constexpr, BK: tl.constexpr):
    """fp32 [BK]: channels of z number `own`, 0 outside and where there is none."""
    z = tl.zeros([BK], tl.float32)
    if HERE:
        chan = channel + tl.arange(0, BK)
        z = tl.load(ptr + own * shape.dk + chan, chan < shape.dk, other=0.0)
    return z


@triton.jit
def round_operand(x, FLAGS: tl.constexpr):
    """`x` as an operand of a product: with 11 significant bits, to nearest, for tf32, whose hardware cuts off the others."""
    if FLAGS.PRECISION == "tf32":
        if INTERPRET:
            bits = x.to(tl.int32, bitcast=True)
            near = ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).to(tl.float32, bitcast=True)
            x = tl.where(tl.abs(x) < float("inf"), near, x)
        else:
            x = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r, r", [x], tl.float32, True, 1)
    return x


@triton.jit
def exact_sums(signs, x):
    """signs [C, C] @ x [C, W] for a matrix of -1, 0 and 1: three bf16 hold the 24 bits of every element of x."""
    signs = widen_if_interpreted(signs.to(tl.bfloat16))
    sums = tl.zeros(x.shape, tl.float32)
    for _ in tl.static_range(3):
        part = x.to(tl.bfloat16)
        sums = tl.dot(signs, widen_if_interpreted(part), sums)
        x -= part.to(tl.float32)
    return sums


@triton.jit
def abs_sum(x):
    """Sum of the magnitudes; a NaN anywhere makes it NaN."""
    return tl.sum(tl.abs(x))


@triton.jit
def sequence_bounds(n, sequences, tokens):
    """Batch row and tokens [start, end) of sequence n; bounds are not trusted."""
    if sequences.cu_seqlens is not None:
        start = tl.minimum(tl.maximum(tl.load(sequences.cu_seqlens + n), 0), tokens)
        end = tl.minimum(tl.maximum(tl.load(sequences.cu_seqlens + n + 1), start), tokens)
        batch = tl.zeros_like(start)
    else:
        batch = n.to(tl.int64)
        start = batch * 0
        end = start + tokens
    return batch, start.to(tl.int32), end.to(tl.int32)


@triton.jit
def chunk_bounds(number, sequences, count, chunks, tokens, C: tl.constexpr):
    """Batch row, first token and end of chunk `number`, `chunks` a sequence; an unused one has no tokens."""
    if sequences.cu_seqlens is not None:
        n = tl.load(sequences.of_chunk + number)
        used = n < count
        n = tl.minimum(n, count - 1)
        batch, start, end = sequence_bounds(n, sequences, tokens)
        start += ((number - tl.load(sequences.first_chunk + n)) * C).to(tl.int32)
        end = tl.where(used, end, start)
    else:
        n = (number // chunks).to(tl.int64)
        batch, start, end = sequence_bounds(n, sequences, tokens)
        start += ((number - n * chunks) * C).to(tl.int32)
    return batch, start, end


@triton.jit
def chunk_cumsum(g, C: tl.constexpr):
    """g_cum [C, W] and g_mid [W] of gates [C, W]; g_mid is NaN where the decays are not moderate.

    g_cum is summed from the middle in both directions, not as a difference: a steep gate costs the others no digits.
    """
    order = tl.arange(0, C)
    early = order < C // 2
    g = tl.where(g < MIN_GATE, MIN_GATE, g) * LOG2E
    after = (~early)[None, :] & (order[None, :] <= order[:, None])
    signs = after.to(tl.float32) - (early[None, :] & (order[None, :] > order[:, None])).to(tl.float32)
    ONE: tl.constexpr = g.shape[1] == 1
    g_cum = tl.sum(signs * tl.reshape(g, [1, C]), 1)[:, None] if ONE else exact_sums(signs, g)
    up, down = tl.sum(tl.where(early[:, None], tl.abs(g), 0.0), 0), tl.sum(tl.where(early[:, None], 0.0, tl.abs(g)), 0)
    g_mid = tl.sum(tl.where(early[:, None], g, 0.0), 0)
    return g_cum, tl.where((up <= HALF_RANGE) & (down <= HALF_RANGE), g_mid, float("nan"))


@triton.jit
def load_decays(walked, chunk, shape, channel, FLAGS: tl.constexpr, C: tl.constexpr, BK: tl.constexpr):
    """g_cum, g_mid and g_last, as a walk left them; one column where a head has one gate or none."""
    if FLAGS.GATE == 0:
        g_cum = tl.zeros([C, 1], tl.float32)
        g_mid = tl.zeros([1], tl.float32)
        g_last = tl.zeros([1], tl.float32)
    else:
        W: tl.constexpr = BK if FLAGS.GATE == 2 else 1
        width = shape.dk if FLAGS.GATE == 2 else 1
        first = channel if FLAGS.GATE == 2 else 0
        heads, head = shape.states // FLAGS.G_SHARE, chunk.head // FLAGS.G_SHARE
        rows = chunk.start + tl.arange(0, C)
        x = Rows(walked.g_cum + (chunk.batch * shape.tokens * heads + head) * width, heads * width, 1, width)
        g_cum = load_rows(x, rows, rows < chunk.end, first, W)
        g_last = load_row(x, tl.minimum(chunk.start + C, chunk.end) - 1, first, W)
        g_mid = load_row(Rows(walked.g_mid + head * width, heads * width, 1, width), chunk.number, first, W)
    return g_cum, g_mid, g_last


@triton.jit
def load_decay(g, row, channel, GATE: tl.constexpr, BK: tl.constexpr):
    """The decay of one token [BK]."""
    decay = tl.full([BK], 1.0, tl.float32)
    if GATE > 0:
        b_g = load_row(g, row, channel, BK)
        decay = tl.exp2(tl.where(b_g < MIN_GATE, MIN_GATE, b_g) * LOG2E)
    return decay


@triton.jit
def recurrent_step(state, z, row, k, v, g, channel, column, GATE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """The state [BK, BV] and z [BK] after one more token."""
    decay = load_decay(g, row, channel, GATE, BK)
    key = load_row(k, row, channel, BK)
    value = load_row(v, row, column, BV)
    inside = (channel + tl.arange(0, BK) < k.width)[:, None] & (column + tl.arange(0, BV) < v.width)[None, :]
    state = tl.where(inside, state * decay[:, None] + key[:, None] * value[None, :], 0.0)  # padding times infinity
    return state, z * decay + key


@triton.jit
def recurrent_step_bwd(
    dstate, dz, row, at, q, stride_h, grads, shape, channel, column,
    FLAGS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dstate [BK, BV] and dz [BK] with what one token's queries, results `at` on, add; before its decay."""
    for h in range(FLAGS.GROUP):
        b_q = load_row(rows_of_query(q, stride_h, h), row, channel, BK) * shape.scale
        inverse, dden = load_denominator(grads, at + h, at >= 0, shape.eps, FLAGS.NORMALIZE)
        grad = load_row(Rows(grads.o, shape.dv, 1, shape.dv), at + h, column, BV)
        dstate += b_q[:, None] * (grad * inverse)[None, :]
        dz += b_q * dden
    chan, cols = channel + tl.arange(0, BK), column + tl.arange(0, BV)
    inside = (chan < shape.dk)[:, None] & (cols < shape.dv)[None, :]
    return tl.where(inside, dstate, 0.0), tl.where(chan < shape.dk, dz, 0.0)  # padding times infinity


@triton.jit
def load_denominator(grads, at, live, eps, NORMALIZE: tl.constexpr):
    """1 / (D + eps) and the gradient of D, of rows or of one row; 1 and 0 where nothing is normalised."""
    if NORMALIZE:
        inverse = 1.0 / (tl.load(grads.den + at, live, other=1.0) + eps)
        dden = tl.load(grads.dden + at, live, other=0.0)
    else:
        dden = (at * 0).to(tl.float32)
        inverse = dden + 1.0
    return inverse, dden
