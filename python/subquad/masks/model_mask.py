"""A mask on its way through the layers of a model, with what they may ask about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .interval_mask import IntervalMask


class ModelMask(IntervalMask):
    """An `IntervalMask` that an integration made for all layers of a model, and says what it has put into it.

    Attributes:
        padded_causal: whether it is causal but for padding, a window and packed sequences: what linear attention can follow.
        autoregressive: whether no token sees one behind it, blocks of tokens that see each other apart.
        chunked: whether there are chunks in it, counted from where each row begins.
        padding: bool [B, Tk], False at keys that are padding; None: all are tokens, or the mask is final.
        sequence_ids: int [B|1, Tk], not decreasing: tokens of a row with different numbers belong to different sequences and do
            not see each other; None: each row is one sequence. Where values cannot be read, under torch.compile for example,
            it may be there with one number for a whole row. A layer that cannot keep sequences apart must refuse it.
        sliding_window: keys up to a row's own that the window in it leaves; -1: there is none in it.
        first_row: which key stands where the first query does; None: the mask is final, no layer may narrow it.
    """

    ndim = 4  # transformers' `generate` asks for the rank, and for a contiguous copy, as of a tensor
    padded_causal: bool = False
    autoregressive: bool = False
    chunked: bool = False
    padding: torch.Tensor | None = None
    sequence_ids: torch.Tensor | None = None
    sliding_window: int = -1
    first_row: int | torch.Tensor | None = None
    # Of tokens that lie on several ranks: what computes softmax attention of them, and a LAWCAT layer.
    attend: Callable[..., torch.Tensor] | None = None
    mix: Callable[..., torch.Tensor] | None = None

    @classmethod
    def of(cls, mask: IntervalMask, **attributes: Any) -> ModelMask:
        """The same mask, with these attributes."""
        result = cls.__new__(cls)
        result.__dict__.update(mask.__dict__)
        result.__dict__.update(attributes)
        return result

    def to(self, device: torch.device | str) -> ModelMask:
        """With what it says about itself, on another device."""
        own = {name: value for name, value in vars(self).items() if name in ModelMask.__annotations__}
        moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in own.items()}
        return ModelMask.of(super().to(device), **moved)

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        # Of models that compute their attention themselves, which take it for a tensor. Operators of Python hide a TypeError.
        raise ValueError("attention_mask: this model does not use the attention interface of transformers; use 'eager'")

    def contiguous(self) -> ModelMask:
        return self
