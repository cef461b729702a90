"""A rotation by frame, line and column, as caches of tokens follow it: by the token's number, which moves, and by its place."""

from __future__ import annotations

import torch

from .. import _checks
from ..rope import RopeSpec, check_rope


class FrameRotation:
    """Splits a `RopeSpec` of three axes for frames of lines * columns = F tokens.

    Token n = frame * F + place has the phases frame * w of time and line * w, column * w of space. Turned by n * w / F, where a
    cache puts it, it lacks -place * w / F in time and all of space: the same in every frame. Moving by whole frames, which
    is all that a video's cache does, then turns time alone.

    Attributes:
        whole, grid: as given; (lines, columns).
        rope: the rotation by numbers of tokens; that of space is by no angle.
    """

    def __init__(self, rope: RopeSpec, grid: tuple[int, int], device: torch.device | None) -> None:
        assert rope.axes is not None
        lines, columns = grid
        frame, temporal = lines * columns, torch.arange(rope.rotary_dim // 2) < rope.axes[0]
        per_token = torch.where(temporal.to(rope.inv_freq.device), rope.inv_freq.double() / frame, 0.0)
        limit = None if rope.max_positions is None else rope.max_positions * frame
        self.whole, self.grid = rope, grid
        self.rope = RopeSpec(
            per_token, rope.rotary_dim, interleaved=rope.interleaved, attention_scaling=rope.attention_scaling,
            max_positions=limit,
        )  # fmt: skip
        place = torch.arange(frame, device=device)
        space = rope.cos_sin(torch.stack([torch.zeros_like(place), place // columns, place % columns], -1))
        parts = zip(self.rope.cos_sin(-place), space, strict=True)
        cos, sin = (torch.where(temporal.to(place.device), back, own) for back, own in parts)
        self._cos, self._sin = cos[:, None], sin[:, None]  # [F, 1, rotary_dim / 2]

    def placed(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, H, D] of whole frames turned by what is the same in every frame; what has another shape is left to others."""
        frame = self._cos.shape[0]
        if x.dim() != 4 or x.shape[1] % frame or x.shape[3] < self.rope.rotary_dim:
            return x
        return self.rope.turned(x.unflatten(1, (-1, frame)), (self._cos, self._sin)).flatten(1, 2)


def frame_rotation(
    rope: RopeSpec | None, grid: tuple[int, int] | None, frame_tokens: int, device: torch.device | None
) -> FrameRotation | None:
    """What `FrameSinkCache` needs beside a rotation by numbers of tokens; None where it is one.

    Raises:
        TypeError: wrong type of an argument.
        ValueError: axes without a grid or the other way round, others than three, a grid of another number of tokens.
    """
    if not isinstance(rope, RopeSpec) or rope.axes is None:
        check_rope("rope", rope)
        if grid is not None:
            raise ValueError(f"grid: expected None without a rope with axes, got {grid}")
        return None
    if len(rope.axes) != 3:
        raise ValueError(f"rope: expected axes of frame, line and column, got axes={rope.axes}")
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise ValueError(f"grid: expected (lines, columns) beside a rope with axes, got {grid!r}")
    for size in grid:
        _checks.size("grid", size, 1)
    if grid[0] * grid[1] != frame_tokens:
        raise ValueError(f"grid: expected lines times columns to be the {frame_tokens} tokens of a frame, got {grid}")
    return FrameRotation(rope, (grid[0], grid[1]), device)
