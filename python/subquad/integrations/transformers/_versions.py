"""The two generations of transformers' caches: 4.57, and 5, which renamed and reversed some of what layers are asked for."""

from __future__ import annotations

from typing import Any

import torch

from ..._derived import Derived

try:
    import transformers
    from transformers.cache_utils import Cache as Cache
    from transformers.cache_utils import CacheLayerMixin
    from transformers.cache_utils import DynamicCache as DynamicCache
    from transformers.cache_utils import DynamicLayer as DynamicLayer

    OLD = transformers.__version__.startswith("4.57.")
    if not OLD:
        from transformers.cache_utils import LinearAttentionCacheLayerMixin
except ImportError as error:
    raise ImportError(
        f"subquad: a state in a transformers cache needs transformers 4.57, or 5 with caches for linear attention: {error}"
    ) from error

_ASKED = Derived()  # of what all layers of a model are told: the device is asked once

if OLD:

    class LayerBase(CacheLayerMixin):
        """A layer that transformers' caches take."""

        columns: int | None

        def get_max_cache_shape(self) -> int:
            return -1 if self.columns is None else self.columns

        @property
        def max_cache_len(self) -> int:
            """With `max_batch_size`, what `generate` asks before it uses a preallocated cache once more."""
            return self.get_max_cache_shape()

        @property
        def max_batch_size(self) -> int:
            return next((x.shape[0] for x in self.state.tensors().values()), -1)  # type: ignore[attr-defined]

else:

    class LayerBase(LinearAttentionCacheLayerMixin, CacheLayerMixin):  # type: ignore[misc, no-redef, override]
        """A layer that transformers' caches take, which shows the states of linear attention."""


def grows_compiled(records_past: bool) -> bool:
    """Whether `generate` may compile steps with a layer that is not preallocated: where it compiles, nothing is taken back, and
    4.57 does not say beforehand that something will be."""
    return not OLD and not records_past


def queries(told: Any) -> Any:
    """How many queries a mask is for: 4.57 tells their positions [T]."""
    return told.shape[0] if isinstance(told, torch.Tensor) and told.dim() else told


def removed(told: int, seen: int | torch.Tensor) -> int:
    """How many tokens `crop` removes: minus that number, or from 4.57 also how many stay.

    Raises:
        ValueError: a positive number, where that means nothing.
    """
    if told < 0 or (told == 0 and not OLD):
        return -int(told)
    if OLD:
        return max(int(seen) - int(told), 0)
    raise ValueError(f"tokens_to_remove: expected minus the number of tokens, got {told}")


class Counting:
    """Whether the positions of new tokens count on, as those of rows without padding do.

    5 tells a cache positions; 4.57 tells it the cosines and sines of most models. There each column has to be the one before,
    turned on by as much as the second one of the first call was: frequencies need not be known for that.
    """

    def __init__(self) -> None:
        self.turn: torch.Tensor | None = None

    def goes_on(self, told: dict[str, Any], seen: int) -> bool:
        """For tokens after `seen` ones.

        Raises:
            ValueError: 4.57 does not tell.
        """
        positions, cos, sin = (told.get(name) for name in ("position_ids", "cos", "sin"))
        if isinstance(positions, torch.Tensor):
            return _ASKED.get(positions, (seen,), lambda: _counted(positions, seen))
        if isinstance(cos, torch.Tensor) and isinstance(sin, torch.Tensor) and cos.dim() == 3:
            return _ASKED.get(cos, (seen, self), lambda: self._turned(cos, sin, seen))
        if not OLD:
            return True
        raise ValueError(
            "past_key_values: expected a model that tells its cache how it rotates, for a SinkCache with transformers 4.57: "
            "padding cannot be seen otherwise; convert the model (attention='sink'), or allow_approx=True"
        )

    def _turned(self, cos: torch.Tensor, sin: torch.Tensor, seen: int) -> bool:
        z = torch.complex(cos.double(), sin.double())
        turns = z[:, 1:] * z[:, :-1].conj() / z[:, :1].abs().square()
        if cos.shape[1] > 1 and (self.turn is None or not seen):
            self.turn = turns[0, 0]
        rounding = 8 * torch.finfo(cos.dtype).eps + 2.0**-21 * (seen + cos.shape[1])
        alike = bool(((z - z[:1]).abs() <= rounding).all()) and (seen > 0 or not bool(sin[:, 0].any()))
        return alike and (self.turn is None or bool(((turns - self.turn).abs() <= rounding).all()))


def _counted(positions: torch.Tensor, seen: int) -> bool:
    want = torch.arange(seen, seen + positions.shape[-1], device=positions.device)
    return positions.dim() == 2 and bool((positions == want).all())
