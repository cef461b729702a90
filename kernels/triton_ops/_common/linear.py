"""The recurrence of linear attention on a tile of a state that lies in memory."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def token_tile(s_ptr, rows, some, cols, dv, key, decay, value, UPDATE: tl.constexpr):
    """A tile [rows, cols] of a state [K, dv] after one token, 0 outside; with UPDATE it is written, else it was."""
    at = rows[:, None] * dv + cols[None, :]
    mask = some[:, None] & (cols < dv)[None, :]
    state = tl.load(s_ptr + at, mask, other=0.0)
    if UPDATE:
        state = tl.where(mask, state * decay[:, None] + key[:, None] * value[None, :], 0.0)
        tl.debug_barrier()  # small tiles are held by several threads: all have read before one writes
        tl.store(s_ptr + at, state, mask)
    return state
