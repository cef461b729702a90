"""A mask on its way through the layers of a model, with what they may ask about it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .interval_mask import IntervalMask


class ModelMask(IntervalMask):
    """An `IntervalMask` that an integration made for all layers of a model, and says what it has put into it.

    Attributes:
        padded_causal: whether it is causal but for padding, a window and packed sequences: what linear attention can follow.
        padding: bool [B, Tk], False at keys that are padding; None: all are tokens, or it is not causal.
        sequence_ids: int [B|1, Tk], not decreasing: tokens of a row with different numbers belong to different sequences and do
            not see each other; None: each row is one sequence. Where values cannot be read, under torch.compile for example,
            it may be there with one number for a whole row. A layer that cannot keep sequences apart must refuse it.
        sliding_window: keys up to a row's own that the window in it leaves; -1: there is none in it.
        first_row: which key stands where the first query does; None: the mask is final, no layer may narrow it.
    """

    ndim = 4  # transformers' `generate` asks for the rank, and for a contiguous copy, as of a tensor
    padded_causal: bool = False
    padding: torch.Tensor | None = None
    sequence_ids: torch.Tensor | None = None
    sliding_window: int = -1
    first_row: int | torch.Tensor | None = None
    # Of tokens that lie on several ranks: what computes softmax attention of them, and a LAWCAT layer.
    attend: Callable[..., torch.Tensor] | None = None
    mix: Callable[..., torch.Tensor] | None = None

    @classmethod
    def of(
        cls,
        mask: IntervalMask,
        *,
        padded_causal: bool = False,
        padding: torch.Tensor | None = None,
        sequence_ids: torch.Tensor | None = None,
        sliding_window: int = -1,
        first_row: int | torch.Tensor | None = None,
    ) -> ModelMask:
        """The same mask, with these attributes."""
        result = cls.__new__(cls)
        result.__dict__.update(mask.__dict__)
        result.padded_causal, result.padding, result.sequence_ids = padded_causal, padding, sequence_ids
        result.sliding_window, result.first_row = sliding_window, first_row
        return result

    def contiguous(self) -> ModelMask:
        return self
