"""Cases that only the structure of the CUDA kernels makes special, run in the emulator."""

from __future__ import annotations

import ctypes

import pytest
import torch

from subquad.contract import HANDLES
from subquad.reference.quantised_linear import FORMATS
from subquad.testing.spec import Sample, Sampler
from subquad.testing.specs.quantised_cats_mlp import BIASES, WEIGHTS, draw, formats_of, oracle

ALL = pytest.mark.parametrize("format", FORMATS)
SHARED = pytest.mark.parametrize("shared", [False, True], ids=["rows", "shared"])


def mlp(sample: Sample, **changed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    args = {**sample.args, "w_down": sample["w_down"].contiguous(), **changed}
    threshold = torch.as_tensor(sample.kwargs["threshold"]).reshape(-1)
    codes = [tuple(FORMATS).index(format) for format in formats_of(sample)]
    tensors = [args["x"], *(args[name] for name in WEIGHTS), threshold, *(args[name] for name in BIASES)]
    return HANDLES["simt"]["quantised_cats_mlp_fwd"](*tensors, *codes, 0, False, False)


def shifted(tensor: torch.Tensor, by: int) -> torch.Tensor:
    """The same values `by` elements into a buffer."""
    buffer = torch.empty(tensor.numel() + by, dtype=tensor.dtype)
    return buffer[by:].view(tensor.shape).copy_(tensor)


@ALL
@SHARED
def test_schedule_and_alignment_do_not_change_a_bit(emulator: ctypes.CDLL, format: str, shared: bool) -> None:
    sample = draw(Sampler(), "places", 3, 128, 96, format=format, shared=shared, bias=True)
    emulator.subquad_simt_set_seed(1)
    y, mask = mlp(sample)
    assert 0 < mask.float().mean() < 1
    emulator.subquad_simt_set_seed(2)
    for by in (0, 1, 2):
        moved = {name: shifted(sample[name], by) for name in ("x", *WEIGHTS) if sample.args[name] is not None}
        again, same = mlp(sample, **moved)
        assert torch.equal(again, y) and torch.equal(same, mask)


@ALL
@SHARED
def test_a_row_has_the_same_bits_in_any_batch(emulator: ctypes.CDLL, format: str, shared: bool) -> None:
    """16, 5, 3 and 1 tokens run different instantiations, with other columns to a lane of the down projection."""
    sample = draw(Sampler(), "batch", 16, 160, 96, format=format, shared=shared)
    y, mask = mlp(sample)
    for rows in (slice(0, 1), slice(4, 7), slice(8, 13)):
        alone, own = mlp(sample, x=sample["x"][rows].clone())
        assert torch.equal(alone, y[rows]) and torch.equal(own, mask[rows])


@ALL
def test_pieces_that_begin_within_a_block_of_scales(emulator: ctypes.CDLL, format: str) -> None:
    """32 splits of 8 warps cut 9,024 neurons into pieces of 36, of which 32 share scales."""
    sample = draw(Sampler(), "pieces", 2, 32, 9024, format=format, shared=True)
    wide = sample.to(torch.float64, ("x",))
    y, _ = mlp(sample)
    torch.testing.assert_close(y.double(), oracle(**wide.args, **wide.kwargs), rtol=1e-5, atol=1e-5)


def test_a_layer_without_channels_has_a_mask(emulator: ctypes.CDLL) -> None:
    """Only the operator sees one; the gate of its biases decides."""
    sample = draw(Sampler(), "no-channels", 2, 0, 32, threshold=0.1, bias=True)
    bias = torch.linspace(-1, 1, 32)
    y, mask = mlp(sample, b_gate=bias)
    assert y.shape == (2, 0)
    assert torch.equal(mask, (torch.nn.functional.silu(bias).abs() > 0.1).expand(2, 32))
