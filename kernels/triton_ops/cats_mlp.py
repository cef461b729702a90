"""CATS: the gated MLP that reads only the up rows and down columns its gate leaves active. For 1 to 16 tokens.

Four launches; their grids depend on shapes alone (capturable in a CUDA graph), without atomics or host synchronisation:

1. gate    z = x Wg^T + b, s = act(z) -> act [N, I] fp32, and a word per neuron whose bit b says "active for token b"
2. up      act <- s * (x Wu^T + b) where active; weight rows whose word is 0 are not read
3. down    partial sums of h Wd^T over fixed ranges of neurons -> [splits, N, H] fp32; inactive neurons are not read
4. reduce  the partial sums in a fixed order, bias, one rounding

There are two ways to multiply, chosen by dtype and never by N. 16-bit weights go through `tl.dot` with the tokens
padded to 16: a decode step is bound by weight traffic, and the padding costs nothing that is scarce. fp32 weights use
IEEE FMAs, 4 tokens to a program. So one compiled kernel serves every N, and with `union_mask=False` the result of a
token depends neither on the other tokens nor on their number, bit for bit.

`down` multiplies fp32 h on bf16 matrix units by splitting it in two bf16 terms. There the tokens share the operand, so
0 * inf could leak from a neuron that only another token activates. A tile with a non-finite sum is therefore computed
again, with non-finite factors taken out of the product and their terms added per token by select. What remains in the
product goes through the same operations as before, so the other tokens keep their bits.

Source: CATS (arXiv 2404.08763): dense gate, predicated up and down. The bit words, the ordered reduction and the
exactness per token are this project's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._common.activations import activate, check_activation, is_active
from ._common.aot import AotCase
from ._common.checks import check_packed, check_threshold, require
from ._common.device import register_limit
from ._common.numerics import INTERPRET, cast, is_finite, split_bf16, widen_if_interpreted
from ._common.quantised import GROUP, product, weights

MAX_TOKENS = tl.constexpr(16)
DENSE = tl.constexpr(-1)  # the format of weights that are not quantised


class Group(NamedTuple):
    """Tokens [lane + first] of one program: of up to 16 of a call."""

    index: Any
    count: Any  # of groups
    lane: Any  # [TOKENS]
    tokens: Any  # [TOKENS]
    live: Any  # [TOKENS]: which exist
    total: Any  # tokens of the call


class Matrix(NamedTuple):
    """A weight, its rows (or columns, of a neuron-major one) `ld` apart, and the bias of what it makes, or None."""

    ptr: Any
    ld: Any
    bias: Any


class Columns(NamedTuple):
    """Outputs of one program of down."""

    first: Any
    index: Any  # [COLS]
    inside: Any  # [COLS]


class Hidden(NamedTuple):
    """act [N, I] fp32, its words [groups, I] int32, I neurons of which this program's range ends at `stop`."""

    rows: Any  # [TOKENS]: pointers to act
    bits: Any
    inner: Any
    stop: Any


@triton.jit
def _group(index, n_tokens, TOKENS: tl.constexpr):
    lane = tl.arange(0, TOKENS)
    tokens = index * TOKENS + lane
    return Group(index, tl.cdiv(n_tokens, TOKENS), lane, tokens, tokens < n_tokens, n_tokens)


@triton.jit
def _project(
    x_ptr, weight, group, rows, need, hidden, DOT: tl.constexpr, BLOCK_H: tl.constexpr, FORMAT: tl.constexpr
):  # fmt: skip
    """x[tokens] @ w[rows].T in fp32, [TOKENS, ROWS]. Rows outside `need` are not read: their result means nothing."""
    if FORMAT == DENSE:
        return _project_dense(x_ptr, weight, group, rows, need, hidden, DOT, BLOCK_H)
    elif DOT:
        TOKENS: tl.constexpr = group.lane.shape[0]
        return product(x_ptr, weight, group.index * TOKENS, group.total, rows, need, FORMAT, TOKENS)
    else:
        k = tl.arange(0, GROUP)
        x_rows = x_ptr + group.tokens.to(tl.int64) * hidden
        sums = tl.zeros([group.tokens.shape[0], rows.shape[0], GROUP], tl.float32)
        for g in range(weight.groups):
            x = tl.load(x_rows[:, None] + (k + g * GROUP)[None, :], group.live[:, None], other=0.0)
            sums = tl.fma(x[:, None, :], weights(weight, rows, need, g, 0, FORMAT)[None, :, :], sums)
        return tl.sum(sums, axis=2)


