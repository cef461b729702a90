"""What is computed from a tensor that the layers of a model are all given, and kept for the next layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from . import _checks

T = TypeVar("T")


class Derived:
    """One result for each tensor, kept while the tensor lives.

    It is made anew when the tensor has been written to, by its version counter, or when the key is another.
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
        state = (tensor._version, *key)
        kept = self._kept.get(tensor)
        if kept is None or not _same(kept[0], state):
            kept = (state, make())
            self._kept[tensor] = kept
        result: T = kept[1]
        return result


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return all(x is y or (isinstance(x, int) and x == y) for x, y in zip(a, b, strict=True))
