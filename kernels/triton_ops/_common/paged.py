"""Rows of keys or values, one after the other or in pages."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class PagedHeads(NamedTuple):
    """[B, N, H, width] with a contiguous last dimension, or pages [P, page, H, width], of a page of 2 ** bits rows, with a
    table int32 [B, pages] that names those of every batch row. Values of the table are not trusted."""

    ptr: Any
    stride_b: Any
    stride_t: Any
    stride_h: Any
    width: Any
    table: Any
    pages: Any
    count: Any
    bits: Any


def paged_heads(x: torch.Tensor, table: torch.Tensor | None) -> PagedHeads:
    pages = 0 if table is None else table.shape[1]
    bits = 0 if table is None else x.shape[1].bit_length() - 1
    return PagedHeads(x, x.stride(0), x.stride(1), x.stride(2), x.shape[3], table, pages, x.shape[0], bits)


def keys_of(x: torch.Tensor, table: torch.Tensor | None) -> int:
    """N."""
    return x.shape[1] if table is None else x.shape[1] * table.shape[1]


@triton.jit
def load_heads(x, b, h, rows, live, COLS: tl.constexpr):
    """[rows, COLS] of head h of batch row b; 0 where not live."""
    if x.table is not None:
        page = tl.load(x.table + b * x.pages + (rows >> x.bits), live, other=0)
        page = tl.minimum(tl.maximum(page, 0), x.count - 1).to(tl.int64)
        offsets = page * x.stride_b + (rows - ((rows >> x.bits) << x.bits)).to(tl.int64) * x.stride_t
    else:
        offsets = b * x.stride_b + rows.to(tl.int64) * x.stride_t
    cols = tl.arange(0, COLS)
    at = (offsets + h * x.stride_h)[:, None] + cols[None, :]
    return tl.load(x.ptr + at, live[:, None] & (cols < x.width)[None, :], other=0.0)
