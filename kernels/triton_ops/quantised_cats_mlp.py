"""The CATS MLP on weights in few bits, for 1 to 16 tokens: the kernels of cats_mlp.py with other weights.

Gate and up of 16-bit x: codes are operands of the matrix units as they are, as in quantised_linear.py. Of fp32 x, and of the
down projection: a group of some rows is dequantised in registers. There fp32 x and h are multiplied without rounding; 16-bit
calls split h and w into two bf16 terms each.

Which way is chosen by dtype and never by N; see cats_mlp.py for what that keeps, and for sources.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ._common.activations import check_activation
from ._common.aot import AotCase
from ._common.checks import check_packed, check_threshold, require
from ._common.quantised import GROUP, codes_of, row_bytes
from .cats_mlp import MAX_TOKENS, REDUCE_SPILL, Plan, launch

_STEP = GROUP.value
# A step is one group of columns. fp32: few rows a warp, each thread 16 bytes of codes.
_DOT = Plan(
    True, 16, 32, _STEP, _STEP, 32, max_splits=16, min_span=128, warps=4, stages=4, down_stages=(4, 4), registers=96,
    down_registers=168,
)  # fmt: skip
_FMA = Plan(
    False,
    4,
    16,
    _STEP,
    _STEP,
    16,
    max_splits=64,
    min_span=32,
    warps=1,
    stages=1,
    down_stages=(1, 1),
    down_registers=255,
)


def quantised_cats_mlp_fwd(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    down_scales: torch.Tensor | None,
    threshold: torch.Tensor,
    b_gate: torch.Tensor | None,
    b_up: torch.Tensor | None,
    b_down: torch.Tensor | None,
    gate_format: int,
    up_format: int,
    down_format: int,
    activation: int,
    inclusive: bool,
    union_mask: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = h Wd + b_down, h = act(x Wg^T + b_gate) * (x Wu^T + b_up) where |act| > threshold, else nothing; and the mask.

    Args:
        x: `[N, H]` contiguous, fp32, bf16 or fp16; 1 <= N <= 16.
        w_gate, w_up: uint8 `[I, row bytes]` contiguous.
        w_down: the same, row i its column i; with down_scales its codes alone.
        down_scales: uint8 `[I / 32, 2 H]`, or `[I / 32, 4 H]` with minima, contiguous; or None.
        threshold: fp32 `[1]` or `[I]`, any stride.
        b_gate, b_up, b_down: `[I]`, `[I]`, `[H]` contiguous, dtype of x, or None.
        gate_format, up_format, down_format: 0 int8, 1 int4, 2 int4_min.
        activation, inclusive, union_mask: as of `cats_mlp_fwd`.

    Returns:
        (y `[N, H]`, dtype of x; bool `[N, I]`, which neurons were active), contiguous.

    Raises:
        ValueError: for shapes or strides outside the above.
    """
    check_activation(activation)
    fits = x.dim() == 2 and 1 <= x.shape[0] <= MAX_TOKENS.value and x.is_contiguous()
    require(fits, "x", f"contiguous [1..{MAX_TOKENS.value}, H]", x)
    (n, h), i = x.shape, w_gate.shape[0]
    gate = codes_of("w_gate", w_gate, h, gate_format, b_gate)
    up = codes_of("w_up", w_up, h, up_format, b_up)
    down = codes_of("w_down", w_down, h, down_format, shared=down_scales)
    for name, w in (("w_up", w_up), ("w_down", w_down)):
        require(w.shape[0] == i, name, f"{i} rows", w)
    check_threshold(threshold, i)
    for name, bias, size in (("b_gate", b_gate, i), ("b_up", b_up, i), ("b_down", b_down, h)):
        check_packed(name, bias, (size,), x)
    mask = torch.empty((n, i), dtype=torch.bool, device=x.device)
    y = launch(
        _FMA if x.dtype == torch.float32 else _DOT, x, i, gate, up, down, b_down, threshold, activation=activation,
        inclusive=inclusive, union_mask=union_mask, formats=(gate_format, up_format, down_format), mask=mask,
    )  # fmt: skip
    return y, mask


def _aot_args(
    dtype: torch.dtype, formats: tuple[int, int, int], shared: bool, options: bool = False
) -> tuple[Any, ...]:
    """A Llama-2-7B layer. `options`: all that adds code, which is biases, thresholds per channel, gelu and union."""
    n, h, i = 4, 4096, 11008
    empty = partial(torch.empty, dtype=dtype, device="meta")
    codes = partial(torch.empty, dtype=torch.uint8, device="meta")
    gate, up = (codes((i, row_bytes(h, format))) for format in formats[:2])
    down = codes((i, row_bytes(h, formats[2], shared)))
    scales = codes((i // _STEP, (4 if formats[2] == 2 else 2) * h)) if shared else None
    threshold = torch.empty(i if options else 1, dtype=torch.float32, device="meta")
    biases = (empty(i), empty(i), empty(h)) if options else (None, None, None)
    return (empty((n, h)), gate, up, down, scales, threshold, *biases, *formats, 2 if options else 0, options, options)


_STACK = "8 bytes of stack that nothing is stored to, on sm_90 and sm_100"

AOT = [
    AotCase(
        f"{name} {kind}",
        quantised_cats_mlp_fwd,
        partial(_aot_args, dtype, formats, shared, options),
        {"_cats_mlp_reduce_kernel": REDUCE_SPILL} if dtype is torch.float32 else {"_cats_mlp_down_kernel": _STACK},
    )
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32))
    for kind, formats, shared, options in (
        ("int8", (0, 0, 0), False, False),
        ("int4", (1, 1, 1), False, False),
        ("int4_min shared", (2, 2, 2), True, False),
        ("options", (2, 2, 0), True, True),
    )
]

__all__ = ["AOT", "quantised_cats_mlp_fwd"]