@triton.jit
def _project_dense(x_ptr, weight, group, rows, need, hidden, DOT: tl.constexpr, BLOCK_H: tl.constexpr):
    cols = tl.arange(0, BLOCK_H)
    x_rows = x_ptr + group.tokens.to(tl.int64) * hidden
    w_rows = weight.ptr + rows.to(tl.int64) * weight.ld
    if DOT:
        acc = tl.zeros([group.tokens.shape[0], rows.shape[0]], tl.float32)
        for start in range(0, hidden, BLOCK_H):
            k = start + cols
            x_mask = group.live[:, None] & (k < hidden)[None, :]
            w_mask = need[:, None] & (k < hidden)[None, :]
            x = tl.load(x_rows[:, None] + k[None, :], x_mask, other=0.0, eviction_policy="evict_last")
            w = tl.load(w_rows[:, None] + k[None, :], w_mask, other=0.0, eviction_policy="evict_first")
            acc = tl.dot(widen_if_interpreted(x), tl.trans(widen_if_interpreted(w)), acc, input_precision="ieee")
        return acc
    else:
        # Every thread sums its own columns; one reduction across threads at the end.
        sums = tl.zeros([group.tokens.shape[0], rows.shape[0], BLOCK_H], tl.float32)
        for start in range(0, hidden, BLOCK_H):
            k = (start + cols)[None, None, :]
            x_mask = group.live[:, None, None] & (k < hidden)
            w_mask = need[None, :, None] & (k < hidden)
            x = tl.load(x_rows[:, None, None] + k, x_mask, other=0.0, eviction_policy="evict_last")
            w = tl.load(w_rows[None, :, None] + k, w_mask, other=0.0, eviction_policy="evict_first")
            sums = tl.fma(x, w, sums)
        return tl.sum(sums, axis=2)


