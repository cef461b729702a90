"""One token of a LAWCAT layer for every sequence, its state updated in place: by one operator, or by several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..ops.causal_conv1d import causal_conv1d_update
from ..ops.gated_linear_attention import gated_linear_attention_step
from ..ops.lawcat_decode_step import lawcat_decode_step
from .causal_conv1d import ShortConvolution

if TYPE_CHECKING:
    from ..cache.lawcat import LawcatState
    from .lawcat import LawcatAttention


def step(
    layer: LawcatAttention,
    x: torch.Tensor,
    positions: tuple[torch.Tensor, torch.Tensor] | None,
    tokens: torch.Tensor | None,
    state: LawcatState,
) -> torch.Tensor:
    """The output [B, 1, HQ d] of x [B, 1, hidden_size]; padding, False in tokens [B, 1], skips its row."""
    rows = None
    if tokens is not None:
        rows = torch.where(tokens[:, 0], torch.arange(x.shape[0], device=x.device), -1).int()
    q0, k0, v = (part[:, 0] for part in layer._heads(x, positions))
    state.suit(q0.dtype)
    v = v if layer.conv_v is None else _convolved(layer, layer.conv_v, state.conv_v, v[:, None], rows)[:, 0]
    mixed = _fused if layer._fuses() else _composed
    return mixed(layer, x, q0, k0, v, state, rows).flatten(1)[:, None]


def _fused(
    layer: LawcatAttention,
    x: torch.Tensor,
    q0: torch.Tensor,
    k0: torch.Tensor,
    v: torch.Tensor,
    state: LawcatState,
    rows: torch.Tensor | None,
) -> torch.Tensor:
    u, gate = layer._gates(x, logits=True), layer.gate
    options: dict[str, Any] = {} if gate is None else {"tau": gate.normalizer, "clamp_min": gate.clamp_min}
    assert state.conv_q is not None and state.conv_k is not None and state.s is not None
    return lawcat_decode_step(
        q0, k0, v, None if u is None else u[:, 0], layer.conv_q.weight, layer.conv_k.weight, layer.feature_map.layer,
        state.conv_q, state.conv_k, state.s, state.z, cq_bias=layer.conv_q.bias, ck_bias=layer.conv_k.bias,
        wphi_k=None if layer.feature_map_k is None else layer.feature_map_k.layer, activation=layer.conv_q.activation,
        state_indices=rows, eps=layer.eps, fm_eps=layer.feature_map.eps, backend=layer.backend, **options,
    )  # fmt: skip


def _composed(
    layer: LawcatAttention,
    x: torch.Tensor,
    q0: torch.Tensor,
    k0: torch.Tensor,
    v: torch.Tensor,
    state: LawcatState,
    rows: torch.Tensor | None,
) -> torch.Tensor:
    features = [
        phi(_convolved(layer, conv, past, y[:, None], rows))[:, 0]
        for conv, past, y, phi in (
            (layer.conv_q, state.conv_q, q0, layer._map_q),
            (layer.conv_k, state.conv_k, k0, layer._map_k),
        )
    ]
    g = layer._gates(x)
    assert state.s is not None
    return gated_linear_attention_step(
        features[0], features[1], v, None if g is None else g[:, 0], state.s, z=state.z,
        state_indices=rows, eps=layer.eps, backend=layer.backend,
    )  # fmt: skip


def _convolved(
    layer: LawcatAttention,
    conv: ShortConvolution,
    past: torch.Tensor | None,
    x: torch.Tensor,
    rows: torch.Tensor | None,
) -> torch.Tensor:
    """One token [B, 1, H, d] of `conv`, whose state `past` is updated."""
    assert past is not None
    y = causal_conv1d_update(
        x.flatten(2), past, conv.weight, conv.bias, activation=conv.activation, conv_state_indices=rows,
        channel_groups=conv.channel_groups, head_dim=conv.head_dim, backend=layer.backend,
    )  # fmt: skip
    return y.unflatten(-1, (-1, layer.head_dim))
