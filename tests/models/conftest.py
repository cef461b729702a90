"""Fixtures of tests of whole models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def ids() -> torch.Tensor:
    """Tokens of any tiny model [2, 9], none of them padding."""
    return torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(0))
