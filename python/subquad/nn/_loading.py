"""Modules that look at their buffers in a state dict before they take any of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn


class Checked(nn.Module):
    """Base of modules that take nothing of a state dict in which one of their buffers cannot be right."""

    _optional: ClassVar[tuple[str, ...]] = ()  # buffers that a state dict may lack

    def _problem(self, given: Mapping[str, torch.Tensor]) -> str | None:
        """What is wrong with the buffers of a state dict, by name, which has not all of them; None: nothing."""
        raise NotImplementedError

    def _load(self, given: Mapping[str, torch.Tensor], load: Callable[[], None]) -> None:
        """Load them; `load` copies where shapes are those of the module."""
        load()

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
        given = {name: state_dict[prefix + name] for name in self._buffers if state_dict.get(prefix + name) is not None}
        problem = self._problem(given)
        if problem is not None:
            error_msgs.append(f"{prefix}{problem}")
            return
        load = super()._load_from_state_dict
        self._load(
            given,
            lambda: load(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs),
        )
        lacking = {prefix + name for name in self._optional}
        missing_keys[:] = [name for name in missing_keys if name not in lacking]