@triton.jit
def _active_word(bits_ptr, neurons, in_range, group, inner, UNION: tl.constexpr, TOKENS: tl.constexpr):
    """The neurons' words for one group of tokens; with UNION, all ones where any token of the call is active."""
    if UNION:
        word = tl.zeros_like(neurons)
        for g in tl.static_range(MAX_TOKENS // TOKENS):
            # A group that does not exist is replaced by the last one: x | x is x.
            word |= tl.load(bits_ptr + tl.minimum(g, group.count - 1) * inner + neurons, in_range, other=0)
        return tl.where(word == 0, 0, -1)
    return tl.load(bits_ptr + group.index * inner + neurons, in_range, other=0)


@triton.jit(do_not_specialize=["n_tokens"])
def _cats_mlp_gate_kernel(
    x_ptr, weight, threshold_ptr, threshold_stride, act_ptr, bits_ptr, n_tokens, hidden, inner,
    ACTIVATION: tl.constexpr, INCLUSIVE: tl.constexpr, DOT: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr, FORMAT: tl.constexpr = DENSE,
):  # fmt: skip
    """A block of neurons for a group of tokens: act [n_tokens, inner] (fp32, unmasked) and bits [groups, inner]."""
    groups = tl.cdiv(n_tokens, TOKENS)
    group = _group(tl.program_id(0) % groups, n_tokens, TOKENS)
    rows = tl.program_id(0) // groups * ROWS + tl.arange(0, ROWS)
    in_range = rows < inner

    z = _project(x_ptr, weight, group, rows, in_range, hidden, DOT, BLOCK_H, FORMAT)  # [TOKENS, ROWS]
    if weight.bias is not None:
        z += tl.load(weight.bias + rows, in_range, other=0.0).to(tl.float32)[None, :]
    s = activate(z, ACTIVATION)
    threshold = tl.load(threshold_ptr + rows.to(tl.int64) * threshold_stride, in_range, other=0.0)
    active = is_active(s, threshold[None, :], INCLUSIVE) & group.live[:, None]
    at = group.tokens.to(tl.int64)[:, None] * inner + rows[None, :]
    tl.store(act_ptr + at, s, group.live[:, None] & in_range[None, :])
    word = tl.sum(active.to(tl.int32) << group.lane[:, None], axis=0)  # [ROWS]
    tl.store(bits_ptr + group.index * inner + rows, word, in_range)


@triton.jit(do_not_specialize=["n_tokens"])
def _cats_mlp_up_kernel(
    x_ptr, weight, act_ptr, bits_ptr, mask_ptr, n_tokens, hidden, inner,
    UNION: tl.constexpr, DOT: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
    FORMAT: tl.constexpr = DENSE,
):  # fmt: skip
    """act <- act * u where active, in place. Other entries keep the gate's value, which nobody may use. mask_ptr: bytes
    [n_tokens, inner] that say what is active, or None."""
    groups = tl.cdiv(n_tokens, TOKENS)
    group = _group(tl.program_id(0) % groups, n_tokens, TOKENS)
    rows = tl.program_id(0) // groups * ROWS + tl.arange(0, ROWS)

    word = _active_word(bits_ptr, rows, rows < inner, group, inner, UNION, TOKENS)  # [ROWS]
    need = word != 0
    active = (((word[None, :] >> group.lane[:, None]) & 1) != 0) & group.live[:, None]
    at = group.tokens.to(tl.int64)[:, None] * inner + rows[None, :]
    if mask_ptr is not None:
        tl.store(mask_ptr + at, active.to(tl.uint8), group.live[:, None] & (rows < inner)[None, :])
    if tl.max(need.to(tl.int32), axis=0) == 0:
        return
    u = _project(x_ptr, weight, group, rows, need, hidden, DOT, BLOCK_H, FORMAT)  # [TOKENS, ROWS]
    if weight.bias is not None:
        u += tl.load(weight.bias + rows, need, other=0.0).to(tl.float32)[None, :]
    ptrs = act_ptr + at
    tl.store(ptrs, tl.load(ptrs, active, other=0.0) * u, active)


@triton.jit
def _down_operands(
    h, group, weight, start, cols,
    BLOCK: tl.constexpr, UNION: tl.constexpr, NEURON_MAJOR: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """For a block of neurons: active [TOKENS, BLOCK], h [TOKENS, BLOCK] fp32 (0 where inactive), w [BLOCK, COLS].

    Rows of w that no token needs are 0, whether or not they were read.
    """
    neurons = start + tl.arange(0, BLOCK)
    in_range = neurons < h.stop
    word = _active_word(h.bits, neurons, in_range, group, h.inner, UNION, group.lane.shape[0])
    active = (((word[None, :] >> group.lane[:, None]) & 1) != 0) & group.live[:, None]
    b_h = tl.load(h.rows[:, None] + neurons[None, :], group.live[:, None] & in_range[None, :], other=0.0)
    need = word != 0
    if FORMAT != DENSE:
        w = weights(weight, neurons, need, cols.first // GROUP, start // GROUP, FORMAT)  # of COLS = GROUP
    elif NEURON_MAJOR:
        ptrs = weight.ptr + neurons.to(tl.int64)[:, None] * weight.ld + cols.index[None, :]
        w = tl.load(ptrs, need[:, None] & cols.inside[None, :], other=0.0, eviction_policy="evict_first")
    else:
        # Neurons are neighbours in memory: leaving out single ones would save no traffic and narrow the loads.
        ptrs = weight.ptr + cols.index.to(tl.int64)[None, :] * weight.ld + neurons[:, None]
        w = tl.load(ptrs, in_range[:, None] & cols.inside[None, :], other=0.0, eviction_policy="evict_first")
        w = tl.where(need[:, None], w, 0.0)
    return active, tl.where(active, b_h, 0.0), w


@triton.jit
def _dot_fp32_by_16bit(h, w, acc):
    """acc + h @ w for fp32 h and 16-bit w on bf16 matrix units; products keep about 17 bits."""
    if INTERPRET:
        return tl.dot(h, w.to(tl.float32), acc, input_precision="ieee")
    h_high, h_low = split_bf16(h)
    if w.dtype == tl.bfloat16:
        acc = tl.dot(h_low, w, acc)
        return tl.dot(h_high, w, acc)
    w_high, w_low = split_bf16(w.to(tl.float32))
    acc = tl.dot(h_low, w_high, acc)
    acc = tl.dot(h_high, w_low, acc)
    return tl.dot(h_high, w_high, acc)


@triton.jit
def _is_regular(h):
    """Whether fp32 h stays finite as an operand of `_dot_fp32_by_16bit`."""
    return is_finite(cast(h, tl.bfloat16).to(tl.float32))


@triton.jit
def _irregular_terms(
    h, group, weight, begin, cols, UNION: tl.constexpr, NEURON_MAJOR: tl.constexpr, FORMAT: tl.constexpr
):
    """Sums [TOKENS, COLS] of the active terms h * w with an irregular h or a non-finite w. Runs rarely."""
    sums = tl.zeros([group.lane.shape[0], cols.index.shape[0]], tl.float32)
    for start in tl.range(begin, h.stop, 8, num_stages=1):
        active, b_h, w = _down_operands(h, group, weight, start, cols, 8, UNION, NEURON_MAJOR, FORMAT)
        w = w.to(tl.float32)
        for b in range(group.lane.shape[0]):
            this = group.lane[:, None] == b
            h_b = tl.sum(tl.where(this, b_h, 0.0), axis=0)[:, None]
            active_b = tl.sum((this & active).to(tl.int32), axis=0)[:, None] != 0
            terms = tl.where(active_b & ((_is_regular(h_b) & is_finite(w)) == 0), h_b * w, 0.0)
            sums = tl.where(this, sums + tl.sum(terms, axis=0)[None, :], sums)
    return sums


@triton.jit(do_not_specialize=["n_tokens"])
def _cats_mlp_down_kernel(
    h_ptr, weight, bits_ptr, partial_ptr, n_tokens, hidden, inner, span,
    UNION: tl.constexpr, NEURON_MAJOR: tl.constexpr, DOT: tl.constexpr,
    TOKENS: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr, FORMAT: tl.constexpr = DENSE,
):  # fmt: skip
    """partial[split, tokens, cols] = sum of h * w over the active neurons of [split * span, (split + 1) * span)."""
    groups, tiles = tl.cdiv(n_tokens, TOKENS), tl.cdiv(hidden, COLS)
    group = _group(tl.program_id(0) % groups, n_tokens, TOKENS)
    split = tl.program_id(0) // groups // tiles
    first = tl.program_id(0) // groups % tiles * COLS
    index = first + tl.arange(0, COLS)
    cols = Columns(first, index, index < hidden)
    begin = split * span
    stop = tl.minimum(begin + span, inner)
    h = Hidden(h_ptr + group.tokens.to(tl.int64) * inner, bits_ptr, inner, stop)

    if DOT:
        acc = tl.zeros([TOKENS, COLS], tl.float32)
        for start in range(begin, stop, BLOCK):
            _active, b_h, w = _down_operands(h, group, weight, start, cols, BLOCK, UNION, NEURON_MAJOR, FORMAT)
            acc = _dot_fp32_by_16bit(b_h, w, acc)
        # 0 * inf is NaN: a non-finite weight shows in the sums of every token, so finite sums prove that none was met.
        if tl.min(tl.min(is_finite(acc).to(tl.int32), axis=1), axis=0) == 0:
            acc = tl.zeros([TOKENS, COLS], tl.float32)
            for start in tl.range(begin, stop, BLOCK, num_stages=1):
                _active, b_h, w = _down_operands(h, group, weight, start, cols, BLOCK, UNION, NEURON_MAJOR, FORMAT)
                b_h = tl.where(_is_regular(b_h), b_h, 0.0)
                acc = _dot_fp32_by_16bit(b_h, tl.where(is_finite(w.to(tl.float32)), w, 0.0), acc)
            acc += _irregular_terms(h, group, weight, begin, cols, UNION, NEURON_MAJOR, FORMAT)
    else:
        sums = tl.zeros([TOKENS, BLOCK, COLS], tl.float32)
        for start in range(begin, stop, BLOCK):
            active, b_h, w = _down_operands(h, group, weight, start, cols, BLOCK, UNION, NEURON_MAJOR, FORMAT)
            sums = tl.where(active[:, :, None], tl.fma(b_h[:, :, None], w[None, :, :], sums), sums)
        acc = tl.sum(sums, axis=1)  # [TOKENS, COLS]
    out = partial_ptr + (split.to(tl.int64) * n_tokens + group.tokens)[:, None] * hidden + index[None, :]
    tl.store(out, acc, group.live[:, None] & cols.inside[None, :])


@triton.jit(do_not_specialize=["splits"])
def _cats_mlp_reduce_kernel(partial_ptr, bias_ptr, y_ptr, hidden, splits, MAX_SPLITS: tl.constexpr, COLS: tl.constexpr):
    """y[token] = the partial sums in a fixed order, plus bias, rounded once."""
    tiles = tl.cdiv(hidden, COLS)
    token = (tl.program_id(0) // tiles).to(tl.int64)
    cols = tl.program_id(0) % tiles * COLS + tl.arange(0, COLS)
    split = tl.arange(0, MAX_SPLITS)
    in_cols = cols < hidden
    ptrs = partial_ptr + (split * (tl.num_programs(0) // tiles) + token)[:, None] * hidden + cols[None, :]
    y = tl.sum(tl.load(ptrs, (split < splits)[:, None] & in_cols[None, :], other=0.0), axis=0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, in_cols, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * hidden + cols, cast(y, y_ptr.dtype.element_ty), in_cols)


@dataclass(frozen=True)
class Plan:
    """Block sizes and launch options; they depend on nothing but the dtype of the weights."""

    dot: bool
    tokens: int  # per program
    rows: int  # neurons per program of gate and up
    block_h: int  # columns per step of gate and up
    cols: int  # outputs per program of down
    block_i: int  # neurons per step of down
    max_splits: int  # of down
    min_span: int  # neurons per split of down: a multiple of this
    warps: int
    stages: int  # of gate and up
    down_stages: tuple[int, int]  # neuron-major (where predicates, read first, take half of the pipeline) and row-major
    # Limits above the need, of gate and up and of down: without one, ptxas may spill to fit another block.
    registers: int | None = None
    down_registers: int | None = None

    def splits(self, inner: int) -> tuple[int, int]:
        """(splits of down, neurons per split), from the shape alone so that results do not vary."""
        span = self.min_span * triton.cdiv(inner, self.min_span * self.max_splits)
        return (triton.cdiv(inner, span) if inner else 0), span


_REDUCED = 128  # outputs per program of reduce

# 16-bit: 8 KiB of weights per step and program, copied asynchronously three steps ahead. fp32: one warp per program, so
# that threads need not wait for each other before the final reduction; many splits, for enough warps.
_DOT = Plan(
    True, 16, 32, 128, 128, 32, max_splits=16, min_span=128, warps=4, stages=4, down_stages=(8, 5), down_registers=168
)
_FMA = Plan(False, 4, 4, 128, 128, 4, max_splits=64, min_span=32, warps=1, stages=1, down_stages=(1, 1))


def cats_mlp_fwd(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    threshold: torch.Tensor,
    b_gate: torch.Tensor | None,
    b_up: torch.Tensor | None,
    b_down: torch.Tensor | None,
    activation: int,
    inclusive: bool,
    union_mask: bool,
) -> torch.Tensor:
    """y = h Wd^T + b_down, h = act(x Wg^T + b_gate) * (x Wu^T + b_up) where |act| > threshold, else nothing.

    Args:
        x: `[N, H]` contiguous, fp32, bf16 or fp16; 1 <= N <= 16.
        w_gate: `[I, H]`, rows contiguous, dtype of x.
        w_up: `[I, H]`, rows contiguous, dtype of x.
        w_down: `[H, I]`, dtype of x; strides (1, ld) ("neuron-major", the fast layout) or (ld, 1).
        threshold: fp32 `[1]` or `[I]`, any stride.
        b_gate: `[I]` contiguous, dtype of x, or None.
        b_up: `[I]` contiguous, dtype of x, or None.
        b_down: `[H]` contiguous, dtype of x, or None.
        activation: 0 silu, 1 gelu_tanh, 2 gelu, 3 relu.
        inclusive: a neuron whose |act| equals the threshold is active.
        union_mask: a neuron active for one token is active for every token of the call.

    Returns:
        y `[N, H]` contiguous, dtype of x.

    Raises:
        ValueError: for shapes or strides outside the above.
    """
    check_activation(activation)
    _check(x, w_gate, w_up, w_down, threshold)
    h, i = x.shape[1], w_gate.shape[0]
    for name, bias, size in (("b_gate", b_gate, i), ("b_up", b_up, i), ("b_down", b_down, h)):
        check_packed(name, bias, (size,), x)
    neuron_major = w_down.stride(0) == 1 or h == 1
    gate, up = Matrix(w_gate, w_gate.stride(0), b_gate), Matrix(w_up, w_up.stride(0), b_up)
    down = Matrix(w_down, w_down.stride(1 if neuron_major else 0), None)
    plan = _FMA if x.dtype == torch.float32 else _DOT
    options: dict[str, Any] = {"activation": activation, "inclusive": inclusive}
    options |= {"union_mask": union_mask, "neuron_major": neuron_major}
    return launch(plan, x, i, gate, up, down, b_down, threshold, **options)


def launch(
    plan: Plan,
    x: torch.Tensor,
    neurons: int,
    gate: Any,
    up: Any,
    down: Any,
    b_down: torch.Tensor | None,
    threshold: torch.Tensor,
    *,
    activation: int,
    inclusive: bool,
    union_mask: bool,
    neuron_major: bool = True,
    formats: tuple[int, int, int] = (DENSE.value, DENSE.value, DENSE.value),
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The four kernels. Weights are each a `Matrix`, or a `Codes` of one of the `formats`; `mask`: bool [N, I] to be written."""
    (n, h), i = x.shape, neurons
    groups = triton.cdiv(n, plan.tokens)
    splits, span = plan.splits(i)
    act = torch.empty((n, i), dtype=torch.float32, device=x.device)
    bits = torch.empty((groups, i), dtype=torch.int32, device=x.device)
    partials = torch.empty((splits, n, h), dtype=torch.float32, device=x.device)
    y = torch.empty_like(x)

    grid = (groups * triton.cdiv(i, plan.rows),)
    tile: dict[str, Any] = {"DOT": plan.dot, "TOKENS": plan.tokens}
    project = {**tile, "ROWS": plan.rows, "BLOCK_H": plan.block_h, "num_stages": plan.stages}
    project.update(register_limit(plan.registers))
    options: dict[str, Any] = {"num_warps": plan.warps, "enable_fp_fusion": False}
    _cats_mlp_gate_kernel[grid](
        x, gate, threshold, threshold.stride(0) if threshold.numel() > 1 else 0, act, bits, n, h, i,
        ACTIVATION=activation, INCLUSIVE=inclusive, FORMAT=formats[0], **project, **options,
    )  # fmt: skip
    _cats_mlp_up_kernel[grid](
        x, up, act, bits, None if mask is None else mask.view(torch.uint8), n, h, i,
        UNION=union_mask, FORMAT=formats[1], **project, **options,
    )  # fmt: skip
    _cats_mlp_down_kernel[(groups * triton.cdiv(h, plan.cols) * splits,)](
        act, down, bits, partials, n, h, i, span,
        UNION=union_mask, NEURON_MAJOR=neuron_major, FORMAT=formats[2], **tile, COLS=plan.cols, BLOCK=plan.block_i,
        num_stages=plan.down_stages[0 if neuron_major else 1], **register_limit(plan.down_registers), **options,
    )  # fmt: skip
    _cats_mlp_reduce_kernel[(triton.cdiv(h, _REDUCED) * n,)](
        partials, b_down, y, h, splits, MAX_SPLITS=plan.max_splits, COLS=_REDUCED, num_warps=4, enable_fp_fusion=False
    )
    return y


def _check(
    x: torch.Tensor, w_gate: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor, threshold: torch.Tensor
) -> None:
    """What the kernels need to stay inside their tensors; the public function checks the rest, with better words."""
    fits = x.dim() == 2 and 1 <= x.shape[0] <= MAX_TOKENS.value and x.is_contiguous()
    require(fits, "x", f"contiguous [1..{MAX_TOKENS.value}, H]", x)
    h, i = x.shape[1], w_gate.shape[0]
    for name, w, shape, ok in (
        ("w_gate", w_gate, (i, h), h <= 1 or w_gate.stride(-1) == 1),
        ("w_up", w_up, (i, h), h <= 1 or w_up.stride(-1) == 1),
        ("w_down", w_down, (h, i), h <= 1 or i <= 1 or 1 in w_down.stride()),
    ):
        require(w.shape == shape and ok and w.dtype == x.dtype, name, f"{x.dtype} {shape} with a unit stride", w)
    check_threshold(threshold, i)


def _aot_args(dtype: torch.dtype, neuron_major: bool, options: bool = False) -> tuple[Any, ...]:
    """A Llama-2-7B layer. `options`: all that adds code, which is biases, thresholds per channel, gelu and union."""
    n, h, i = 4, 4096, 11008
    empty = partial(torch.empty, dtype=dtype, device="meta")
    w_down = empty((i, h)).T if neuron_major else empty((h, i))
    threshold = torch.empty(i if options else 1, dtype=torch.float32, device="meta")
    biases = (empty(i), empty(i), empty(h)) if options else (None, None, None)
    activation = 2 if options else 0
    return (empty((n, h)), empty((i, h)), empty((i, h)), w_down, threshold, *biases, activation, options, options)


REDUCE_SPILL = "4 bytes on sm_90: ptxas stops at 56 registers, with which one more block fits"

AOT = [
    *(
        AotCase(
            f"{name} {layout}",
            cats_mlp_fwd,
            partial(_aot_args, dtype, layout == "neuron-major"),
            {"_cats_mlp_reduce_kernel": REDUCE_SPILL} if dtype is torch.float32 else {},
        )
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32))
        for layout in ("neuron-major", "row-major")
    ),
    AotCase("bf16 options", cats_mlp_fwd, partial(_aot_args, torch.bfloat16, True, options=True)),
    AotCase("fp32 options", cats_mlp_fwd, partial(_aot_args, torch.float32, True, options=True)),
]

__all__ = ["AOT", "cats_mlp_fwd"]
