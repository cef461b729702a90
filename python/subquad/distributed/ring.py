"""Interval attention around a ring: the keys of one rank after the other, results joined by their log-sum-exp.

In step s a rank works on the keys of rank r - s that its rows see, while those of rank r - s - 1 are on their way:

    lse = log(exp(sink) + sum_s exp(lse_s))        out = sum_s exp(lse_s - lse) out_s

in float32 and in the order of s; the sink logit enters once, at the end. Backward every block is given the final out and lse, by
which its gradients are exact by themselves, and those of keys go straight back to their owner, in float32:

    P = exp(score - lse)        dscore = P (dout v^T - rowsum(dout out) + dlse)

Source: ring attention (arXiv 2310.01889).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .._backends import backward_backend
from ..masks import IntervalMask
from ..masks.parts import blocks
from ..ops import _call
from ..ops._autograd import once_differentiable, without_autocast
from . import _collectives
from .exchange import Plan


class Blocks:
    """What a mask and its plan make of each other on a device.

    Attributes:
        masks: of this rank's rows beside the keys that come from each rank, and beside its own; None where none come.
        take: how many keys come from each rank.
        give: int64, which of this rank's keys each rank sees. Where `take` and `give` have nothing, nothing is sent.
    """

    def __init__(self, mask: IntervalMask, plan: Plan, device: torch.device) -> None:
        self.layout, tokens = plan.layout, plan.layout.tokens
        keys = list(plan.fetched.split(plan.receive))
        keys[self.layout.rank] = rows = self.layout.positions()
        self.masks = [x if x is None else x.to(device) for x in blocks(mask, rows, keys, tokens, tokens)]
        self.take = plan.receive
        self.give = [rows.to(device) for rows in plan.rows.split(plan.send)]

    def given(self, rank: int, own: list[torch.Tensor]) -> list[tuple[int, torch.Tensor]]:
        """What is sent to a rank of tensors [B, T of this rank, C]."""
        rows = self.give[rank]
        if not len(rows):
            return []
        return [(rank, x if len(rows) == x.shape[1] else x.index_select(1, rows)) for x in own]

    def rounds(self, own: list[torch.Tensor]) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
        """(step, rank, its part of [B, T, C] tensors that all ranks have), this rank's own first; the next comes meanwhile."""
        layout, block = self.layout, own
        for s in range(layout.size):
            at, ahead, wants = ((layout.rank + d) % layout.size for d in (-s, -s - 1, s + 1))
            came: list[tuple[int, torch.Tensor]] = []
            arrived = None
            if s + 1 < layout.size:
                if self.take[ahead]:
                    came = [(ahead, x.new_empty((x.shape[0], self.take[ahead], x.shape[2]))) for x in own]
                arrived = _collectives.swap(self.given(wants, own), came, layout.group)
            yield s, at, block
            if arrived is not None:
                arrived()
            block = [x for _, x in came]


