"""Tiles, channels and whole sequences, as the kernels of the convolution find them."""

from __future__ import annotations

import triton
import triton.language as tl

VARIES = ["time", "tiles", "sequences"]


@triton.jit
def output_channels(ci, g, conv, GROUPED: tl.constexpr):
    """The g-th output channel of input channels."""
    if GROUPED:
        h = ci // conv.head_dim
        return (h * conv.groups + g) * conv.head_dim + (ci - h * conv.head_dim)
    else:
        return ci


@triton.jit
def tile_of_program(time, tiles, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(row of the batch, tile of its tokens, tokens, channels, mask) of this program."""
    columns = tl.cdiv(width, COLS)
    pid = tl.program_id(0)
    i = pid // columns
    tile = i % tiles
    rows = tile * ROWS + tl.arange(0, ROWS)
    c = (pid - i * columns) * COLS + tl.arange(0, COLS)
    return (i // tiles).to(tl.int64), tile, rows, c, (rows < time)[:, None] & (c < width)[None, :]


@triton.jit
def whole_sequence(cu_ptr, n, time):
    """(first token, length) of sequence n."""
    if cu_ptr is not None:
        start = tl.minimum(tl.maximum(tl.load(cu_ptr + n), 0), time)
        return start, tl.minimum(tl.maximum(tl.load(cu_ptr + n + 1), start), time) - start
    else:
        return time * 0, time
