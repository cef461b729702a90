"""Keys, queries and values in registers: heads in parts, rotation by exact phases, and the numbers of a quantised ring."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# One turn in radians over 2^32. Tensors stand left of it: the interpreter would keep constant * tensor as a constant.
ANGLE = tl.constexpr(6.283185307179586 / 2**32)
INT8_MAX, FP8_MAX = tl.constexpr(127.0), tl.constexpr(448.0)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken away, it rounds to an integer, ties to even


class Cache(NamedTuple):
    """Sinks [B, Hkv, sinks, width], rings [B, Hkv, ring, width], scales of rows [B, Hkv, ring] or None; all contiguous."""

    sink_k: Any
    sink_v: Any
    ring_k: Any
    ring_v: Any
    k_scale: Any
    v_scale: Any


class Stream(NamedTuple):
    """int64 [B], values not trusted: tokens in the cache, the first that is not forgotten, new ones or None for all columns."""

    seen: Any
    first: Any
    tokens: Any


class Sizes(NamedTuple):
    """Of a cache; `pairs` of elements are rotated, those in front."""

    kv_heads: Any
    sinks: Any
    ring: Any
    window: Any
    pairs: Any


class Parts(NamedTuple):
    """Heads [N, width]: first and second elements of the rotated pairs, and the others. A part of no elements is [N, 1]."""

    a: Any
    b: Any
    rest: Any


class Layout(NamedTuple):
    """Constants: how many pairs and how many other elements a head has, padded to powers of two, or 0."""

    PAIRS: int
    REST: int
    INTERLEAVED: bool


@triton.jit
def tokens_of_row(stream, b, width):
    """Tokens in the cache of batch row b, and new ones."""
    before = tl.maximum(tl.load(stream.seen + b), 0)
    count = width
    if stream.tokens is not None:
        count = tl.minimum(tl.maximum(tl.load(stream.tokens + b), 0), width).to(tl.int32)
    return before, count


@triton.jit
def load_parts(ptr, offsets, live, pairs, width, LAYOUT: tl.constexpr):
    """Heads that begin at `offsets` [N], as they lie in memory; 0 where not live."""
    a = tl.zeros([offsets.shape[0], 1], tl.float32)
    b = tl.zeros([offsets.shape[0], 1], tl.float32)
    rest = tl.zeros([offsets.shape[0], 1], tl.float32)
    heads = ptr + offsets[:, None]
    if LAYOUT.PAIRS > 0:
        if LAYOUT.INTERLEAVED:
            cols = tl.arange(0, 2 * LAYOUT.PAIRS)[None, :]
            both = tl.load(heads + cols, live[:, None] & (cols < 2 * pairs), other=0)
            a, b = tl.split(tl.reshape(both, [offsets.shape[0], LAYOUT.PAIRS, 2]))
        else:
            cols = tl.arange(0, LAYOUT.PAIRS)[None, :]
            some = live[:, None] & (cols < pairs)
            a = tl.load(heads + cols, some, other=0)
            b = tl.load(heads + pairs + cols, some, other=0)
    if LAYOUT.REST > 0:
        cols = 2 * pairs + tl.arange(0, LAYOUT.REST)[None, :]
        rest = tl.load(heads + cols, live[:, None] & (cols < width), other=0)
    return Parts(a, b, rest)


@triton.jit
def store_parts(x, ptr, offsets, live, pairs, width, LAYOUT: tl.constexpr):
    """The inverse of `load_parts`, of elements in the type of the memory."""
    heads = ptr + offsets[:, None]
    if LAYOUT.PAIRS > 0:
        if LAYOUT.INTERLEAVED:
            cols = tl.arange(0, 2 * LAYOUT.PAIRS)[None, :]
            both = tl.reshape(tl.join(x.a, x.b), [offsets.shape[0], 2 * LAYOUT.PAIRS])
            tl.store(heads + cols, both, live[:, None] & (cols < 2 * pairs))
        else:
            cols = tl.arange(0, LAYOUT.PAIRS)[None, :]
            some = live[:, None] & (cols < pairs)
            tl.store(heads + cols, x.a, some)
            tl.store(heads + pairs + cols, x.b, some)
    if LAYOUT.REST > 0:
        cols = 2 * pairs + tl.arange(0, LAYOUT.REST)[None, :]
        tl.store(heads + cols, x.rest, live[:, None] & (cols < width))


@triton.jit
def widen(x):
    """fp32 of floats, int8, or bytes that are float8_e4m3fn: arithmetic, for not every architecture converts them."""
    if x.dtype == tl.uint8:
        bits = x.to(tl.int16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)  # the bits of a float16 of 2^-8 the value
        value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), value)
    else:
        return x.to(tl.float32)


@triton.jit
def quantise(x, scale, dtype: tl.constexpr):
    """fp32 x over its scale, rounded to nearest even in int8, or as bytes of float8_e4m3fn; what is not finite becomes 0."""
    MOST: tl.constexpr = INT8_MAX if dtype == tl.int8 else FP8_MAX
    ratio = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    ratio = tl.where(tl.abs(ratio) < float("inf"), ratio, 0.0)
    ratio = tl.minimum(tl.maximum(ratio, -MOST), MOST)
    if dtype == tl.int8:
        return ((ratio + ROUND) - ROUND).to(tl.int8)
    else:
        size = tl.abs(ratio)
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        small = (size * 512.0 + ROUND).to(tl.int32, bitcast=True) & 0xFF  # below 2^-6: in units of 2^-9
        code = tl.where(size < 0.015625, small, normal)
        return (code | ((ratio.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _cos_sin(phase):
    """Of int32 in units of 2^-32 of a turn, to 1e-7: Taylor sums fitted to an eighth of a turn either way, by quarters.

    The compiler's own functions bring a path for angles of any size, which takes local memory.
    """
    quarter = (phase >> 29) + 1 >> 1
    x = (phase - (quarter << 30)).to(tl.float32) * ANGLE
    y = x * x
    sin = x + x * y * (y * (y * -1.9515296e-4 + 8.3321609e-3) - 1.6666655e-1)
    cos = 1.0 - 0.5 * y + y * y * (y * (y * 2.4433157e-5 - 1.3887316e-3) + 4.1666646e-2)
    odd = (quarter & 1) == 1
    first = tl.where(odd, sin, cos)
    second = tl.where(odd, cos, sin)
    return tl.where(((quarter + 1) & 2) == 2, -first, first), tl.where((quarter & 2) == 2, -second, second)


@triton.jit
def rotate(x, tokens, turns):
    """fp32 `Parts` with their pairs rotated by tokens [N], turns [PAIRS] in units of 2^-64 per token: products wrap at a turn."""
    phase = tokens.to(tl.int64)[:, None] * turns[None, :]
    cos, sin = _cos_sin((phase >> 32).to(tl.int32))
    return Parts(x.a * cos - x.b * sin, x.b * cos + x.a * sin, x.rest)
