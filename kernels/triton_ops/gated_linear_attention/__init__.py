"""Gated linear attention, forward, backward and one decoding step.

Forward: a walk through every sequence leaves the state before each chunk of 64 tokens, one program per block of key channels
and of value columns; then the results of all chunks at once. Without query heads the walk is all, and leaves the last states
alone. Backward: the same walk; dq of all chunks, with the gradients of the denominators; a walk from the end, which leaves the
gradients of the states after every chunk; dk, dv and the gate gradients of all chunks. Shared heads get one more kernel that adds
their parts in order. No atomics, no autotuning.
Chunks first take the way of moderate decays, and go token by token if they turn out steep (see `chunk.py`).

Source: GLA (arXiv 2312.06635), LAWCAT (arXiv 2509.18467) for the normaliser; this form of chunks is this project's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton

from .._common.aot import AotCase
from .._common.device import generation, precision
from .arguments import Flags, Heads, RowGrads, Sequences, States, Walked
from .backward import chunk_bwd_den_kernel, chunk_bwd_dqkv_kernel, chunk_bwd_state_kernel, sum_shared_kernel
from .forward import chunk_fwd_out_kernel, chunk_fwd_state_kernel, recurrent_step_kernel

# Products of 16-bit inputs in tf32, whose operands keep the 11 bits of fp16 and the range of fp32.
_PRECISIONS = {torch.bfloat16: "tf32", torch.float16: "tf32", torch.float32: "ieee"}


def _tiles(dtype: torch.dtype) -> tuple[int, int]:
    """Tokens per chunk, and most key channels and value columns of a tile.

    A product on the tensor cores of sm_90 and sm_100 has 64 rows or more; what else computes, needs more registers for it.
    """
    if dtype is torch.float32:
        return 32, 32
    return 64 if generation() in (9, 10) else 32, 64


class _Plan:
    """Arguments that the kernels of one call have in common, and their launches."""

    def __init__(self, q: Any, k: Any, v: Any, g: Any, s0: Any, z0: Any, cu_seqlens: Any, normalize: bool) -> None:
        self.batch, self.tokens, self.heads, self.dk = q.shape
        self.dv = v.shape[3]
        gates = 0 if g is None else g.shape[2]
        self.states = max(k.shape[2], v.shape[2], gates)
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        chunk, block = _tiles(q.dtype)
        block_k, block_v = (min(block, max(16, triton.next_power_of_2(width))) for width in (self.dk, self.dv))
        self.blocks_k, self.blocks_v = triton.cdiv(self.dk, block_k), triton.cdiv(self.dv, block_v)
        self.narrow_k = triton.cdiv(self.dk, min(block_k, 32))  # as chunk_bwd_dqkv_kernel has them
        self.flags = Flags(
            GROUP=self.heads // self.states,
            K_SHARE=self.states // k.shape[2],
            V_SHARE=self.states // v.shape[2],
            G_SHARE=self.states // max(gates, 1),
            GATE=0 if g is None else g.dim() - 2,
            NORMALIZE=normalize,
            PRECISION=precision(_PRECISIONS[q.dtype]),
        )
        self.options = {"FLAGS": self.flags, "C": chunk, "BK": block_k, "BV": block_v, "num_warps": 8, "num_stages": 1}
        self.q, self.k, self.v = (Heads(x, x.stride(0), x.stride(1), x.stride(2), 1) for x in (q, k, v))
        # A gate that no branch reads must still be one: k stands in.
        self.g = self.k
        if g is not None:
            self.g = Heads(g, g.stride(0), g.stride(1), g.stride(2), g.stride(3) if g.dim() == 4 else 0)
        self.initial = States(s0, z0)
        self.chunks = triton.cdiv(self.tokens, chunk)
        self.slots = self.sequences * self.chunks
        self.packed = Sequences(None, None, None)
        if cu_seqlens is not None:  # slots for any division of the tokens; no value is read on the host
            self.slots = self.tokens // chunk + self.sequences
            bounds = cu_seqlens.clamp(0, self.tokens)
            counts = ((bounds[1:] - bounds[:-1]).clamp_min(0) + chunk - 1) // chunk
            ends = counts.cumsum(0)
            of_chunk = torch.searchsorted(ends, torch.arange(self.slots, device=q.device), right=True)
            self.packed = Sequences(cu_seqlens, of_chunk, ends - counts)
        self.gates = (gates, 1 if g is None or g.dim() == 3 else self.dk)
        self.wide: dict[str, Any] = {"dtype": torch.float32, "device": q.device}

    def empty_states(self, count: int) -> States:
        """Room for S and z."""
        z = count if self.flags.NORMALIZE else 0
        return States(
            torch.empty((count, self.states, self.dk, self.dv), **self.wide),
            torch.empty((z, self.states, self.dk), **self.wide),
        )

    def walk(self, kernel: Any, *args: Any, **numbers: float) -> None:
        """A launch over blocks of value columns, states of sequences, and blocks of key channels, see `place_of_walk`."""
        if self.sequences:
            kernel[(self.blocks_v * self.sequences * self.states * self.blocks_k,)](
                *args, self.tokens, self.chunks, self.slots, self.states, self.dk, self.dv, **numbers, **self.options
            )

    def by_chunk(self, kernel: Any, programs: int, *args: Any, **numbers: float) -> None:
        """A launch of so many programs for every chunk, see `place_of_chunk`."""
        if self.slots:
            kernel[(self.slots * programs,)](
                self.q, self.k, self.v, self.g, self.packed, *args, self.sequences, self.chunks, self.tokens, self.states,
                self.dk, self.dv, **numbers, **self.options,
            )  # fmt: skip

    def walk_forwards(self, final: States | None = None) -> Walked:
        """What the chunks need; the final states go into `final`."""
        g_cum = torch.empty((self.batch, self.tokens, *self.gates), **self.wide)
        g_mid = torch.empty((self.slots, *self.gates), **self.wide)
        walked = Walked(g_cum, g_mid, *self.empty_states(self.slots))
        self.walk_through(walked, final or States(None, None))
        return walked

    def walk_through(self, walked: Walked, final: States) -> None:
        """The walk, which leaves what it is given room for."""
        self.walk(chunk_fwd_state_kernel, self.k, self.v, self.g, self.packed, self.initial, walked, final)


def _sum_of_shared(x: torch.Tensor, share: int, dtype: torch.dtype) -> torch.Tensor:
    """Gradients of heads that `share` states read."""
    if share == 1:
        return x
    y = torch.empty((*x.shape[:2], x.shape[2] // share, *x.shape[3:]), dtype=dtype, device=x.device)
    if y.numel():
        width = x.shape[3] if x.dim() == 4 else 1
        sum_shared_kernel[(triton.cdiv(y.numel(), 1024),)](x, y, width, y.numel(), SHARE=share, BLOCK=1024, num_warps=4)
    return y


def gated_linear_attention_fwd(
    q: Any, k: Any, v: Any, g: Any, s0: Any, z0: Any, cu_seqlens: Any, scale: float, eps: float, normalize: bool
) -> tuple[torch.Tensor, ...]:
    """`subquad_triton::gated_linear_attention_fwd`."""
    plan = _Plan(q, k, v, g, s0, z0, cu_seqlens, normalize)
    o = q.new_empty((*q.shape[:3], plan.dv))
    den = torch.empty((plan.batch if normalize else 0, plan.tokens, plan.heads), **plan.wide)
    final = plan.empty_states(plan.sequences)
    if not plan.heads:
        plan.walk_through(Walked(None, None, None, None), final)
        return o, den, *final
    walked = plan.walk_forwards(final)
    plan.by_chunk(chunk_fwd_out_kernel, plan.heads * plan.blocks_v, walked, o, den, scale=scale, eps=eps)
    return o, den, *final


def gated_linear_attention_bwd(
    grad_o: Any, grad_s: Any, grad_z: Any, den: Any, q: Any, k: Any, v: Any, g: Any, s0: Any, z0: Any,
    cu_seqlens: Any, scale: float, eps: float, normalize: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """`subquad_triton::gated_linear_attention_bwd`."""
    plan = _Plan(q, k, v, g, s0, z0, cu_seqlens, normalize)
    numbers = {"scale": scale, "eps": eps}
    walked = plan.walk_forwards()
    u = torch.empty(q.shape, **plan.wide)
    grads = RowGrads(grad_o, den, torch.empty_like(den))
    plan.by_chunk(chunk_bwd_den_kernel, plan.heads, walked, grads, u, **numbers)
    dstates = plan.empty_states(plan.slots)
    dinitial = States(*(None if x is None else torch.empty(x.shape, **plan.wide) for x in plan.initial))
    plan.walk(
        chunk_bwd_state_kernel, plan.q, plan.g, plan.packed, walked, grads, States(grad_s, grad_z), dstates, dinitial, **numbers
    )  # fmt: skip

    def of_states(x: torch.Tensor, share: int, width: int) -> torch.Tensor:
        """A gradient by state heads: the result itself where no head is shared."""
        dtype = x.dtype if share == 1 else torch.float32
        return torch.empty((plan.batch, plan.tokens, plan.states, width), dtype=dtype, device=q.device)

    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = of_states(k, plan.flags.K_SHARE, plan.dk), of_states(v, plan.flags.V_SHARE, plan.dv)
    dg, parts = torch.empty((0,), **plan.wide), plan.flags.G_SHARE
    if g is not None:
        # One gate per head: every block of key channels has a part of its gradient.
        width = plan.dk if g.dim() == 4 else plan.narrow_k
        parts *= 1 if g.dim() == 4 else plan.narrow_k
        dg = of_states(g, parts, width)
    programs = plan.states * (plan.narrow_k + plan.blocks_v)
    plan.by_chunk(chunk_bwd_dqkv_kernel, programs, walked, grads, u, dstates, dq, dk, dv, dg, **numbers)
    dk, dv = _sum_of_shared(dk, plan.flags.K_SHARE, q.dtype), _sum_of_shared(dv, plan.flags.V_SHARE, q.dtype)
    if g is not None:
        dg = _sum_of_shared(dg if g.dim() == 4 else dg.flatten(2), parts, g.dtype)
    ds0, dz0 = dinitial
    if ds0 is None:
        ds0 = torch.empty((0, plan.states, plan.dk, plan.dv), **plan.wide)
    if dz0 is None:
        dz0 = torch.empty((0, plan.states, plan.dk), **plan.wide)
    return dq, dk, dv, dg, ds0, dz0


def gated_linear_attention_step_(
    q: Any, k: Any, v: Any, g: Any, state: Any, z: Any, state_indices: Any, scale: float, eps: float
) -> torch.Tensor:
    """`subquad_triton::gated_linear_attention_step_`."""
    rows, heads, dk = q.shape
    dv, states = v.shape[2], state.shape[1]
    o = q.new_empty((rows, heads, dv))
    if rows:
        recurrent_step_kernel[(rows * states,)](
            q, k, v, g, States(state, z), state_indices, o, state.shape[0], heads, k.shape[1], v.shape[1],
            1 if g is None else g.shape[1], states, dk, dv, scale, eps, GATE=0 if g is None else g.dim() - 1,
            BK=triton.next_power_of_2(dk), BV=min(32, triton.next_power_of_2(dv)), num_warps=4,
        )  # fmt: skip
    return o


def _aot_args(dtype: torch.dtype, d: int, gate: str, backward: bool, shared: bool = False) -> tuple[Any, ...]:
    b, t, h = 2, 4096, 16
    meta = partial(torch.empty, device="meta")
    q, k, v, o = (meta(b, t, h, d, dtype=dtype) for _ in range(4))
    if shared:
        v = meta(b, t, 4, d, dtype=dtype)
    g = {"channel": meta(b, t, h, d), "head": meta(b, t, h), "none": None}[gate]
    options = (g, None, None, None, d**-0.5, 1e-10, True)
    if not backward:
        return (q, k, v, *options)
    return (o, meta(b, h, d, d), meta(b, h, d), meta(b, t, h), q, k, v, *options)


def _step_args() -> tuple[Any, ...]:
    meta = partial(torch.empty, device="meta")
    q, k, v = (meta(8, 16, 128, dtype=torch.bfloat16) for _ in range(3))
    return (q, k, v, meta(8, 16, 128), meta(8, 16, 128, 128), meta(8, 16, 128), None, 128**-0.5, 1e-10)


_SPILLS = {"chunk_bwd_den_kernel": "in float32, whose products take registers instead of matrix units: a few words"}
AOT = [
    AotCase(
        f"{name} D{d} {gate}",
        launcher,
        partial(_aot_args, dtype, d, gate, backward),
        _SPILLS if dtype is torch.float32 else {},
    )
    for name, dtype, d, gate in (
        ("bf16", torch.bfloat16, 128, "channel"),
        ("bf16", torch.bfloat16, 64, "channel"),
        ("bf16", torch.bfloat16, 128, "head"),
        ("fp32", torch.float32, 64, "channel"),
    )
    for launcher, backward in ((gated_linear_attention_fwd, False), (gated_linear_attention_bwd, True))
]
AOT += [
    AotCase(
        "bf16 D64 shared", gated_linear_attention_bwd, partial(_aot_args, torch.bfloat16, 64, "channel", True, True)
    ),
    AotCase("bf16 D128 step", gated_linear_attention_step_, _step_args),
]

__all__ = ["AOT", "gated_linear_attention_bwd", "gated_linear_attention_fwd", "gated_linear_attention_step_"]
