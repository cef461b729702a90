"""Cases that only the structure of the Triton kernels makes special."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import subquad
from subquad.testing import Sampler, Task, backend_params
from subquad.testing.checks import CHECKS
from subquad.testing.specs.gated_linear_attention import SPEC, draw


def far_apart(x: torch.Tensor) -> torch.Tensor:
    """x with its heads, the last of which begins beyond element 2^31; only touched pages take memory."""
    _, t, heads, d = x.shape
    stride = 2**31 // (heads - 1) + 16
    memory = torch.empty((heads - 1) * stride + t * d, dtype=x.dtype)
    return memory.as_strided(x.shape, (t * d, d, stride, 1)).copy_(x)


@backend_params("gated_linear_attention", "triton")
def test_offsets_beyond_32_bits(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    torch.use_deterministic_algorithms(False)  # poisoning would touch it

    # The interpreter copies whole storages to the host and back; these are on the host, and too large to copy.
    monkeypatch.setattr(GridExecutor, "_init_args_hst", lambda self, args, kwargs: (args, kwargs))
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
    q, k, v = (Sampler(torch.bfloat16, seed=i).normal(1, 5, 3, 16) for i in range(3))
    for shared in (False, True):  # three states, and one that three heads of queries read
        tensors = (q, k[:, :, :1], v[:, :, :1]) if shared else (q, k, v)
        results = []
        for which in (tensors, [x if x.shape[2] == 1 else far_apart(x) for x in tensors]):
            leaves = [x.detach().requires_grad_() for x in which]
            out, _ = subquad.gated_linear_attention(*leaves, backend=backend)
            results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@pytest.mark.quick
@backend_params("gated_linear_attention", "triton")
def test_one_gate_for_several_blocks_of_channels(backend: str) -> None:
    """Every block of key channels has a part of its gradient."""
    sample = draw(Sampler(), "head-wide", 5, (2, 2, 2, 2), 70, 8, gate="head")
    Task(dataclasses.replace(SPEC, samples=lambda _: [sample]), CHECKS["gradients"], backend, torch.float32).run()
