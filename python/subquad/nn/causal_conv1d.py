"""`ShortConvolution`: the short causal convolution of linear-attention layers."""

from __future__ import annotations

import torch
from torch import nn

from .. import _checks
from .._backends import BACKENDS
from .._packing import Packed
from ..ops.causal_conv1d import ACTIVATIONS, MAX_TAPS, causal_conv1d, causal_conv1d_update

INITS = ("default", "identity")
_IDENTITY_REST = 0.001


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over time, optionally with silu (LAWCAT, arXiv 2509.18467).

    Parameters have the names and shapes of flash-linear-attention's module (and of `nn.Conv1d(groups=D)`): `weight` [D, 1, W]
    and `bias` [D].

    Args:
        hidden_size: D, the number of output channels.
        kernel_size: W, the taps, 1 to 8.
        bias: whether there is one; starts at 0 with "identity".
        activation: None, "silu" or "swish".
        channel_groups: G heads of outputs read one head of inputs, see `subquad.causal_conv1d`.
        head_dim: width of a head; needed when G > 1.
        init: "default" as `nn.Conv1d`, or "identity", LAWCAT's: 1 for the current token, 0.001 for the others.
        device, dtype: of the parameters.
        backend: as in `subquad.causal_conv1d`.

    Raises:
        TypeError, ValueError: sizes or options that do not fit.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        kernel_size: int = 4,
        bias: bool = False,
        activation: str | None = None,
        channel_groups: int = 1,
        head_dim: int | None = None,
        *,
        init: str = "default",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _checks.choice("init", init, INITS)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected None, 'silu' or 'swish', got {activation!r}")
        if not 1 <= kernel_size <= MAX_TAPS:
            raise ValueError(f"kernel_size: expected 1 to {MAX_TAPS}, got {kernel_size}")
        if channel_groups < 1 or hidden_size % channel_groups:
            raise ValueError(f"channel_groups: expected a divisor of hidden_size {hidden_size}, got {channel_groups}")
        if channel_groups > 1 and (head_dim is None or head_dim < 1 or hidden_size % (channel_groups * head_dim)):
            expected = f"a width with hidden_size {hidden_size} = {channel_groups} * heads * head_dim"
            raise ValueError(f"head_dim: expected {expected}, got {head_dim}")
        if backend is not None:
            _checks.choice("backend", backend, BACKENDS)
        self.hidden_size, self.kernel_size, self.activation = hidden_size, kernel_size, activation
        self.channel_groups, self.head_dim, self.init, self.backend = channel_groups, head_dim, init, backend
        self.weight = nn.Parameter(torch.empty((hidden_size, 1, kernel_size), device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters again, as `init` says."""
        if self.init == "identity":
            self.weight.fill_(_IDENTITY_REST)
            self.weight[..., -1] = 1.0
            if self.bias is not None:
                self.bias.zero_()
            return
        bound = self.kernel_size**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def new_state(self, batch: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The state [batch, D / G, W-1] of sequences that have not begun: zeros."""
        shape = (batch, self.hidden_size // self.channel_groups, self.kernel_size - 1)
        return self.weight.new_zeros(shape, dtype=dtype)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        cache: torch.Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: torch.Tensor | Packed | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Convolve whole sequences, or go on from `cache`.

        Args:
            x: [B, T, D / G].
            residual: [B, T, D], added to the result.
            mask: [B, T], 0 at padding, whose input then counts as 0 whatever it holds.
            cache: the state to go on from, [N, D / G, W-1] (or of width W, flash-linear-attention's). It is brought up to date in
                place, unless gradients flow: then a new one is returned.
            output_final_state: also return the state, which a `cache` implies.
            cu_seqlens: bounds of packed sequences, see `subquad.causal_conv1d`.

        Returns:
            (y [B, T, D], state or None).
        """
        if mask is not None:
            if mask.shape != x.shape[:2]:
                raise ValueError(f"mask: expected shape {list(x.shape[:2])}, got {list(mask.shape)}")
            if cu_seqlens is not None:
                raise ValueError("mask: expected None because cu_seqlens is given, got a tensor")
            x = torch.where(mask.bool()[..., None], x, torch.zeros_like(x))
        weight, bias = self.weight, self.bias
        tensors = (x, weight, bias, residual, cache)
        differentiable = torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in tensors)
        shared = {"activation": self.activation, "channel_groups": self.channel_groups, "head_dim": self.head_dim}
        if cache is not None and not differentiable and x.dim() == 3 and x.shape[1] == 1 and cu_seqlens is None:
            y = causal_conv1d_update(
                x,
                cache,
                weight,
                bias,
                residual=residual,
                backend=self.backend,
                **shared,  # type: ignore[arg-type]
            )
            return y, cache
        y, state = causal_conv1d(
            x, weight, bias, initial_state=cache, output_final_state=output_final_state or cache is not None,
            residual=residual, cu_seqlens=cu_seqlens, backend=self.backend, **shared,  # type: ignore[arg-type]
        )  # fmt: skip
        if cache is None or state is None:
            return y, state
        if cache.shape[2] > state.shape[2]:
            state = torch.cat([self._before(x, cache, cu_seqlens), state], 2)
        return y, state if differentiable else cache.copy_(state)

    def _before(self, x: torch.Tensor, cache: torch.Tensor, cu_seqlens: torch.Tensor | Packed | None) -> torch.Tensor:
        """The column in front of the state, the input W tokens back, which flash-linear-attention keeps and never reads."""
        if cu_seqlens is not None:
            return torch.zeros_like(cache[:, :, :1])
        return torch.cat([cache, x.transpose(1, 2).to(cache.dtype)], 2)[:, :, x.shape[1] :][:, :, :1]

    def extra_repr(self) -> str:
        groups = "" if self.channel_groups == 1 else f", channel_groups={self.channel_groups}, head_dim={self.head_dim}"
        return (
            f"{self.hidden_size}, kernel_size={self.kernel_size}, bias={self.bias is not None}, "
            f"activation={self.activation!r}{groups}, backend={self.backend!r}"
        )
