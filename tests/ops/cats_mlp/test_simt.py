"""Cases that only the structure of the CUDA cats_mlp kernels makes special, run in the emulator."""

from __future__ import annotations

import ctypes

import pytest
import torch

from subquad import _native
from subquad.contract import HANDLES
from subquad.reference.cats_mlp import cats_mlp as reference

OPTIONS = (None, None, None, 0, False, False)


@pytest.fixture(scope="module")
def emulator() -> ctypes.CDLL:
    reason = _native.load("_C_simt", build=True)
    assert reason is None, reason
    library = ctypes.CDLL(str(_native.loaded()["_C_simt"]))
    library.subquad_simt_set_seed.argtypes = [ctypes.c_uint64]
    return library


def mlp(*tensors: torch.Tensor) -> torch.Tensor:
    return HANDLES["simt"]["cats_mlp_fwd"](*tensors, *OPTIONS)


def inputs(tokens: int, hidden: int, intermediate: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(hidden + intermediate)
    shapes = [(tokens, hidden), (intermediate, hidden), (intermediate, hidden), (intermediate, hidden)]
    x, gate, up, down = (torch.randn(shape, generator=generator) / shape[1] ** 0.5 for shape in shapes)
    return [t.to(dtype) for t in (x * hidden**0.5, gate, up, down)]


def shifted(tensor: torch.Tensor, pad: int) -> torch.Tensor:
    """The same values one element into a buffer, in rows `pad` elements longer: no 16-byte access is aligned."""
    rows, cols = tensor.shape
    buffer = torch.full((1 + rows * (cols + pad),), torch.nan, dtype=tensor.dtype)
    view = buffer.as_strided((rows, cols), (cols + pad, 1), 1)
    view.copy_(tensor)
    return view


def test_pieces_longer_than_a_warp(emulator: ctypes.CDLL) -> None:
    # 32 splits of 8 warps cut 9000 neurons into pieces of 36: a warp looks at its neurons in two batches.
    x, gate, up, down = inputs(2, 3, 9000, torch.float32)
    threshold = torch.tensor([0.1])
    want = reference(*(t.double() for t in (x, gate, up, down.T)), threshold.double())
    torch.testing.assert_close(mlp(x, gate, up, down.T, threshold).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("neuron_major", [True, False])
def test_layout_and_schedule_do_not_change_a_bit(emulator: ctypes.CDLL, dtype: torch.dtype, neuron_major: bool) -> None:
    x, gate, up, down = inputs(5, 64, 136, dtype)
    threshold = torch.tensor([0.1])
    place = (lambda t, pad: t.T) if neuron_major else (lambda t, pad: t.T.contiguous())
    emulator.subquad_simt_set_seed(1)
    want = mlp(x, gate, up, place(down, 0), threshold)
    emulator.subquad_simt_set_seed(2)
    assert torch.equal(mlp(x, gate, up, place(down, 0), threshold), want)
    unaligned = shifted(down, 3).T if neuron_major else shifted(down.T, 3)
    assert torch.equal(mlp(shifted(x, 0), shifted(gate, 1), shifted(up, 2), unaligned, threshold), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("neuron_major", [True, False])
def test_a_row_has_the_same_bits_in_any_batch(emulator: ctypes.CDLL, dtype: torch.dtype, neuron_major: bool) -> None:
    # 16, 5, 2 and 1 tokens run different instantiations: 16, 8, 2 and 1 accumulators per row.
    x, gate, up, down = inputs(16, 80, 136, dtype)
    w_down = down.T if neuron_major else down.T.contiguous()
    whole = mlp(x, gate, up, w_down, torch.tensor([0.1]))
    for rows in (slice(0, 1), slice(3, 5), slice(4, 7), slice(8, 13)):
        assert torch.equal(mlp(x[rows].clone(), gate, up, w_down, torch.tensor([0.1])), whole[rows])


@pytest.mark.parametrize("matrix", ["gate", "up", "down"])
def test_offsets_beyond_32_bits(emulator: ctypes.CDLL, matrix: str) -> None:
    x, gate, up, down = inputs(2, 24, 4, torch.bfloat16)
    threshold = torch.tensor([0.1])
    want = mlp(x, gate, up, down.T, threshold)
    weights = {"gate": gate, "up": up, "down": down}
    stride = 2**31 // 3 + 8  # the last of the four rows starts beyond element 2^31; only touched pages take memory
    view = torch.empty(3 * stride + 24, dtype=torch.bfloat16).as_strided((4, 24), (stride, 1))
    weights[matrix] = view.copy_(weights[matrix])
    assert torch.equal(mlp(x, weights["gate"], weights["up"], weights["down"].T, threshold), want)
