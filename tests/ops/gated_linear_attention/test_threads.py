"""One long sequence on several threads, one row's states on several threads: the bits of one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import subquad
from subquad.testing import Sampler, assert_same_bits, backend_params
from subquad.testing.specs.gated_linear_attention import SPECS, draw, draw_step

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


def both_ways(sample: Any, backend: str) -> tuple[torch.Tensor, ...]:
    """Results and gradients."""
    leaves = {n: x.detach().clone().requires_grad_() for n, x in sample.args.items() if x is not None}
    outputs = SPECS[0].fn(**leaves, **sample.kwargs, backend=backend)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    grads = torch.autograd.grad(outputs, tuple(leaves.values()), upstream)
    return (*(y.detach() for y in outputs), *grads)


@backend_params(STEM, "native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "tokens", "heads", "dk", "dv", "options"),
    [
        ("channel", 700, (1, 1, 1, 1), 64, 64, {"normalize": True}),
        ("head", 700, (1, 1, 1, 1), 40, 35, {"gate": "head"}),
        ("no-gate", 515, (2, 1, 1, 1), 64, 128, {"gate": "none", "normalize": True}),
        ("shared", 515, (4, 2, 1, 2), 64, 48, {"normalize": True}),
        ("steep", 700, (1, 1, 1, 1), 64, 20, {"mean": 3.0, "normalize": True}),
        ("packed", 700, (1, 1, 1, 1), 64, 64, {"bounds": (0, 5, 5, 690, 700), "normalize": True}),
        ("short", 33, (1, 1, 1, 1), 128, 128, {}),
    ],
)
def test_one_long_sequence(
    backend: str, dtype: torch.dtype, name: str, tokens: int, heads: Any, dk: int, dv: int, options: dict[str, Any]
) -> None:
    sample = draw(Sampler(dtype), name, tokens, heads, dk, dv, batch=1, state=True, **options)
    assert_threads_agree(lambda: both_ways(sample, backend))


@backend_params(STEM, "native")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "qk"])
def test_what_is_not_moderate(backend: str, name: str, value: float) -> None:
    """Chunks that are halved, for queries alone or for what enters the state; and nothing reaches earlier tokens."""
    sample = draw(Sampler(), "nasty", 700, (1, 1, 1, 1), 64, 32, batch=1, normalize=True)
    changed = {n: sample[n].clone() for n in name}
    for n, x in changed.items():
        for t in (100, 417):  # in tokens that shares pass, and in those they answer
            # Not in the same token: chunks of keys that fit, among those that do not, with queries that do not.
            x[0, t + (6 if name == "qk" and n == "q" else 0), 0, 3] = -value if n == "g" else value
    clean = on_threads(1, lambda: SPECS[0].fn(**sample.args, **sample.kwargs, backend=backend))
    nasty = sample.replace(**changed)
    o, *_ = assert_threads_agree(lambda: SPECS[0].fn(**nasty.args, **nasty.kwargs, backend=backend))
    torch.testing.assert_close(o[:, :100], clean[0][:, :100])
    if name == "q":
        torch.testing.assert_close(o[:, 101:417], clean[0][:, 101:417])


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
