"""One row's states on several threads: the bits of one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import subquad
from subquad.testing import Sampler, assert_same_bits, backend_params
from subquad.testing.specs.gated_linear_attention import draw_step

THREADS = (2, 3, 7)
STEM = "gated_linear_attention"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def on_threads(count: int, call: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    torch.set_num_threads(count)
    return call()


def assert_threads_agree(call: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """The results on one thread, after those on more have been found to have the same bits."""
    expected = on_threads(1, call)
    for count in THREADS:
        for one, other in zip(expected, on_threads(count, call), strict=True):
            assert_same_bits(other, one)
    return expected


@backend_params(STEM, "native")
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("heads", "dk", "dv"), [((8, 4, 2, 2), 128, 128), ((3, 1, 1, 1), 256, 251), ((6, 1, 1, 1), 128, 8192 // 32)]
)
def test_one_row_of_states(backend: str, heads: Any, dk: int, dv: int, normalize: bool) -> None:
    sample = draw_step(Sampler(), "row", heads, dk, dv, batch=1, normalize=normalize)

    def step() -> tuple[torch.Tensor, ...]:
        state = sample["state"].clone()
        z = sample["z"].clone() if normalize else None
        q, k, v, g = (sample[n] for n in ("q", "k", "v", "g"))
        o = subquad.gated_linear_attention_step(q, k, v, g, state, z=z, backend=backend)
        skipped = subquad.gated_linear_attention_step(
            q, k, v, g, state, z=z, backend=backend, state_indices=torch.tensor([-1])
        )
        assert not bool(skipped.any())
        return (o, state) if z is None else (o, state, z)

    assert_threads_agree(step)
