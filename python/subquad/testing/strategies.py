"""Hypothesis strategies for what the ops have in common."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from .layouts import LAYOUTS
from .spec import OpSpec

# Blocks of kernels have such sizes; one less and one more is where masks go wrong.
_EDGES = tuple(n + d for n in (8, 16, 32, 64, 128, 256, 512) for d in (-1, 0, 1))


def extents(low: int, high: int) -> st.SearchStrategy[int]:
    """Sizes of a dimension, often next to a power of two."""
    edges = [n for n in _EDGES if low <= n <= high]
    anywhere = st.integers(low, high)
    return st.one_of(anywhere, st.sampled_from(edges)) if edges else anywhere


def dtypes(spec: OpSpec) -> st.SearchStrategy[torch.dtype]:
    """The dtypes that kernels of the op support."""
    return st.sampled_from(spec.dtypes)


def layouts(spec: OpSpec, name: str) -> st.SearchStrategy[str]:
    """The layouts in which the op takes the named argument."""
    refused = spec.refuses.get(name, ())
    return st.sampled_from(["contiguous", *(layout for layout in LAYOUTS if layout not in refused)])


def seeds() -> st.SearchStrategy[int]:
    """Seeds of random tensors."""
    return st.integers(0, 2**31 - 1)
