"""The functions of the package `causal-conv1d` (Dao), channels before time, on `subquad.causal_conv1d`."""

from __future__ import annotations

import torch

from .. import _checks
from ._mixed import convolve, update


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal depthwise convolution in [B, D, T], with gradients.

    Args:
        x: [B, D, T]; fastest when it is a transposed [B, T, D].
        weight: [D, W], W up to 8, of any float dtype: float32 beside a narrower x is not rounded. All is computed in the widest
            dtype then, and copied to it; gradients have each argument's own.
        bias: [D], likewise.
        seq_idx: integers [B, T]: taps do not reach across a change of the number, and a negative number gives 0. Excludes the
            states, and waits for the device.
        initial_states: [B, D, W-1].
        return_final_states: also return the last W-1 inputs [B, D, W-1].
        final_states_out: [B, D, W-1], where to write them.
        activation: None, "silu" or "swish".

    Returns:
        y [B, D, T], or (y, final states).

    Raises:
        TypeError, ValueError: as `subquad.causal_conv1d`; `seq_idx` together with states.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 3:
        raise ValueError(f"x: expected shape [B, D, T], got {list(x.shape)}")
    if final_states_out is not None:
        _checks.tensor("final_states_out", final_states_out)
        _checks.memory("final_states_out", final_states_out)
    rows = x.transpose(1, 2)
    if seq_idx is not None:
        if initial_states is not None or return_final_states:
            name = "initial_states" if initial_states is not None else "return_final_states"
            raise ValueError(
                f"{name}: expected none because seq_idx is given; use subquad.causal_conv1d with cu_seqlens"
            )
        _checks.integers("seq_idx", seq_idx)
        if seq_idx.shape != rows.shape[:2]:
            raise ValueError(f"seq_idx: expected shape {list(rows.shape[:2])}, got {list(seq_idx.shape)}")
        packed = rows.reshape(1, -1, x.shape[1])
        y, _ = convolve(packed, weight, bias, activation=activation, cu_seqlens=_bounds(seq_idx))
        y = y.view(rows.shape)
        y = torch.where((seq_idx < 0)[..., None], torch.zeros_like(y), y)
        return y.transpose(1, 2)
    y, final = convolve(
        rows,
        weight,
        bias,
        initial_state=initial_states,
        output_final_state=return_final_states or final_states_out is not None,
        activation=activation,
    )
    if final is not None and final_states_out is not None:
        if final_states_out.shape != final.shape:
            raise ValueError(
                f"final_states_out: expected shape {list(final.shape)}, got {list(final_states_out.shape)}"
            )
        final = final_states_out.copy_(final)
    return (y.transpose(1, 2), final) if return_final_states and final is not None else y.transpose(1, 2)


def _bounds(seq_idx: torch.Tensor) -> torch.Tensor:
    """cu_seqlens of the rows of the batch laid end to end: a sequence begins with a row and wherever the number changes."""
    begins = torch.ones_like(seq_idx, dtype=torch.bool)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_full((1,), seq_idx.numel())])


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decoding: the next outputs, and conv_state brought up to date in place, without a gradient.

    Args:
        x: [B, D] or [B, D, T].
        conv_state: [P, D, L], L >= W-1.
        weight, bias: [D, W], [D], of any float dtype. Where it is not x's, all states are copied there and back at every call.
        activation: None, "silu" or "swish".
        cache_seqlens: int32 [B]: conv_state is a ring.
        conv_state_indices: int32 [B]: the state of each row; -1 skips one.

    Returns:
        y of the shape of x.

    Raises:
        TypeError, ValueError: as `subquad.causal_conv1d_update`.
    """
    by_time = isinstance(x, torch.Tensor) and x.dim() == 3
    with torch.no_grad():
        y = update(
            x.transpose(1, 2) if by_time else x,
            conv_state,
            weight,
            bias,
            activation=activation,
            cache_seqlens=cache_seqlens,
            conv_state_indices=conv_state_indices,
        )
    return y.transpose(1, 2) if by_time else y


__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]
