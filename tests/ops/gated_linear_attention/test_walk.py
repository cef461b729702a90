"""A forward without query heads: the tokens are walked for the states alone, as sequences over several processes need them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from subquad.contract import HANDLES
from subquad.contract.gated_linear_attention import CONTRACT
from subquad.reference.gated_linear_attention import gated_linear_attention as define
from subquad.testing import Sampler, assert_same_bits, backend_params
from subquad.testing.specs.gated_linear_attention import draw, samples

STEM, FORWARD = "gated_linear_attention", "gated_linear_attention_fwd"


def arguments(sample: Any, queries: bool) -> tuple[Any, ...]:
    """Of the raw forward operator, with the queries of the sample or without any."""
    q, *rest = (sample.args.get(n) for n in ("q", "k", "v", "g", "s0", "z0"))
    q = q if queries else q[:, :, :0]
    return (q, *rest, sample.kwargs.get("cu_seqlens"), 0.5, 1e-10, bool(sample.kwargs.get("normalize")))


def assert_the_states_of_a_forward(sample: Any, backend: str) -> None:
    """The same bits, in results of the shapes that the fake promises."""
    whole = HANDLES[backend][FORWARD](*arguments(sample, True))
    alone = HANDLES[backend][FORWARD](*arguments(sample, False))
    promised = CONTRACT.operators[FORWARD].fake(*arguments(sample, False))
    assert [x.shape for x in alone] == [x.shape for x in promised]
    assert alone[0].shape[2] == 0 < alone[0].shape[1]
    for one, other in zip(whole[2:], alone[2:], strict=True):
        assert_same_bits(other, one)


@pytest.mark.quick
@backend_params(STEM, "native", "simt", "triton")
def test_the_states_are_those_of_a_forward(backend: str, device: str) -> None:
    for sample in samples(Sampler(device=device, size="small")):
        assert_the_states_of_a_forward(sample, backend)


@pytest.mark.quick
@backend_params(STEM, "native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_chunks_whole_halved_and_left_over(backend: str, dtype: torch.dtype) -> None:
    for name, tokens, mean in (
        ("whole", 128, 0.1),
        ("left-over", 161, 0.1),
        ("one-more", 65, 0.1),
        ("steep", 150, 9.0),
    ):
        sample = draw(Sampler(dtype), name, tokens, (4, 2, 1, 2), 20, 36, mean=mean, state=True, normalize=True)
        assert_the_states_of_a_forward(sample, backend)
    bounds = (0, 0, 1, 66, 66, 130, 161)
    assert_the_states_of_a_forward(draw(Sampler(dtype), "packed", 161, (2, 2, 2, 2), 8, 8, bounds=bounds), backend)


@backend_params(STEM, "native")
def test_threads_change_no_bit(backend: str) -> None:
    sample = draw(Sampler(), "threads", 700, (6, 3, 3, 3), 64, 48, batch=1, normalize=True)
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            assert_the_states_of_a_forward(sample, backend)
    finally:
        torch.set_num_threads(before)


def test_the_definition_without_queries() -> None:
    for sample in samples(Sampler(size="small")):
        o, *states = define(*arguments(sample, False))
        assert o.shape[2] == 0
        for one, other in zip(define(*arguments(sample, True))[1:], states, strict=True):
            if one is not None and other is not None:
                assert_same_bits(other, one)


@backend_params(STEM, "native")
def test_gradients_need_queries(backend: str) -> None:
    sample = draw(Sampler(), "few", 4, (1, 1, 1, 1), 4, 4, batch=1)
    q, *rest = arguments(sample, False)
    grads = (torch.zeros(1, 4, 0, 4), torch.zeros(1, 1, 4, 4), None, torch.zeros(0, 4, 0))
    with pytest.raises(RuntimeError, match=r"q: expected shape \[1, 4, H, D\], got \[1, 4, 0, 4\]"):
        HANDLES[backend]["gated_linear_attention_bwd"](*grads, q, *rest)
