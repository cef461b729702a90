"""Rotary position embedding with exact phases, for rotating queries by whole numbers of positions."""

from __future__ import annotations

import math
from typing import Any

import torch


class RopeSpec:
    """Which rotation a position means (RoFormer, arXiv 2104.09864).

    Angles are computed in 64-bit fixed point: position times frequency modulo one turn is exact at any position, where a float32
    product is off by 0.02 radian at a million.

    Args:
        inv_freq: [rotary_dim / 2] radians per position, any float dtype.
        rotary_dim: even number of leading elements of a head that are rotated.
        interleaved: whether elements 2f and 2f + 1 form a pair, instead of f and f + rotary_dim / 2.
        attention_scaling: factor of queries and keys in models that have one (YaRN). Kept for their owner: `rotate` does not
            apply it, since it belongs to the first rotation, not to a correction.
        max_positions: positions these frequencies hold for, of models that have others beyond; None for any.

    Raises:
        TypeError: `inv_freq` is not a float tensor.
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        inv_freq: torch.Tensor,
        rotary_dim: int,
        *,
        interleaved: bool = False,
        attention_scaling: float = 1.0,
        max_positions: int | None = None,
    ) -> None:
        if not isinstance(inv_freq, torch.Tensor) or not inv_freq.is_floating_point():
            raise TypeError(
                f"inv_freq: expected a float tensor, got {getattr(inv_freq, 'dtype', type(inv_freq).__name__)}"
            )
        if rotary_dim < 2 or rotary_dim % 2 or inv_freq.shape != (rotary_dim // 2,):
            raise ValueError(
                f"inv_freq: expected shape [rotary_dim / 2] with an even rotary_dim, got {list(inv_freq.shape)} for {rotary_dim}"
            )
        self.inv_freq = inv_freq.detach()
        self.rotary_dim, self.interleaved, self.attention_scaling = rotary_dim, interleaved, float(attention_scaling)
        self.max_positions = max_positions
        turns = inv_freq.detach().double().cpu() / (2 * math.pi)
        # Split, for 2^64 times a float64 has more bits than a float64 converts to an integer exactly.
        high = torch.floor(turns * 2.0**32)
        low = torch.round((turns * 2.0**32 - high) * 2.0**32)
        self._step = (high.long() << 32) + low.long()  # turns per position, in units of 2^-64, modulo 2^64

    def turns(self, device: torch.device | str | None = None) -> torch.Tensor:
        """int64 [rotary_dim / 2]: turns per position in units of 2^-64, modulo one turn; times a position, it wraps."""
        if device is not None and self._step.device != torch.device(device):
            self._step = self._step.to(device)
        return self._step

    @classmethod
    def from_hf(cls, source: Any) -> RopeSpec:
        """From a transformers rotary module (anything with `inv_freq`), or a config with `rope_theta` or `rope_parameters`.

        Raises:
            ValueError: frequencies that depend on the length ("dynamic", "longrope"), of a config or a module: one rotation does
                not describe them. A config of another kind (YaRN): pass the model's rotary module then.
        """
        if getattr(source, "rope_type", None) in ("dynamic", "longrope"):
            raise ValueError(f"source: expected frequencies that do not depend on the length, got {source.rope_type!r}")
        if hasattr(source, "inv_freq"):
            return cls(
                source.inv_freq,
                2 * source.inv_freq.shape[0],
                attention_scaling=getattr(source, "attention_scaling", 1.0),
            )
        parameters = getattr(source, "rope_parameters", None) or getattr(source, "rope_scaling", None) or {}
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        theta = parameters.get("rope_theta", getattr(source, "rope_theta", None))
        if theta is None:
            raise ValueError("source: expected a rotary module or a config with rope_theta, got neither")
        head_dim = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
        partial = parameters.get("partial_rotary_factor", getattr(source, "partial_rotary_factor", None))
        dim = int(head_dim * (1.0 if partial is None else partial))
        inv_freq = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        if kind == "linear":
            inv_freq = inv_freq / parameters["factor"]
        elif kind == "llama3":
            inv_freq = _llama3(inv_freq, parameters)
        elif kind != "default":
            raise ValueError(
                f"source: expected rope type default, linear or llama3, got {kind!r}; pass the rotary module"
            )
        return cls(inv_freq.float(), dim)

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x with its first `rotary_dim` elements rotated by `positions`; differentiable in x.

        Args:
            x: [..., D], any float dtype; computed in float32 (float64 in float64).
            positions: integers that broadcast to x.shape[:-1], negative ones too.

        Raises:
            TypeError: positions that are not integers.
            ValueError: D below rotary_dim.
        """
        if positions.is_floating_point() or positions.dtype is torch.bool:
            raise TypeError(f"positions: expected integers, got {positions.dtype}")
        if x.shape[-1] < self.rotary_dim:
            raise ValueError(
                f"x: expected at least {self.rotary_dim} elements in the last dimension, got {x.shape[-1]}"
            )
        wide = torch.float64 if x.dtype is torch.float64 else torch.float32
        phase = positions.long()[..., None] * self.turns(x.device)  # wraps modulo one turn
        angle = (phase >> 11).double() * (2 * math.pi / 2.0**53)
        cos, sin = angle.cos().to(wide), angle.sin().to(wide)
        turned = x[..., : self.rotary_dim].to(wide)
        if self.interleaved:
            a, b = turned[..., ::2], turned[..., 1::2]
            rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        else:
            a, b = turned.chunk(2, -1)
            rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return torch.cat([rotated.to(x.dtype), x[..., self.rotary_dim :]], -1)


def _llama3(inv_freq: torch.Tensor, parameters: dict[str, Any]) -> torch.Tensor:
    """Llama 3.1's scaling: long waves are slowed by `factor`, short ones kept, those between interpolated."""
    factor, length = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = length * inv_freq / (2 * math.pi)  # within the original length
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * inv_freq / factor + smooth * inv_freq
