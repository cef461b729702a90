"""A LAWCAT layer on shards: halos for its convolutions and its window, one exchange of states."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .._packing import Packed
from ..nn._children import plain
from ..nn._window import Late, delayed, joined, rotated, window_terms
from ..nn.causal_conv1d import ShortConvolution
from ..nn.feature_map import LearnedFeatureMap
from ..nn.lawcat import LawcatAttention
from ..ops.causal_conv1d import causal_conv1d
from ..ops.conv_feature_map import conv_feature_map
from .exchange import first_seen, halos
from .gated_linear_attention import gated_linear_attention
from .layout import SequenceLayout


def lawcat(
    layer: LawcatAttention,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
    layout: SequenceLayout,
    real: torch.Tensor | None = None,
) -> torch.Tensor:
    """`layer.mix` of this rank's tokens, [B, T of this rank, HQ d].

    Two messages forward, two backward: raw queries and keys before each run, and states; a window adds one for its keys
    and, where the linear branch sees only what is before it, for what waits to enter the state.

    Args:
        layer: one whose convolutions and feature maps are the package's own.
        hidden_states: [B, T of this rank, hidden_size].
        position_embeddings: (cos, sin) of this rank's tokens, or None.
        layout: where the tokens are.
        real: bool [B, T of this rank], False at padding, which stands before or behind all tokens of a row.

    Raises:
        ValueError: a layer with parts that are no longer the package's own.
    """
    _check(layer)
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


def _check(layer: LawcatAttention) -> None:
    for name, kind in (
        ("conv_q", ShortConvolution), ("conv_k", ShortConvolution), ("conv_v", ShortConvolution),
        ("feature_map", LearnedFeatureMap), ("feature_map_k", LearnedFeatureMap),
    ):  # fmt: skip
        child = getattr(layer, name)
        if child is not None and (not plain(child, kind) or getattr(child, "skip_connection", False)):
            raise ValueError(
                f"{name}: expected a plain {kind.__name__} under context_parallel, got {type(child).__name__}"
            )


def _pieces(layout: SequenceLayout, device: torch.device) -> list[Packed | None]:
    """The bounds of sequences within each of this rank's runs."""
    if not layout.packed:
        return [None] * len(layout.mine)
    return [Packed(torch.tensor(run.cuts, device=device), run.cuts[-1]) for run in layout.mine]


def _first(x: torch.Tensor, pieces: Packed | None) -> torch.Tensor:
    """What enters a run [B, ...], of every piece of it: the sequences that begin here have nothing before them."""
    return x if pieces is None else F.pad(x, (0, 0) * (x.dim() - 1) + (0, pieces.sequences - 1))


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
    longest = max(conv.kernel_size for _, conv, _ in parts) - 1
    found, pieces = [], _pieces(layout, v.device)
    for (x, conv, phi), before in zip(parts, halos(layout, longest, *(x for x, _, _ in parts)), strict=True):
        rows = zip(layout.mine, before, pieces, strict=True)
        outputs = [_of_run(layer, x[:, run.local], conv, phi, past, inside) for run, past, inside in rows]
        found.append(torch.cat(outputs, 1))
    return found[0], found[1], found[2] if layer.conv_v is not None else v


def _of_run(
    layer: LawcatAttention,
    x: torch.Tensor,
    conv: ShortConvolution,
    phi: Any,
    before: torch.Tensor,
    pieces: Packed | None,
) -> torch.Tensor:
    """Convolution and, with `phi`, features of x [B, T, H, d], behind the rows `before` it, of which there may be too many."""
    past = before[:, before.shape[1] + 1 - conv.kernel_size :].flatten(2).transpose(1, 2)
    past = _first(past, pieces)
    if phi is None:
        y, _ = causal_conv1d(
            x.flatten(2), conv.weight, conv.bias, initial_state=past, activation=conv.activation, cu_seqlens=pieces,
            channel_groups=conv.channel_groups, head_dim=conv.head_dim, backend=layer.backend,
        )  # fmt: skip
        return y.unflatten(-1, (-1, layer.head_dim))
    return conv_feature_map(
        x, conv.weight, phi.layer, conv.bias, initial_state=past, activation=conv.activation, cu_seqlens=pieces,
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
    """Window and linear attention over one denominator; a column of ones in v gives the linear one's.

    Where the linear branch sees only what is before the window, its keys enter late, those of other ranks too: these come as
    they are before the convolution, which are fewer numbers than their features, and with the gates that decay them.
    """
    window, late = layer.window_size, not layer.linear_covers_window
    queries, keys = rotated(layer, q0, k0, positions)
    sent = {"keys": keys, "v": v}
    if late:
        sent |= ({} if keys is k0 else {"k0": k0}) | ({} if g is None else {"g": g})
    if real is not None:
        sent["real"] = real.to(v.dtype)[..., None, None]
    past = window + layer.conv_k.kernel_size - 1 if late else window - 1
    before = dict(zip(sent, halos(layout, past, *sent.values()), strict=True))
    wide = F.pad(v.float(), (0, 1), value=1.0)
    if real is not None:
        wide = wide.masked_fill(~real[..., None, None], 0)
    k = k.float()
    near, total, entering = [], [], []
    for i, (run, pieces) in enumerate(zip(layout.mine, _pieces(layout, v.device), strict=True)):
        t, came = run.local, {name: x[i] for name, x in before.items()}
        own = torch.ones_like(v[:, t, 0, 0], dtype=torch.bool) if real is None else real[:, t]
        there = torch.arange(past, device=v.device) >= past - run.low + first_seen(layout, run, past)
        seen = there.expand(v.shape[0], -1) if real is None else came["real"][..., 0, 0] > 0
        sequence = None if pieces is None else F.pad(pieces.sequence, (past, 0))[None]  # what came is of the first
        one, other = window_terms(
            queries[:, t], torch.cat([came["keys"], keys[:, t]], 1), torch.cat([came["v"], v[:, t]], 1), window,
            visible=torch.cat([seen, own], 1), sequence=sequence, scores=layer.scores,
        )  # fmt: skip
        near.append(one)
        total.append(other)
        if late:
            waiting = _waiting(layer, came, seen, pieces)
            gates = None if g is None else g[:, t]
            entering.append(delayed(k[:, t], wide[:, t], gates, window, waiting, pieces)[:2])
    if late:
        k, wide = (torch.cat(parts, 1) for parts in zip(*entering, strict=True))
    sums, _ = gated_linear_attention(
        q.float(), k, wide, g, layout=layout, scale=layer.linear_scale, backend=layer.backend
    )
    return joined(layer, torch.cat(near, 1), torch.cat(total, 1), sums).to(k0.dtype)


def _waiting(layer: LawcatAttention, came: dict[str, torch.Tensor], seen: torch.Tensor, pieces: Packed | None) -> Late:
    """What of the rows before a run has not entered the state yet: features, values and gates of a window of tokens."""
    taps, window = layer.conv_k.kernel_size, layer.window_size
    raw = came.get("k0", came["keys"])
    features = _of_run(layer, raw[:, taps - 1 :], layer.conv_k, layer._key_map(), raw[:, : taps - 1], None)
    gone = ~seen[:, -window:, None, None]  # features of nothing are not nothing
    rows = [features.float().masked_fill(gone, 0), F.pad(came["v"][:, -window:].float(), (0, 1), value=1.0)]
    k, v = (_first(x, pieces) for x in rows)
    return k, v, _first(came["g"][:, -window:], pieces) if "g" in came else None
