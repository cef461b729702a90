"""What is computed from a tensor that the layers of a model are all given, and kept for the next layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from . import _checks

T = TypeVar("T")
_ITSELF = object()
_KEPT = 4  # results of one tensor: a model has layers of a few kinds, in turn


class Derived:
    """A few results for each tensor, kept while the tensor lives, which they must not refer to.

    They are made anew when the tensor has been written to, by its version counter, or when the key is another.
    """

    def __init__(self) -> None:
        self._kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def get(self, tensor: torch.Tensor, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """The result kept for `tensor`, or what `make` returns. Nothing is kept of traced tensors and of those without a counter.

        Args:
            tensor: what the result is computed from.
            key: numbers and objects that it depends on as well; of objects, tensors included, that they are the same.
            make: computes it.
        """
        if _checks.traced(tensor) or tensor.is_inference():
            return make()
        # A reference to the tensor would keep it alive; what is made in inference mode is of no use outside.
        key = (torch.is_inference_mode_enabled(), *(_ITSELF if part is tensor else part for part in key))
        version, kept = self._kept.get(tensor, (None, []))
        kept = kept if version == tensor._version else []
        for known, result in kept:
            if _same(known, key):
                return result
        made = make()
        self._kept[tensor] = (tensor._version, [(key, made), *kept[: _KEPT - 1]])
        return made


def versioned(*parts: Any) -> tuple[Any, ...] | None:
    """A key for `get` of these, tensors together with their counters; None where one is traced or has none."""
    key: list[Any] = []
    for part in parts:
        if isinstance(part, torch.Tensor):
            if _checks.traced(part) or part.is_inference():
                return None
            key.append(part._version)
        key.append(part)
    return tuple(key)


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return len(a) == len(b) and all(
        x is y or (type(x) is type(y) and isinstance(x, int) and x == y) for x, y in zip(a, b, strict=True)
    )
