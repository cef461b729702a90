"""C++ refuses the same arguments with the same words on the CPU and, as the emulator runs it, on CUDA."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from subquad.contract import HANDLES
from subquad.testing import backend_params

Bad = Callable[[], tuple[str, tuple[object, ...]]]


def glu(z: torch.dtype, u: torch.dtype) -> Bad:
    return lambda: ("cats_glu_fwd", (torch.ones(2, 4, dtype=z), torch.ones(2, 4, dtype=u), torch.ones(4), 0, False))


def walk(**given: torch.Tensor) -> Bad:
    """gated_linear_attention_fwd of 4 tokens, 2 heads of 8."""
    x = torch.ones(1, 4, 2, 8)
    names = ("g", "s0", "z0", "cu_seqlens")
    return lambda: ("gated_linear_attention_fwd", (x, x, x, *(given.get(n) for n in names), 1.0, 0.0, False))


def step(state: torch.Tensor, z: torch.Tensor | None = None, indices: torch.Tensor | None = None) -> Bad:
    x = torch.ones(3, 2, 8)
    return lambda: ("gated_linear_attention_step_", (x, x, x, None, state, z, indices, 1.0, 0.0))


def attend(**given: torch.Tensor) -> Bad:
    q, k = torch.ones(1, 4, 2, 1, 8), torch.ones(1, 4, 2, 8)
    mask = [given.get(n) for n in ("starts", "ends", "key_start", "key_stop")]
    rest = [given.get(n) for n in ("key_bias", "sink_logits", "alibi_slopes")]
    return lambda: ("interval_attention_fwd", (q, given.get("k", k), k, *mask, 0, -1, True, *rest, 1.0, 0.0, []))


BAD: dict[str, tuple[Bad, str]] = {
    "z beside a wider u": (glu(torch.bfloat16, torch.float32), "z: expected float32 or the dtype of u, float32, got bfloat16"),
    "z beside another u": (glu(torch.float16, torch.bfloat16), "z: expected float32 or the dtype of u, bfloat16, got float16"),
    "float64": (glu(torch.float64, torch.float64), ": expected float32, bfloat16 or float16, got float64"),
    "state of the right size": (walk(s0=torch.ones(1, 2, 64)), "initial_state: expected shape [1, 2, 8, 8], got [1, 2, 64]"),
    "bounds in two dimensions": (
        walk(cu_seqlens=torch.tensor([[0], [4]])), "cu_seqlens: expected 1 dimensions, got 2",
    ),
    "gate in another dtype": (
        walk(g=torch.ones(1, 4, 2, dtype=torch.float16)), "g: expected float32 or the dtype of q, float32, got float16",
    ),
    "normaliser of the right size": (
        step(torch.ones(3, 2, 8, 8), torch.ones(3, 16)), "z: expected shape [3, 2, 8], got [3, 16]",
    ),
    "indices in two dimensions": (
        step(torch.ones(3, 2, 8, 8), indices=torch.zeros(3, 1, dtype=torch.int64)),
        "state_indices: expected shape [3], got [3, 1]",
    ),
    "states without indices": (step(torch.ones(4, 2, 8, 8)), "state: expected one per row of q, 3, got 4"),
    "ends alone": (
        attend(ends=torch.zeros(1, 1, 4, 1, dtype=torch.int32)), "ends: expected together with starts, got one of them",
    ),
    "bias in another dtype": (attend(key_bias=torch.ones(1, 1, 4).double()), "key_bias: expected float32, got float64"),
    "keys that are not contiguous": (
        attend(k=torch.ones(1, 4, 8, 2).transpose(2, 3)), "k: expected a contiguous last dimension, got stride 2",
    ),
}  # fmt: skip


@backend_params("cats_mlp", "native", "simt")
@pytest.mark.parametrize("what", BAD)
def test_refused_with_the_same_words(what: str, backend: str) -> None:
    bad, message = BAD[what]
    name, arguments = bad()
    with pytest.raises(RuntimeError) as error:
        HANDLES[backend][name](*arguments)
    assert message in str(error.value)
