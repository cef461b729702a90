"""Convolutions on shards: the W - 1 inputs before a run are its initial state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..ops.causal_conv1d import causal_conv1d as _causal_conv1d
from ..ops.conv_feature_map import conv_feature_map as _conv_feature_map
from .agreement import checked
from .exchange import check_layout, check_tokens, halos
from .layout import Run, SequenceLayout


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    layout: SequenceLayout,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    channel_groups: int = 1,
    head_dim: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """`subquad.causal_conv1d` of this rank's tokens: one message forward, one backward, and the bits of one process.

    Args:
        x: [B, T of this rank, D / G].
        weight, bias, activation, channel_groups, head_dim, backend: as in `subquad.causal_conv1d`, equal on all ranks. Their
            gradients are this rank's part of a sum.
        layout: where the tokens are.
        residual: [B, T of this rank, D].

    Returns:
        y [B, T of this rank, D] in x's dtype.

    Raises:
        TypeError, ValueError: as `subquad.causal_conv1d`; a number of tokens that is not the layout's; ranks that differ.
    """

    def call(run: Run, state: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        own = None if residual is None else residual[:, run.local]
        return _causal_conv1d(
            x[:, run.local], weight, bias, initial_state=state, activation=activation, residual=own, cu_seqlens=cu_seqlens,
            channel_groups=channel_groups, head_dim=head_dim, backend=backend,
        )[0]  # fmt: skip

    facts = {"op": "causal_conv1d", "activation": activation, "channel_groups": channel_groups}
    return _over_runs(x, weight, layout, call, facts, "[B, T, D]", residual=residual)


def conv_feature_map(
    x: torch.Tensor,
    conv_weight: torch.Tensor,
    fm_weight: torch.Tensor,
    conv_bias: torch.Tensor | None = None,
    *,
    layout: SequenceLayout,
    activation: str | None = None,
    kind: str = "softmax",
    fullspace: bool = True,
    eps: float = 1e-12,
    backend: str | None = None,
) -> torch.Tensor:
    """`subquad.conv_feature_map` of this rank's tokens: one message forward, one backward.

    Args:
        x: [B, T of this rank, Hx, d].
        layout: where the tokens are.
        conv_weight, fm_weight, conv_bias, activation, kind, fullspace, eps, backend: as in `subquad.conv_feature_map`, equal on
            all ranks. Gradients of weights are this rank's part of a sum.

    Returns:
        phi [B, T of this rank, H, 2f or f] in x's dtype.

    Raises:
        TypeError, ValueError: as `subquad.conv_feature_map`; a number of tokens that is not the layout's; ranks that differ.
    """

    def call(run: Run, state: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        return _conv_feature_map(
            x[:, run.local], conv_weight, fm_weight, conv_bias, initial_state=state, activation=activation,
            cu_seqlens=cu_seqlens, kind=kind, fullspace=fullspace, eps=eps, backend=backend,
        )[0]  # fmt: skip

    facts = {"op": "conv_feature_map", "kind": kind, "fullspace": fullspace}
    return _over_runs(x, conv_weight, layout, call, facts, "[B, T, Hx, d]")


def _over_runs(
    x: torch.Tensor,
    weight: torch.Tensor,
    layout: SequenceLayout,
    call: Callable[[Run, torch.Tensor, torch.Tensor | None], torch.Tensor],
    facts: dict[str, Any],
    shape: str,
    **rows: torch.Tensor | None,
) -> torch.Tensor:
    check_layout(layout)

    def check() -> None:
        for name, tensor in ({"x": x} | rows).items():
            if tensor is not None:
                check_tokens(name, tensor, layout)
                if tensor.dim() != shape.count(",") + 1:
                    raise ValueError(f"{name}: expected shape {shape}, got {list(tensor.shape)}")
        if not isinstance(weight, torch.Tensor) or weight.dim() < 2:
            raise TypeError(f"weight: expected a tensor [D, W], got {getattr(weight, 'shape', type(weight).__name__)}")

    def signature() -> dict[str, Any]:
        return facts | {"x": (x.shape[0], *x.shape[2:], x.dtype), "weight": (*weight.shape, weight.dtype)}

    checked(layout, signature, check)
    taps = weight.shape[-1]
    outputs = []
    for run, before in zip(layout.mine, halos(layout, taps - 1, x)[0], strict=True):
        state = before.flatten(2).transpose(1, 2)
        cu_seqlens = None
        if layout.packed:  # the sequences that begin here have nothing before them
            cu_seqlens = torch.tensor(run.cuts, device=x.device)
            state = F.pad(state, (0, 0, 0, 0, 0, run.pieces - 1))
        outputs.append(call(run, state, cu_seqlens))
    return torch.cat(outputs, 1)
