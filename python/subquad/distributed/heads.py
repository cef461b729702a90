"""The other way to share a sequence: exchange tokens for heads, run any operator on whole sequences of some heads, go back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import _collectives
from .agreement import checked
from .exchange import check_layout, check_tokens
from .layout import SequenceLayout


def by_heads(function: Callable[..., torch.Tensor], *tensors: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
    """function(whole sequences of 1/R of the heads), for this rank's tokens of all heads. The bits of one process.

    Works for every mask, gate and convolution that treats heads alike, with the same work on every rank.

    Args:
        function: of as many tensors [B, T, heads, D], of the whole sequence, to one such tensor.
        tensors: [B, T of this rank, H, D]; ranks divide the heads of the first. Where they do not divide those of another, its
            heads must divide the ranks, and are repeated.
        layout: where the tokens are.

    Returns:
        [B, T of this rank, H of the first result, ...].

    Raises:
        TypeError: no callable, no tensors.
        ValueError: numbers of heads or tokens that do not fit, ranks that differ.
    """
    check_layout(layout)

    def check() -> None:
        if not callable(function):
            raise TypeError(f"function: expected a callable, got {type(function).__name__}")
        if not tensors:
            raise TypeError("tensors: expected at least one, got none")
        for i, x in enumerate(tensors):
            check_tokens(f"tensors[{i}]", x, layout)
            heads = x.shape[2] if x.dim() == 4 else 0
            fits = heads > 0 and (heads % layout.size == 0 or (i > 0 and layout.size % heads == 0))
            if not fits:
                wanted = "a multiple or a divisor" if i else "a multiple"
                raise ValueError(
                    f"tensors[{i}]: expected shape [B, T, H, D], H {wanted} of {layout.size} ranks, got {list(x.shape)}"
                )

    def signature() -> dict[str, Any]:
        return {"op": "by_heads", "tensors": [(x.shape[0], *x.shape[2:], x.dtype) for x in tensors]}

    checked(layout, signature, check)
    spread = []
    for x in tensors:
        if x.shape[2] % layout.size:
            x = x.repeat_interleave(layout.size // x.shape[2], 2)
        spread.append(_Exchange.apply(x, layout, True))
    result: torch.Tensor = _Exchange.apply(function(*spread), layout, False)
    return result


class _Exchange(torch.autograd.Function):
    """[B, T of the rank, H, D] to [B, T, H / R, D], or back, which is also the adjoint."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layout: SequenceLayout, to_heads: bool) -> torch.Tensor:
        ctx.call = layout, not to_heads
        return (_to_heads if to_heads else _to_tokens)(x, layout)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        layout, to_heads = ctx.call
        return (_to_heads if to_heads else _to_tokens)(grad, layout), None, None


def _order(layout: SequenceLayout, device: torch.device) -> torch.Tensor:
    return torch.cat([layout.positions(r, device=device) for r in range(layout.size)])


def _to_heads(x: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
    own, size = x.shape[1], layout.size
    by_rank = x.unflatten(2, (size, x.shape[2] // size)).permute(2, 1, 0, 3, 4).flatten(0, 1)
    got = _collectives.all_to_all(by_rank, layout.lengths, [own] * size, layout.group)
    whole = torch.empty_like(got)
    whole[_order(layout, x.device)] = got
    return whole.transpose(0, 1)


def _to_tokens(x: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
    own, size = layout.lengths[layout.rank], layout.size
    given = x.transpose(0, 1)[_order(layout, x.device)]
    got = _collectives.all_to_all(given, [own] * size, layout.lengths, layout.group)
    return got.unflatten(0, (size, own)).permute(2, 1, 0, 3, 4).flatten(2, 3)
