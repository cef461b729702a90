"""Rotary position embedding with exact phases, for rotating queries by whole numbers of positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from . import _checks


class RopeSpec:
    """Which rotation a position means (RoFormer, arXiv 2104.09864).

    Angles are computed in 64-bit fixed point: position times frequency modulo one turn is exact at any position, where a float32
    product is off by 0.02 radian at a million.

    Args:
        inv_freq: [rotary_dim / 2] radians per position, any float dtype.
        rotary_dim: even number of leading elements of a head that are rotated.
        interleaved: whether elements 2f and 2f + 1 form a pair, instead of f and f + rotary_dim / 2.
        attention_scaling: factor of queries and keys in models that have one (YaRN). Kept for their owner: `rotate` applies it
            where it is given as `factor`, since it belongs to the first rotation, not to a correction.
        max_positions: positions these frequencies hold for, of models that have others beyond; None for any.
        axes: of tokens with several positions each, such as frame, line and column of a video: how many of the frequencies, in
            their order, belong to each. `FrameSinkCache` takes such rotations; what counts tokens refuses them.

    Raises:
        TypeError: wrong type of an argument; `inv_freq` is not a float tensor.
        ValueError: sizes that do not fit, numbers that are not finite.
    """

    def __init__(
        self,
        inv_freq: torch.Tensor,
        rotary_dim: int,
        *,
        interleaved: bool = False,
        attention_scaling: float = 1.0,
        max_positions: int | None = None,
        axes: Sequence[int] | None = None,
    ) -> None:
        if not isinstance(inv_freq, torch.Tensor) or not inv_freq.is_floating_point():
            raise TypeError(
                f"inv_freq: expected a float tensor, got {getattr(inv_freq, 'dtype', type(inv_freq).__name__)}"
            )
        _checks.size("rotary_dim", rotary_dim)
        _checks.flag("interleaved", interleaved)
        _checks.number("attention_scaling", attention_scaling)
        if max_positions is not None:
            _checks.size("max_positions", max_positions, 1)
        if rotary_dim < 2 or rotary_dim % 2 or inv_freq.shape != (rotary_dim // 2,):
            raise ValueError(
                f"inv_freq: expected shape [rotary_dim / 2] with an even rotary_dim, got {list(inv_freq.shape)} for {rotary_dim}"
            )
        self.inv_freq = inv_freq.detach()
        self.rotary_dim, self.interleaved, self.attention_scaling = rotary_dim, interleaved, float(attention_scaling)
        self.max_positions = max_positions
        self.axes = None if axes is None else tuple(axes)
        for pairs in self.axes or ():
            _checks.size("axes", pairs)
        if self.axes is not None and sum(self.axes) != rotary_dim // 2:
            raise ValueError(f"axes: expected {rotary_dim // 2} frequencies in all, got {list(self.axes)}")
        turns = inv_freq.detach().double().cpu() / (2 * math.pi)
        if not turns.isfinite().all():
            raise ValueError(f"inv_freq: expected finite numbers, got {inv_freq.tolist()}")
        # Split, for 2^64 times a float64 has more bits than a float64 converts to an integer exactly.
        high = torch.floor(turns * 2.0**32)
        low = torch.round((turns * 2.0**32 - high) * 2.0**32)
        self._step = (high.long() << 32) + low.long()  # turns per position, in units of 2^-64, modulo 2^64

    def turns(self, device: torch.device | str | None = None) -> torch.Tensor:
        """int64 [rotary_dim / 2]: turns per position in units of 2^-64, modulo one turn; times a position, it wraps."""
        if device is not None and self._step.device != torch.device(device):
            moved = self._step.to(device)
            if moved.is_meta:  # where there are no numbers to keep
                return moved
            self._step = moved
        return self._step

    def same_as(self, other: RopeSpec) -> bool:
        """Whether both are the same rotation. Waits for a GPU."""
        kinds = ((x.interleaved, x.attention_scaling, x.axes) for x in (self, other))
        return len(set(kinds)) == 1 and torch.equal(self._step.cpu(), other._step.cpu())

    def __repr__(self) -> str:
        more = ", interleaved=True" if self.interleaved else ""
        more += f", attention_scaling={self.attention_scaling:g}" if self.attention_scaling != 1.0 else ""
        more += "" if self.axes is None else f", axes={self.axes}"
        return f"RopeSpec(rotary_dim={self.rotary_dim}{more})"

    @classmethod
    def from_hf(cls, source: Any, max_positions: int | None = None) -> RopeSpec:
        """From a transformers rotary module (anything with `inv_freq`), or a config with `rope_theta` or `rope_parameters`.

        Configs may be of type default, linear, llama3, yarn and ntk, the theta of which is raised by factor ** (d / (d - 2)).

        Args:
            source: the module or the config.
            max_positions: positions that will be needed, which makes "dynamic" and "longrope" possible: up to the original length
                of the model their frequencies do not change. A `SinkKVCache` with positions="cache" needs sink_tokens + window.

        Raises:
            ValueError: frequencies that depend on the length ("dynamic", "longrope"), of a config or a module: one rotation does
                not describe them beyond the original length. A config of another kind: pass the model's rotary module then.
        """
        if getattr(source, "rope_type", None) in _CHANGING and max_positions is not None and hasattr(source, "config"):
            source = source.config
        if getattr(source, "rope_type", None) in _CHANGING:
            raise ValueError(_depends(source.rope_type))
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
        if kind == "ntk":
            theta = theta * parameters["factor"] ** (dim / (dim - 2))
        waves = theta ** (torch.arange(0, dim, 2).float() / dim)  # positions per radian; in float32, as in the models
        inv_freq = 1.0 / waves
        scaling, limit = 1.0, None
        if kind == "linear":
            inv_freq = inv_freq / parameters["factor"]
        elif kind == "llama3":
            inv_freq = _llama3(inv_freq, parameters)
        elif kind == "yarn":
            inv_freq, scaling = _yarn(waves, theta, _Lengths(source, parameters), parameters)
        elif kind in _CHANGING:
            lengths = _Lengths(source, parameters)
            limit = lengths.longest if kind == "dynamic" else lengths.original
            if max_positions is None or max_positions > limit:
                raise ValueError(f"{_depends(kind)}; they do not up to max_positions={limit}")
            if kind == "longrope":
                inv_freq = 1.0 / (torch.tensor(parameters["short_factor"], dtype=torch.float32) * waves)
                scaling = parameters.get("attention_factor") or lengths.longrope_scaling(parameters.get("factor"))
        elif kind not in ("default", "ntk"):
            raise ValueError(
                f"source: expected rope type default, linear, llama3, yarn or ntk, got {kind!r}; pass the rotary module"
            )
        return cls(inv_freq, dim, attention_scaling=scaling, max_positions=limit)

    def cos_sin(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the angles at `positions`, of exact phases.

        Args:
            positions: integers [...], negative ones too; with `axes` [..., len(axes)].

        Returns:
            (cos, sin), float64 [..., rotary_dim / 2] on the device of the positions.

        Raises:
            TypeError: positions that are not integers.
            ValueError: another number of positions than `axes` has.
        """
        if not isinstance(positions, torch.Tensor):
            raise TypeError(f"positions: expected a torch.Tensor, got {type(positions).__name__}")
        if positions.is_floating_point() or positions.dtype is torch.bool:
            raise TypeError(f"positions: expected integers, got {positions.dtype}")
        each = positions.long()[..., None]
        if self.axes is not None:
            if positions.dim() < 1 or positions.shape[-1] != len(self.axes):
                expected = f"[..., {len(self.axes)}], one of each axis"
                raise ValueError(f"positions: expected shape {expected}, got {list(positions.shape)}")
            pairs = (n.expand(*n.shape[:-1], count) for n, count in zip(each.unbind(-2), self.axes, strict=True))
            each = torch.cat(list(pairs), -1)
        phase = each * self.turns(positions.device)  # wraps modulo one turn
        angle = (phase >> 11).double() * (2 * math.pi / 2.0**53)
        return angle.cos(), angle.sin()

    def rotate(self, x: torch.Tensor, positions: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        """x with its first `rotary_dim` elements rotated by `positions`; differentiable in x.

        Args:
            x: [..., D], any float dtype; computed in float32 (float64 in float64).
            positions: integers that broadcast to x.shape[:-1], negative ones too; with `axes` to [*x.shape[:-1], len(axes)].
            factor: of the rotated elements.

        Raises:
            TypeError: positions that are not integers.
            ValueError: D below rotary_dim; another number of positions than `axes` has.
        """
        return self.turned(x, self.cos_sin(positions), factor)

    def turned(self, x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor], factor: float = 1.0) -> torch.Tensor:
        """`rotate` by cosines and sines as `cos_sin` returns them."""
        _checks.tensor("x", x)
        cos, sin = cos_sin
        if x.shape[-1] < self.rotary_dim:
            raise ValueError(
                f"x: expected at least {self.rotary_dim} elements in the last dimension, got {x.shape[-1]}"
            )
        wide = torch.float64 if x.dtype is torch.float64 else torch.float32
        cos, sin = cos.to(wide), sin.to(wide)
        turned = x[..., : self.rotary_dim].to(wide)
        if factor != 1.0:
            turned = turned * factor
        if self.interleaved:
            a, b = turned[..., ::2], turned[..., 1::2]
            rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        else:
            a, b = turned.chunk(2, -1)
            rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return torch.cat([rotated.to(x.dtype), x[..., self.rotary_dim :]], -1)