class Options(NamedTuple):
    """What a call has besides tensors with gradients; `backend` is one that has kernels."""

    scale: float
    softcap: float
    backend: str


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink_logits: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    around: Blocks,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of this rank's rows to all keys that they see.

    Args:
        q, k, v: [B, T of this rank, H, D], checked.
        sink_logits: float32 [Hq]. key_bias: float32 [B, T of this rank].

    Returns:
        (out [B, T of this rank, Hq, Dv] in q's dtype, lse [B, T of this rank, Hq] float32).
    """
    with without_autocast(q.device.type):
        found: tuple[torch.Tensor, torch.Tensor] = _Ring.apply(q, k, v, sink_logits, key_bias, around, options)
    return found


class _Sums:
    """What rows have seen so far: out [B, T, H, Dv], the largest score and the sum of exp(score - it) [B, T, H], float32."""

    def __init__(self, out: torch.Tensor) -> None:
        self.out = out
        self.top = out.new_full(out.shape[:3], -torch.inf)
        self.sum = torch.zeros_like(self.top)

    def join(self, out: torch.Tensor | float, top: torch.Tensor, total: torch.Tensor) -> None:
        largest = torch.maximum(self.top, top)
        shift = largest.masked_fill(largest == -torch.inf, 0.0)
        old, new = self.sum * (self.top - shift).exp(), total * (top - shift).exp()
        self.top, self.sum = largest, old + new
        whole = self.sum.masked_fill(self.sum == 0, 1.0)
        self.out = self.out * (old / whole).unsqueeze(-1) + out * (new / whole).unsqueeze(-1)

    def stats(self) -> torch.Tensor:
        """As the operator has them: 0 and infinity where nothing is seen."""
        empty = self.sum == 0
        return torch.stack([self.top.masked_fill(empty, 0.0), self.sum.log().masked_fill(empty, torch.inf)], -1)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        bias: torch.Tensor | None,
        around: Blocks,
        options: Options,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sums = _Sums(q.new_zeros((*q.shape[:3], v.shape[3]), dtype=torch.float32))
        queries, widths = _queries(q), (k.shape[3], v.shape[3])
        for _, at, block in around.rounds(_own(k, v, bias)):
            mask = around.masks[at]
            if mask is None:
                continue
            operands = _operands(queries, block, widths, mask, options, options.backend)
            out, lse, stats = _call.call("interval_attention_fwd", options.backend, *operands)
            empty = lse == -torch.inf
            sums.join(out, stats[..., 0].masked_fill(empty, -torch.inf), stats[..., 1].exp().masked_fill(empty, 0.0))
            del block, operands  # before there is memory for the next but one
        if sinks is not None:
            sums.join(0.0, sinks.expand_as(sums.top), (sinks != -torch.inf).float())
        stats = sums.stats()
        out, lse = sums.out.to(q.dtype), sums.top + sums.sum.log()
        ctx.save_for_backward(q, k, v, sinks, bias, out, stats)
        ctx.call = around, options
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks, bias, out, stats = ctx.saved_tensors
        around, options = ctx.call
        layout = around.layout
        grad_out, out, grad_lse = grad_out.float().contiguous(), out.float(), grad_lse.contiguous()
        backend = backward_backend("interval_attention_fwd", options.backend, q.device.type)
        own, queries, widths = _own(k, v, bias), _queries(q), (k.shape[3], v.shape[3])
        dq = torch.zeros_like(q, dtype=torch.float32)
        dkeys = q.new_zeros((*k.shape[:2], sum(x.shape[2] for x in own)), dtype=torch.float32)
        coming: list[tuple[int, torch.Tensor]] = []
        arrived = None
        for s, at, block in around.rounds(own):
            mask, going = around.masks[at], []
            if mask is not None:
                operands = _operands(queries, block, widths, mask, options, backend)
                dq_s, dk, dv, dbias, _ = _call.call(
                    "interval_attention_bwd", backend, grad_out, grad_lse, out, stats, *operands
                )
                dq += dq_s.squeeze(3)
                parts = [dk.flatten(2), dv.flatten(2), *([] if bias is None else [dbias.sum(1).unsqueeze(-1)])]
                going = [(at, torch.cat(parts, -1))]
                del dq_s, dk, dv, dbias, parts, operands
            del block
            if arrived is not None:  # of the step before, while this one was worked on
                arrived()
                _add(dkeys, coming, around)
                coming, arrived = [], None
            if s == 0:
                for _, part in going:
                    dkeys += part
                continue
            giver = (layout.rank + s) % layout.size
            rows = len(around.give[giver])
            coming = [(giver, dkeys.new_empty((dkeys.shape[0], rows, dkeys.shape[2])))] if rows else []
            arrived = _collectives.swap(going, coming, layout.group)
        if arrived is not None:
            arrived()
            _add(dkeys, coming, around)
        dk, dv, *dbias = dkeys.split([x.shape[2] * x.shape[3] for x in (k, v)] + [1] * (bias is not None), -1)
        dsinks = None
        if sinks is not None:
            delta = (grad_out * out).sum(-1) - grad_lse
            dsinks = -((sinks - stats[..., 0] - stats[..., 1]).exp() * delta).sum((0, 1))
        return (
            dq.to(q.dtype), dk.reshape(k.shape).to(k.dtype), dv.reshape(v.shape).to(v.dtype), dsinks,
            None if bias is None else dbias[0].squeeze(-1), None, None,
        )  # fmt: skip


def _own(k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> list[torch.Tensor]:
    """What travels of this rank's keys: [B, T, Hkv (D + Dv)] in their dtype and the bias [B, T, 1] in float32."""
    return [torch.cat([k.flatten(2), v.flatten(2)], -1), *([] if bias is None else [bias.unsqueeze(-1).contiguous()])]


def _queries(q: torch.Tensor) -> torch.Tensor:
    return q.float().unsqueeze(3).contiguous()


def _operands(
    queries: torch.Tensor,
    block: list[torch.Tensor],
    widths: tuple[int, int],
    mask: IntervalMask,
    options: Options,
    backend: str,
) -> tuple[Any, ...]:
    """Arguments of the operator on one block [B, n, Hkv (D + Dv)], without sink logits.

    16-bit keys become float32, as queries are: the operator rounds its results to their dtype, once for every block.
    """
    heads = block[0].shape[2] // sum(widths)
    keys, values = (
        x.unflatten(-1, (heads, -1)) for x in block[0].float().split([heads * width for width in widths], -1)
    )
    bias = block[1].transpose(1, 2).contiguous() if len(block) > 1 else None
    plan = mask.plan() if backend == "triton" and mask.starts is not None else []
    return (
        queries, keys, values, *mask.lower(queries.shape[1], keys.shape[1]), bias, None, None, options.scale,
        options.softcap, plan,
    )  # fmt: skip


def _add(dkeys: torch.Tensor, coming: list[tuple[int, torch.Tensor]], around: Blocks) -> None:
    for rank, part in coming:  # rows of one part are distinct, parts come in the order of steps
        dkeys[:, around.give[rank]] += part
