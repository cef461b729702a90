"""Weights in few bits, kept as buffers of bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Codes(nn.Module):
    """Base of modules with uint8 buffers: moved but never cast, and never filled with dense weights.

    Two modules with the same buffer keep sharing it where they would keep sharing a parameter.
    """

    weight: torch.Tensor
    format: str

    def to_dense(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The dense module that computes the same, with what the codes stand for as its weight.

        Raises:
            TypeError: dtype is no floating one.
        """
        raise NotImplementedError

    def _codes(self) -> dict[str, torch.Tensor]:
        return {name: b for name, b in self._buffers.items() if b is not None and b.dtype == torch.uint8}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Torch's own casts leave integers alone, others are refused."""
        before = self._codes()
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            assert new is not None
            if new.dtype != torch.uint8:
                self._buffers.update(before)
                raise TypeError(f"{name}: expected uint8 codes, got a cast to {new.dtype}; use to_dense(dtype)")
            if new is not old and torch._has_compatible_shallow_copy_type(old, new):
                old.data = new  # in place, as torch moves parameters
                self._buffers[name] = old
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in self._codes():
            value = state_dict.get(prefix + name)
            if value is not None and value.dtype != torch.uint8:
                error_msgs.append(
                    f"{prefix}{name}: expected uint8 codes of format {self.format!r}, got {value.dtype} {list(value.shape)}; "
                    "load a dense checkpoint into the dense model and quantise that"
                )
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