def check_rope(name: str, value: object) -> None:
    """`value` is a `RopeSpec` of one position for each token, or None."""
    if value is None:
        return
    if not isinstance(value, RopeSpec):
        raise TypeError(f"{name}: expected a subquad.RopeSpec or None, got {type(value).__name__}")
    if value.axes is not None:
        raise ValueError(f"{name}: expected a rotation by the number of a token, got one with axes={value.axes}")


_CHANGING = ("dynamic", "longrope")


def _depends(kind: str) -> str:
    return f"source: expected frequencies that do not depend on the length, got {kind!r}"


class _Lengths:
    """Of a config: the longest sequence, and the longest one before the rotation was scaled."""

    def __init__(self, config: Any, parameters: dict[str, Any]) -> None:
        self.longest = config.max_position_embeddings
        own = getattr(config, "original_max_position_embeddings", None)
        self.original = parameters.get("original_max_position_embeddings") or own or self.longest

    def longrope_scaling(self, factor: float | None) -> float:
        """LongRoPE (arXiv 2402.13753)."""
        factor = self.longest / self.original if factor is None else factor
        return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(self.original))


def _llama3(inv_freq: torch.Tensor, parameters: dict[str, Any]) -> torch.Tensor:
    """Llama 3.1's scaling: long waves are slowed by `factor`, short ones kept, those between interpolated."""
    factor, length = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = length * inv_freq / (2 * math.pi)  # within the original length
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * inv_freq / factor + smooth * inv_freq


def _yarn(
    waves: torch.Tensor, theta: float, lengths: _Lengths, parameters: dict[str, Any]
) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv 2309.00071): frequencies between those of few and of many turns within the original length are mixed by a
    ramp over their index, and queries and keys are scaled."""
    factor = parameters.get("factor") or lengths.longest / lengths.original
    pairs = waves.shape[0]

    def index_of(turns: float) -> float:
        """Of the frequency that makes so many turns."""
        return pairs * math.log(lengths.original / (turns * 2 * math.pi)) / math.log(theta)

    low, high = index_of(parameters.get("beta_fast") or 32), index_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    kept = 1 - ((torch.arange(pairs).float() - low) / (high - low if high != low else 0.001)).clamp(0.0, 1.0)

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    scaling, one, all_dims = (parameters.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if scaling is None:
        scaling = magnitude(one) / magnitude(all_dims) if one and all_dims else magnitude(1.0)
    return 1.0 / (factor * waves) * (1 - kept) + 1.0 / waves * kept, scaling
