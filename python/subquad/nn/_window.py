"""The sliding window beside a linear attention layer: both branches share one denominator."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .._packing import Packed
from ..ops.gated_linear_attention import gated_linear_attention
from ._scores import LLAMA, Scores
from ._sequences import Sequences, Streams

if TYPE_CHECKING:
    from ..cache.lawcat import LawcatState
    from .lawcat import LawcatAttention


def window_terms(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    visible: torch.Tensor | None = None,
    sequence: torch.Tensor | None = None,
    scores: Scores = LLAMA,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""sum_i e_ti v_i and sum_i e_ti with e_ti = exp(l_ti - max_i l_ti) of scores l, over the last `window` keys.

    Unlike a softmax with its log-sum-exp, these sums can be added to those of linear attention (LAWCAT, arXiv 2509.18467;
    LoLCATs, arXiv 2410.10254). Gradients go through the maximum too. Time and memory O(T window).

    Args:
        q: rotated queries [B, T, HQ, d].
        k: rotated keys [B, P + T, HKV, d], where P keys of earlier tokens come first.
        v: values [B, P + T, HKV, V].
        window: keys that a query sees, its own included.
        visible: bool [B, P + T], False for keys that nobody sees; None: all exist.
        sequence: int [B, P + T], of which sequence a key is, which rows of others do not see; None: there is one.
        scores: how l comes from q k^T; d^-1/2 q k^T if not told.

    Returns:
        (numerators [B, T, HQ, V], denominators [B, T, HQ, 1]), float32.
    """
    b, t, heads, width = q.shape
    past = k.shape[1] - t
    blocks = max(-(-t // window), 1)  # one of no tokens, too
    fill = blocks * window - t
    groups = heads // k.shape[2]
    queries = F.pad(q.float(), (0, 0, 0, 0, 0, fill)).reshape(b, blocks, window, k.shape[2], groups, width)
    # Block i needs the keys of its own tokens and of the window - 1 before them; rows are shifted to have them all.
    lead = window - past
    keys, values = (F.pad(x.float(), (0, 0, 0, 0, max(lead, 0), fill))[:, max(-lead, 0) :] for x in (k, v))
    keys, values = (x.unfold(1, 2 * window, window) for x in (keys, values))  # [B, blocks, HKV, d, 2 window]
    logits = scores.of(torch.einsum("bnqhgd,bnhdk->bnhgqk", queries, keys), width)
    row = torch.arange(window, device=q.device)[:, None]
    column = torch.arange(2 * window, device=q.device)
    near = (column > row) & (column <= row + window)
    if visible is None:
        visible = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)

    def blocks_of(x: torch.Tensor, value: int = 0) -> torch.Tensor:
        """[B, P + T] as the keys' [B, blocks, 2 window]."""
        return F.pad(x, (max(lead, 0), fill), value=value)[:, max(-lead, 0) :].unfold(1, 2 * window, window)

    seen = near & blocks_of(visible)[:, :, None]
    if sequence is not None:
        own = F.pad(sequence[:, past:], (0, fill), value=-1).reshape(-1, blocks, window)
        seen = seen & (own[..., None] == blocks_of(sequence, -1)[:, :, None])
    seen = seen[:, :, None, None]
    logits = torch.where(seen, logits, -torch.inf)
    peak = logits.amax(-1, keepdim=True)
    weights = torch.where(seen, (logits - torch.where(peak.isfinite(), peak, 0)).exp(), 0)
    numerators = torch.einsum("bnhgqk,bnhdk->bnqhgd", weights, values)
    total = weights.sum(-1).permute(0, 1, 4, 2, 3)
    return (
        numerators.reshape(b, blocks * window, heads, v.shape[3])[:, :t],
        total.reshape(b, blocks * window, heads, 1)[:, :t],
    )


Late = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def delayed(
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    window: int,
    late: Late | None,
    packed: Packed | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Late]:
    r"""Keys and values that enter the state `window` tokens late, decayed by the gates they passed meanwhile.

    Linear attention of them and of `g` then sees the tokens before the window alone, each with the weight that it would have had.

    Args:
        k, v: features [B, T, HK, K] and values [B, T, HV, V].
        g: gates [B, T, HG, K] or [B, T, HG], where HG divides HK; or None.
        window: tokens of delay.
        late: the last `window` of k, v and g before these; None at the beginning of the sequences.
        packed: the bounds of sequences, where B = 1.

    Returns:
        (k, v of the delayed tokens, `late` for the next call).
    """
    t = k.shape[1]
    streams = Streams(window, t, packed)
    keys, values, gates = (
        None if x is None else streams.join(x, past)
        for x, past in zip((k, v, g), (None, None, None) if late is None else late, strict=True)
    )
    assert keys is not None and values is not None
    entering = streams.delayed(keys)
    if gates is not None:  # without tokens, too: gates of another rank get a gradient
        # Of the tokens after the entering one, to the current one.
        passed = gates[:, 1:].unfold(1, window, 1).sum(-1) if t else gates
        passed = streams.delayed(passed).repeat_interleave(k.shape[2] // passed.shape[2], 2).exp()
        entering = entering * (passed if passed.dim() == 4 else passed[..., None])
    rest = streams.tail(keys), streams.tail(values), None if gates is None else streams.tail(gates)
    return entering, streams.delayed(values), rest


def hybrid(
    layer: LawcatAttention,
    q0: torch.Tensor,
    k0: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    positions: tuple[torch.Tensor, torch.Tensor] | None,
    state: LawcatState | None,
    sequences: Sequences | None,
    entering: dict[str, torch.Tensor] | None,
) -> torch.Tensor:
    """Window and linear attention over one denominator; a column of ones in v gives the linear one's."""
    q0, k0 = rotated(layer, q0, k0, positions)
    if entering is not None:
        entering |= {"window_k": k0, "window_v": v}
    near, near_sum = _near(layer, q0, k0, v, state, None if sequences is None else sequences.packed)
    initial = None if state is None else state.s
    k, v = k.float(), F.pad(v.float(), (0, 1), value=1.0)
    if not layer.linear_covers_window:
        if entering is not None:
            entering |= {"late_k": k, "late_v": v} | ({} if g is None else {"late_g": g})
        late = None if state is None else state.late
        k, v, rest = delayed(k, v, g, layer.window_size, late, None if sequences is None else sequences.sums)
        if state is not None:
            state.late_k, state.late_v, state.late_g = rest
    if entering is not None:
        entering |= {"k": k, "v": v} | ({} if g is None else {"g": g})
    wide, final = gated_linear_attention(
        q.float(), k, v, g, initial_state=initial, output_final_state=state is not None,
        cu_seqlens=None if sequences is None else sequences.sums, scale=layer.linear_scale, backend=layer.backend,
    )  # fmt: skip
    if state is not None:
        assert isinstance(final, torch.Tensor)
        state.s = final
    return joined(layer, near, near_sum, wide).to(k0.dtype).flatten(2)


def rotated(
    layer: LawcatAttention, q: torch.Tensor, k: torch.Tensor, positions: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [B, T, H, d] of the window, which sees positions also where linear attention sees none."""
    if layer.rope != "none":
        return q, k
    return layer.scores.rotate(q, positions), layer.scores.rotate(k, positions)


def joined(layer: LawcatAttention, near: torch.Tensor, near_sum: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    """The window's terms and the sums of linear attention [B, T, HQ, V + 1], its denominator last, as one mean."""
    assert layer.window_factor is not None
    # One for every row: the two terms of its gradient nearly cancel, and do so row by row before rows are added.
    factor = layer.window_factor.float().sigmoid()[:, None].expand_as(near_sum)
    rest_of = 1 - factor if layer.affine_window else 1.0
    far, far_sum = wide[..., :-1], wide[..., -1:]
    return (factor * near + rest_of * far) / (factor * near_sum + rest_of * far_sum + layer.eps)


def _near(
    layer: LawcatAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: LawcatState | None,
    packed: Packed | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The window's terms. The state keeps window_size - 1 rows of each sequence, invisible where it has none yet."""
    terms = partial(window_terms, window=layer.window_size, scores=layer.scores)
    visible = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
    if state is None:
        sequence = None if packed is None else packed.sequence[None]
        return terms(q, k, v, visible=visible, sequence=sequence)
    streams = Streams(layer.window_size - 1, k.shape[1], packed)
    keys, values, visible = (
        streams.join(x, past) for x, past in ((k, state.window_k), (v, state.window_v), (visible, state.window_visible))
    )
    state.window_k, state.window_v, state.window_visible = (streams.tail(x) for x in (keys, values, visible))
    if packed is None:
        return terms(q, keys, values, visible=visible)
    y, total = terms(streams.join(q, None), keys, values, visible=visible, sequence=streams.sequences())
    return streams.tokens(y), streams.tokens(total)
