"""Masks of numbers that are added to scores, as transformers' models have them."""

from __future__ import annotations

import torch

from .. import _checks

HIDDEN = -1e3  # a number below this hides a key: the exponential of a score with it is 0


def shown(mask: torch.Tensor, hint: str = "") -> torch.Tensor:
    """bool, True where an additive mask is 0 and False where it is below -1000.

    Raises:
        ValueError: other numbers, which would be biases; in traced code a RuntimeError when it runs.
    """
    hidden = mask < HIDDEN
    only = ((mask == 0) | hidden).all()
    message = f"attention_mask: expected bool, or float of 0 and numbers below -1000, got other biases{hint}"
    if _checks.traced(mask):
        torch._assert_async(only, message)
    elif not bool(only):
        raise ValueError(message)
    return ~hidden
