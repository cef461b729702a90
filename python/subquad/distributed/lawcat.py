"""A LAWCAT layer on shards: halos for its convolutions and its window, one exchange of states."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..nn._children import plain
from ..nn._window import joined, rotated, window_terms
from ..nn.causal_conv1d import ShortConvolution
from ..nn.feature_map import LearnedFeatureMap
from ..nn.lawcat import LawcatAttention
from ..ops.causal_conv1d import causal_conv1d
from ..ops.conv_feature_map import conv_feature_map
from .exchange import fetch, halo_plan, halos_of, with_own
from .gated_linear_attention import gated_linear_attention
from .layout import Run, SequenceLayout


def lawcat(
    layer: LawcatAttention,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
    layout: SequenceLayout,
    real: torch.Tensor | None = None,
) -> torch.Tensor:
    """`layer.mix` of this rank's tokens, [B, T of this rank, HQ d].

    Two messages forward, two backward: raw queries and keys before each run, and states; a window adds one for its keys.

    Args:
        layer: one whose convolutions and feature maps are the package's own.
        hidden_states: [B, T of this rank, hidden_size].
        position_embeddings: (cos, sin) of this rank's tokens, or None.
        layout: where the tokens are.
        real: bool [B, T of this rank], False at padding, which stands before or behind all tokens of a row.

    Raises:
        ValueError: a layer with parts that are no longer the package's own, with `linear_covers_window=False`, or with a window
            where sequences are packed.
    """
    _check(layer, layout)
    q0, k0, v = layer._heads(hidden_states, position_embeddings)
    g = layer._gates(hidden_states)
    if real is not None:  # zeros before a sequence are what a convolution sees there anyway
        gone = ~real[..., None, None]
        q0, k0, v = (x.masked_fill(gone, 0) for x in (q0, k0, v))
        g = None if g is None else g.masked_fill(gone if g.dim() == 4 else gone[..., 0], 0)
    q, k, v = _convolved(layer, q0, k0, v, layout)
    if real is not None:
        k, v = k.masked_fill(gone, 0), v.masked_fill(gone, 0)
    if layer.window_size:
        mixed = _hybrid(layer, q0, k0, q, k, v, g, position_embeddings, layout, real)
    else:
        mixed = gated_linear_attention(
            q, k, v, g, layout=layout, normalize=layer.normalize, eps=layer.eps, backend=layer.backend
        )[0]
    if real is not None:
        mixed = mixed.masked_fill(gone, 0)
    if layer.output_gate is not None and layer.output_norm is not None:
        if real is not None:
            hidden_states = hidden_states.masked_fill(~real[..., None], 0)
        mixed = layer.output_norm(mixed) * F.silu(layer.output_gate(hidden_states)).unflatten(-1, (-1, layer.head_dim))
    return mixed.flatten(2)


def _check(layer: LawcatAttention, layout: SequenceLayout) -> None:
    for name, kind in (
        ("conv_q", ShortConvolution), ("conv_k", ShortConvolution), ("conv_v", ShortConvolution),
        ("feature_map", LearnedFeatureMap), ("feature_map_k", LearnedFeatureMap),
    ):  # fmt: skip
        child = getattr(layer, name)
        if child is not None and (not plain(child, kind) or getattr(child, "skip_connection", False)):
            raise ValueError(
                f"{name}: expected a plain {kind.__name__} under context_parallel, got {type(child).__name__}"
            )
    if layer.window_size and (not layer.linear_covers_window or layout.packed):
        wanted = (
            "linear_covers_window=True" if not layer.linear_covers_window else "no packed sequences beside a window"
        )
        raise ValueError(f"layout: expected {wanted} under context_parallel, got the other")


def _convolved(
    layer: LawcatAttention, q0: torch.Tensor, k0: torch.Tensor, v: torch.Tensor, layout: SequenceLayout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of q and k, and v, whose halos travel in one message."""
    parts: list[tuple[torch.Tensor, ShortConvolution, Any]] = [
        (q0, layer.conv_q, layer.feature_map),
        (k0, layer.conv_k, layer._key_map()),
    ]
    if layer.conv_v is not None:
        parts.append((v, layer.conv_v, None))
    past = max(conv.kernel_size for _, conv, _ in parts) - 1
    plan = halo_plan(layout, past)
    fetched = fetch(plan, *(x for x, _, _ in parts))
    found = []
    for (x, conv, phi), other in zip(parts, fetched, strict=True):
        outputs = []
        for run, before in zip(layout.mine, halos_of(plan, with_own(plan, x, other), past), strict=True):
            state = before.flatten(2).transpose(1, 2)[..., past + 1 - conv.kernel_size :]
            outputs.append(_of_run(layer, x[:, run.local], conv, phi, run, state, layout))
        found.append(torch.cat(outputs, 1))
    return found[0], found[1], found[2] if layer.conv_v is not None else v


def _of_run(
    layer: LawcatAttention,
    x: torch.Tensor,
    conv: ShortConvolution,
    phi: Any,
    run: Run,
    past: torch.Tensor,
    layout: SequenceLayout,
) -> torch.Tensor:
    bounds = None
    if layout.packed:  # the sequences that begin here have nothing before them
        bounds = torch.tensor(run.cuts, device=x.device)
        past = F.pad(past, (0, 0, 0, 0, 0, run.pieces - 1))
    if phi is None:
        y, _ = causal_conv1d(
            x.flatten(2), conv.weight, conv.bias, initial_state=past, activation=conv.activation, cu_seqlens=bounds,
            channel_groups=conv.channel_groups, head_dim=conv.head_dim, backend=layer.backend,
        )  # fmt: skip
        return y.unflatten(-1, (-1, layer.head_dim))
    return conv_feature_map(
        x, conv.weight, phi.layer, conv.bias, initial_state=past, activation=conv.activation, cu_seqlens=bounds,
        kind=phi.kind, fullspace=phi.fullspace, eps=phi.eps, backend=layer.backend,
    )[0]  # fmt: skip


def _hybrid(
    layer: LawcatAttention,
    q0: torch.Tensor,
    k0: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    positions: tuple[torch.Tensor, torch.Tensor] | None,
    layout: SequenceLayout,
    real: torch.Tensor | None,
) -> torch.Tensor:
    """Window and linear attention over one denominator; a column of ones in v gives the linear one's."""
    q0, k0 = rotated(layer, q0, k0, positions)
    here = torch.ones_like(v[..., :1, :1]) if real is None else real.to(v.dtype)[..., None, None]
    past = layer.window_size - 1
    plan = halo_plan(layout, past)
    rows = [with_own(plan, own, other) for own, other in zip((k0, v, here), fetch(plan, k0, v, here), strict=True)]
    before = [halos_of(plan, x, past) for x in rows]
    near, total = [], []
    for i, run in enumerate(layout.mine):
        t = run.local
        keys, values, seen = (torch.cat([b[i], x[:, t]], 1) for b, x in zip(before, (k0, v, here), strict=True))
        visible = seen[..., 0, 0] > 0
        one, other = window_terms(q0[:, t], keys, values, layer.window_size, visible=visible, scores=layer.scores)
        near.append(one)
        total.append(other)
    wide = F.pad(v.float(), (0, 1), value=1.0)
    if real is not None:
        wide = wide.masked_fill(~real[..., None, None], 0)
    sums, _ = gated_linear_attention(
        q.float(), k.float(), wide, g, layout=layout, scale=layer.linear_scale, backend=layer.backend
    )
    return joined(layer, torch.cat(near, 1), torch.cat(total, 1), sums).to(k0.dtype)
