"""Bytes that the emulated CUDA kernels of cats_mlp move: dead neurons must cost no weight traffic."""

from __future__ import annotations

import ctypes

import pytest
import torch

from subquad.contract import HANDLES
from subquad.testing import instruments

HIDDEN, INTERMEDIATE = 512, 512
WEIGHT = HIDDEN * INTERMEDIATE * 4  # bytes of one fp32 matrix


def traffic(emulator: ctypes.CDLL, live: float, neuron_major: bool = True) -> tuple[float, float]:
    """Bytes loaded and stored by one call with this fraction of live neurons, in units of one weight matrix.

    The counter adds up what every lane asks for: a value that a warp shares counts 32 times, x once for every warp.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, HIDDEN, generator=generator)
    gate, up, down = (torch.randn(INTERMEDIATE, HIDDEN, generator=generator) for _ in range(3))
    order = torch.randperm(INTERMEDIATE, generator=generator)
    threshold = torch.full((INTERMEDIATE,), torch.inf)
    threshold[order[: round(live * INTERMEDIATE)]] = -1.0
    w_down = down.T if neuron_major else down.T.contiguous()
    arguments = (x, gate, up, w_down, threshold, None, None, None, 0, False, False)
    found = instruments.traffic(emulator, lambda: HANDLES["simt"]["cats_mlp_fwd"](*arguments))
    return found.loaded / WEIGHT, found.stored / WEIGHT


def test_dense_reads_each_weight_once(emulator: ctypes.CDLL) -> None:
    loaded, stored = traffic(emulator, live=1.0)
    # x adds a quarter to gate and up (a warp holds 4 rows), the shared hidden values a quarter to down.
    assert 3.0 <= loaded <= 3.0 * 1.25 + 0.25
    assert stored <= 0.05


def test_dead_neurons_cost_the_gate_only(emulator: ctypes.CDLL) -> None:
    loaded, stored = traffic(emulator, live=0.0)
    assert 1.0 <= loaded <= 1.25 + 0.15
    assert stored <= 0.05


@pytest.mark.parametrize("live", [0.1, 0.3, 0.5])
def test_up_and_down_traffic_follows_the_live_share(emulator: ctypes.CDLL, live: float) -> None:
    dense, _ = traffic(emulator, live=1.0)
    dead, _ = traffic(emulator, live=0.0)
    sparse, _ = traffic(emulator, live=live)
    rows = 2.0 * live  # up and down
    shared = 0.25 + 0.25 * live  # x once per warp of up, hidden values per live row of down
    assert rows <= sparse - dead <= rows + shared + 0.05
    assert sparse - dead < dense - dead


def test_row_major_down_is_read_whole(emulator: ctypes.CDLL) -> None:
    loaded, _ = traffic(emulator, live=0.3, neuron_major=False)
    fast, _ = traffic(emulator, live=0.3)
    assert loaded - fast >= 0.6
