"""Gated linear attention: the generic tests, and what is true of it alone."""

from __future__ import annotations

import functools
import subprocess
import sys
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import subquad
from subquad.testing import Sampler, Task, assert_close, assert_same_bits, backend_params, generic_tests
from subquad.testing.specs.gated_linear_attention import SPECS, chunked, draw, oracle

EXAMPLES = {"native": 30, "simt": 8, "triton": 5, "reference": 2}
KERNELS = ("native", "simt", "triton")
GRADS = ("q", "k", "v", "g", "s0", "z0")


@generic_tests(*SPECS)
def test_generic(task: Task, device: str) -> None:
    task.run(device)


def compute(sample: Any, backend: str | None, wide: bool = False) -> dict[str, torch.Tensor]:
    """Results and gradients by name; `wide` gives those of the oracle in float64."""
    leaves = {
        n: x.detach().to(torch.float64 if wide else x.dtype).requires_grad_()
        for n, x in sample.args.items()
        if x is not None
    }
    outputs = oracle(**leaves, **sample.kwargs) if wide else SPECS[0].fn(**leaves, **sample.kwargs, backend=backend)
    generator = torch.Generator().manual_seed(5)
    upstream = [torch.randn(y.shape, generator=generator).to(y.dtype).to(y.device) for y in outputs]
    grads = torch.autograd.grad(outputs, tuple(leaves.values()), upstream)
    results = dict(zip(("o", "s", "z"), outputs, strict=False))
    return {n: x.detach() for n, x in results.items()} | {f"d{n}": x for n, x in zip(leaves, grads, strict=True)}


def agree(sample: Any, backend: str, tolerance: float = 3e-5) -> None:
    found, expected = compute(sample, backend), compute(sample, None, wide=True)
    largest = max(float(x.norm()) for x in expected.values())
    for name, value in found.items():
        what = expected[name]
        # Where one token outweighs all others the true gradients vanish: there the error is absolute.
        error = float((value.double() - what).norm())
        assert error <= tolerance * (float(what.norm()) + 0.1 * largest), f"{sample.id}: {name}: error {error:.2e}"


@backend_params("gated_linear_attention", *KERNELS)
def test_random_problems(backend: str, device: str) -> None:
    @settings(max_examples=EXAMPLES[backend], deadline=None, derandomize=True)
    @given(
        tokens=st.integers(1, 70),
        groups=st.sampled_from([(4, 4, 2, 2), (4, 2, 2, 2), (4, 1, 1, 1), (2, 2, 2, 2), (4, 2, 4, 1), (8, 1, 1, 1)]),
        dk=st.integers(1, 40),
        dv=st.integers(1, 40),
        gate=st.sampled_from(["channel", "head", "none"]),
        mean=st.sampled_from([0.0, 0.01, 0.5, 5.0, 60.0]),
        normalize=st.booleans(),
        state=st.booleans(),
    )
    def run(tokens: int, groups: Any, dk: int, dv: int, gate: str, mean: float, normalize: bool, state: bool) -> None:
        dk = max(dk, 4) if normalize else dk  # or a single feature cancels, and its true gradient is 0
        sampler = Sampler(device=device, seed=tokens)
        sample = draw(
            sampler, "random", tokens, groups, dk, dv, gate=gate, mean=mean, batch=1, normalize=normalize, state=state
        )
        agree(sample, backend)

    run()


@backend_params("gated_linear_attention", *KERNELS)
@pytest.mark.parametrize("gate", ["channel", "head"])
@pytest.mark.parametrize("value", [0.0, -60.0, -1e4, -torch.inf])
@pytest.mark.parametrize("everywhere", [False, True])
def test_extreme_gates(backend: str, device: str, gate: str, value: float, everywhere: bool) -> None:
    sample = draw(
        Sampler(device=device), "gates", 37, (2, 2, 1, 1), 8, 6, gate=gate, batch=1, normalize=True, state=True
    )
    g = sample["g"].clone()
    if everywhere:
        g.fill_(value)
    elif gate == "channel":
        g[:, 17, :, 3] = value
    else:
        g[:, 17] = value
    agree(sample.replace(g=g), backend)


@backend_params("gated_linear_attention", *KERNELS)
def test_decay_just_below_and_above_the_fast_range(backend: str, device: str) -> None:
    for total in (39.0, 41.0, 79.0, 81.0, 200.0):
        sample = draw(Sampler(device=device), "range", 64, (1, 1, 1, 1), 8, 6, batch=1, normalize=True, state=True)
        g = torch.full_like(sample["g"], -total / 31)
        g[..., ::2] = 0.0
        agree(sample.replace(g=g), backend)


@backend_params("gated_linear_attention", *KERNELS)
def test_alternating_gates(backend: str, device: str) -> None:
    sample = draw(Sampler(device=device), "alternate", 40, (1, 1, 1, 1), 8, 6, batch=1, normalize=True)
    g = torch.zeros_like(sample["g"])
    g[:, 1::2] = -30.0
    agree(sample.replace(g=g), backend)


@backend_params("gated_linear_attention", *KERNELS)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nothing_reaches_earlier_tokens(backend: str, device: str, name: str) -> None:
    sample = draw(Sampler(device=device), "nan", 40, (2, 2, 2, 2), 8, 6, batch=2, normalize=True, final=False)
    (clean,) = SPECS[0].fn(**sample.args, **sample.kwargs, backend=backend)
    for value in (torch.nan, torch.inf, 1e30):
        x = sample[name].clone()
        x[1, 21] = value
        (o,) = SPECS[0].fn(**sample.replace(**{name: x}).args, **sample.kwargs, backend=backend)
        assert_same_bits(o[0], clean[0])
        assert_close(o[1, :21].double(), clean[1, :21].double(), 1e-6)


@backend_params("gated_linear_attention", *KERNELS)
def test_nan_gradient_stays_at_and_before_its_token(backend: str, device: str) -> None:
    sample = draw(Sampler(device=device), "nan", 40, (2, 2, 2, 2), 8, 6, batch=1)
    leaves = {n: sample[n].clone().requires_grad_() for n in ("q", "k", "v", "g")}
    o = SPECS[0].fn(**leaves, backend=backend)[0]
    upstream = torch.ones_like(o)
    upstream[:, 21] = torch.nan
    dq, dk, dv, dg = torch.autograd.grad(o, tuple(leaves.values()), upstream)
    assert bool(dq[:, 21].isnan().all()) and bool(dq[:, :21].isfinite().all()) and bool(dq[:, 22:].isfinite().all())
    for grad in (dk, dv, dg):
        assert bool(grad[:, 22:].isfinite().all())
    assert bool(dk[:, 21].isnan().all())


@backend_params("gated_linear_attention", "triton")
def test_launches(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Normalised, one gate per channel: two kernels forward, four backward."""
    module = import_module("subquad.kernels.gated_linear_attention")
    launched: list[str] = []

    class Counted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            launched.append(self.name)
            return self.kernel[grid]

    for name in [n for n in vars(module) if n.endswith("_kernel")]:
        monkeypatch.setattr(module, name, Counted(name, getattr(module, name)))
    sample = draw(Sampler(torch.bfloat16, device), "launches", 5, (2, 2, 2, 2), 8, 8, batch=1, normalize=True)
    leaves = {n: sample[n].clone().requires_grad_() for n in ("q", "k", "v", "g")}
    o = SPECS[0].fn(**leaves, **sample.kwargs, backend=backend)[0]
    assert launched == ["chunk_fwd_state_kernel", "chunk_fwd_out_kernel"]
    o.sum().backward()
    assert launched[2:] == [
        "chunk_fwd_state_kernel",
        "chunk_bwd_den_kernel",
        "chunk_bwd_state_kernel",
        "chunk_bwd_dqkv_kernel",
    ]


@backend_params("gated_linear_attention", *KERNELS)
def test_saturated_features(backend: str, device: str) -> None:
    """One-hot queries and keys on different channels: the denominator is far below eps, the result goes to zero."""
    q, k = torch.zeros(1, 8, 1, 4, device=device), torch.zeros(1, 8, 1, 4, device=device)
    q[..., 0], k[..., 1] = 1.0, 1.0
    v = torch.ones(1, 8, 1, 4, device=device)
    leaves = [x.clamp_min(1e-12).requires_grad_() for x in (q, k, v)]
    o, _ = subquad.gated_linear_attention(*leaves, normalize=True, backend=backend)
    grads = torch.autograd.grad(o.sum(), leaves)
    assert all(bool(x.isfinite().all()) for x in (o, *grads))
    expected, _ = subquad.gated_linear_attention(*(x.double() for x in leaves), normalize=True, backend="reference")
    assert_close(o.double(), expected, 1e-5)


@backend_params("gated_linear_attention", *KERNELS)
def test_scale_of_keys_does_not_matter_without_eps(backend: str, device: str) -> None:
    sample = draw(
        Sampler(device=device), "scale", 33, (1, 1, 1, 1), 8, 6, batch=1, normalize=True, eps=0.0, final=False
    )
    (one,) = SPECS[0].fn(**sample.args, **sample.kwargs, backend=backend)
    (two,) = SPECS[0].fn(**sample.replace(k=sample["k"] * 64).args, **sample.kwargs, backend=backend)
    assert_close(two.double(), one.double(), 1e-6)


@pytest.mark.quick
@backend_params("gated_linear_attention", *KERNELS)
def test_eps_is_part_of_the_denominator(backend: str, device: str) -> None:
    """One as large as the sums, in sequences and steps; and none at all, where a skipped row is 0 nevertheless."""
    new = functools.partial(draw, Sampler(device=device), heads=(2, 1, 1, 1), dk=8, dv=6, normalize=True)
    agree(new("eps", 19, batch=1, state=True, eps=2.0), backend)
    sample = new("step", 1, batch=2, state=True, eps=2.0)
    wide = {n: None if x is None else x.double() for n, x in sample.args.items()}
    rows = [sample[n][:, 0] for n in ("q", "k", "v", "g")]
    step = functools.partial(subquad.gated_linear_attention_step, *rows, backend=backend)
    o = step(sample["s0"].clone(), z=sample["z0"].clone(), eps=2.0)
    assert_close(o.double(), oracle(**wide, **sample.kwargs)[0][:, 0], 1e-5)
    skip = torch.tensor([1, -1], device=device)
    o = step(sample["s0"].clone(), z=sample["z0"].clone(), eps=0.0, state_indices=skip)
    assert bool(o[0].any()) and not bool(o[1].any())


@pytest.mark.quick
@backend_params("gated_linear_attention", *KERNELS)
def test_steep_gates_per_head(backend: str, device: str) -> None:
    """Decays that no chunk can share, one of nothing among them, and more channels than a tile has."""
    sample = draw(
        Sampler(device=device),
        "steep",
        6,
        (1, 1, 1, 1),
        35,
        6,
        gate="head",
        mean=12.0,
        batch=1,
        state=True,
        normalize=True,
    )
    sample["g"][0, 4] = -torch.inf
    agree(sample, backend)


@backend_params("gated_linear_attention", *KERNELS)
def test_keys_get_no_gradient_from_constant_values(backend: str, device: str) -> None:
    sample = draw(Sampler(device=device), "constant", 64, (1, 1, 1, 1), 16, 8, batch=1, normalize=True, final=False)
    k = sample["k"].clone().requires_grad_()
    arguments = sample.replace(k=k, v=torch.ones_like(sample["v"])).args
    (grad,) = torch.autograd.grad(SPECS[0].fn(**arguments, **sample.kwargs, backend=backend)[0].sum(), k)
    assert float(grad.abs().max()) < 1e-5


@backend_params("gated_linear_attention", *KERNELS)
def test_a_gradient_of_the_state_alone(backend: str, device: str) -> None:
    sample = draw(Sampler(device=device), "state", 34, (2, 2, 1, 1), 8, 6, batch=1, normalize=True, state=True)
    grads = {}
    for wide in (False, True):
        leaves = {
            n: x.to(torch.float64 if wide else x.dtype).requires_grad_()
            for n, x in sample.args.items()
            if x is not None
        }
        outputs = oracle(**leaves, **sample.kwargs) if wide else SPECS[0].fn(**leaves, **sample.kwargs, backend=backend)
        for which in (1, 2):
            found = torch.autograd.grad(
                outputs[which].sum(), tuple(leaves.values()), retain_graph=True, allow_unused=True
            )
            grads[wide, which] = dict(zip(leaves, found, strict=True))
    for which in (1, 2):
        for name, grad in grads[False, which].items():
            expected = grads[True, which][name]
            assert grad is not None
            zero = torch.zeros_like(grad, dtype=torch.float64)
            assert_close(grad.double(), zero if expected is None else expected, 1e-5, f"{which} {name}")


@backend_params("gated_linear_attention", "native")
def test_long_sequences_do_not_drift(backend: str) -> None:
    sample = draw(Sampler(torch.bfloat16), "long", 65536, (1, 1, 1, 1), 16, 16, mean=0.001, batch=1, normalize=True)
    _, s, z = SPECS[0].fn(**sample.args, **sample.kwargs, backend=backend)
    decay = sample["g"].double()[0, :, 0]
    weights = (decay.sum(0) - decay.cumsum(0)).exp() * sample["k"].double()[0, :, 0]
    assert_close(z.double()[0, 0], weights.sum(0), 1e-5)
    assert_close(s.double()[0, 0], weights.T @ sample["v"].double()[0, :, 0], 1e-5)


@backend_params("gated_linear_attention", "native")
def test_many_sequences(backend: str) -> None:
    lengths = torch.randint(0, 4, (1200,), generator=torch.Generator().manual_seed(0))
    bounds = tuple(torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).tolist())
    sample = draw(Sampler(), "many", bounds[-1], (1, 1, 1, 1), 4, 4, bounds=bounds, state=True)
    agree(sample, backend)
    wide, short = sample.kwargs["cu_seqlens"], sample.kwargs["cu_seqlens"].int()
    results = [
        SPECS[0].fn(**sample.with_options(cu_seqlens=bounds).kwargs, **sample.args, backend=backend)
        for bounds in (wide, short)
    ]
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two)


@backend_params("gated_linear_attention", *KERNELS)
def test_steps_are_the_whole(backend: str, device: str) -> None:
    for gate, normalize in (("channel", True), ("head", False), ("none", True)):
        sample = draw(
            Sampler(device=device), "step", 9, (4, 2, 1, 2), 12, 20, gate=gate, normalize=normalize, state=True
        )
        expected = oracle(**{n: None if x is None else x.double() for n, x in sample.args.items()}, **sample.kwargs)
        state, z = sample["s0"].clone(), sample["z0"].clone() if normalize else None
        for t in range(9):
            token = [sample[n][:, t] for n in ("q", "k", "v")]
            g = None if gate == "none" else sample["g"][:, t]
            o = subquad.gated_linear_attention_step(*token, g, state, z=z, backend=backend)
            assert_close(o.double(), expected[0][:, t], 1e-5, f"{gate}, token {t}")
        assert_close(state.double(), expected[1], 1e-5)
        if z is not None:
            assert_close(z.double(), expected[2], 1e-5)


@backend_params("gated_linear_attention", *KERNELS, "reference")
def test_a_step_on_a_pool(backend: str, device: str) -> None:
    sample = draw(Sampler(device=device), "pool", 1, (2, 2, 1, 1), 8, 10, normalize=True, batch=3)
    generator = torch.Generator().manual_seed(1)
    state, z = torch.randn(5, 2, 8, 10, generator=generator), torch.rand(5, 2, 8, generator=generator)
    state, z = state.to(device), z.to(device)
    before = (state.clone(), z.clone())
    q, k, v, g = (sample[n][:, 0] for n in ("q", "k", "v", "g"))
    indices = torch.tensor([4, -1, 0], device=device, dtype=torch.int32)
    o = subquad.gated_linear_attention_step(q, k, v, g, state, z=z, state_indices=indices, backend=backend)
    for row, place in enumerate([4, -1, 0]):
        if place < 0:
            assert not bool(o[row].any())
            continue
        s_row, z_row = before[0][place : place + 1].clone(), before[1][place : place + 1].clone()
        one = [x[row : row + 1] for x in (q, k, v, g)]
        expected = subquad.gated_linear_attention_step(*one, s_row, z=z_row, backend="reference")
        assert_close(o[row : row + 1].double(), expected.double(), 1e-5)
        assert_close(state[place].double(), s_row[0].double(), 1e-5)
    for place in (1, 2, 3):
        assert_same_bits(state[place], before[0][place])
        assert_same_bits(z[place], before[1][place])


def test_autocast_casts_the_rows_alone() -> None:
    sample = draw(Sampler(), "autocast", 8, (1, 1, 1, 1), 8, 8, state=True)
    with torch.autocast("cpu", torch.bfloat16):
        o, s = SPECS[0].fn(**sample.args, **sample.kwargs)
    assert o.dtype is torch.bfloat16 and s.dtype is torch.float32


def test_the_chunked_peer_is_right() -> None:
    """The benchmarks' peer computes the same."""
    sample = draw(Sampler(), "peer", 128, (2, 2, 2, 2), 16, 16, batch=1, normalize=True, final=False)
    assert_close(
        chunked(*(sample[n] for n in "qkvg")).double(), oracle(**sample.args, **sample.kwargs)[0].double(), 1e-5
    )


def rows(heads: int = 2, width: int = 8, tokens: int = 4, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, tokens, heads, width)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(1, 4, 16)}, ValueError, r"q: expected shape \[B, T, H, D\]"),
        ({"k": rows(width=4)}, ValueError, "k: expected a head dimension of 8"),
        ({"k": rows(heads=3)}, ValueError, "v: expected a number of heads that divides 3"),
        ({"q": rows(heads=3)}, ValueError, "q: expected a multiple of 2 heads"),
        ({"v": rows(tokens=5)}, ValueError, r"v: expected leading sizes \[1, 4\]"),
        ({"v": rows().bfloat16()}, TypeError, "v: expected torch.float32 as q has"),
        ({"g": rows(width=7)}, ValueError, r"g: expected shape \[B, T, H, 8\] or"),
        ({"g": rows().half()}, TypeError, "g: expected float32"),
        ({"scale": float("inf")}, ValueError, "scale: expected a finite number"),
        ({"eps": "1"}, TypeError, "eps: expected a float"),
        ({"normalize": 1}, TypeError, "normalize: expected a bool"),
        ({"initial_state": torch.zeros(1, 2, 8, 7)}, ValueError, r"initial_state: expected shape \[1, 2, 8, 8\]"),
        ({"initial_state": torch.zeros(1, 2, 8, 8).bfloat16()}, TypeError, "initial_state: expected torch.float32"),
        ({"initial_state": torch.zeros(1, 2, 8, 8), "normalize": True}, ValueError, r"initial_state: .*\[1, 2, 8, 9\]"),
        (
            {"initial_state": (torch.zeros(1, 2, 8, 8),), "normalize": True},
            TypeError,
            "initial_state: expected the pair",
        ),
        ({"initial_state": (torch.zeros(1, 2, 8, 8),) * 2}, TypeError, "initial_state: expected one tensor"),
        ({"cu_seqlens": torch.tensor([1, 4])}, ValueError, "cu_seqlens: expected numbers from 0 to 4"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, "cu_seqlens: expected numbers from 0 to 4"),
        (
            {"cu_seqlens": torch.tensor([0, 3, 2, 4])},
            ValueError,
            "cu_seqlens: expected numbers from 0 to 4 that do not decrease",
        ),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, TypeError, "cu_seqlens: expected int32 or int64"),
        ({"backend": "cuda"}, ValueError, "backend"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"q": rows(), "k": rows(), "v": rows(), "g": -rows()} | change
    with pytest.raises(error, match=message):
        subquad.gated_linear_attention(**arguments)


def test_packed_sequences_need_a_batch_of_one() -> None:
    x = rows(batch=2)
    with pytest.raises(ValueError, match="cu_seqlens: expected a batch of 1"):
        subquad.gated_linear_attention(x, x, x, cu_seqlens=torch.tensor([0, 4]))


_MEMORY = """
import torch, subquad
torch.set_num_threads(2)

def peak():  # KiB; ru_maxrss would count the process that started this one
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

def train(tokens):
    tensors = [torch.rand(1, tokens, 8, 64) for _ in range(3)] + [-0.1 * torch.rand(1, tokens, 8, 64)]
    leaves = [x.requires_grad_() for x in tensors]
    before = peak()
    o, _ = subquad.gated_linear_attention(*leaves, normalize=True, backend="native")
    o.sum().backward()
    inputs = sum(x.nbytes for x in leaves) / 1024
    return 1 + (peak() - before) / inputs

train(256)
print(train(8192))
"""


@pytest.mark.slow
@backend_params("gated_linear_attention", "native")
def test_memory_of_training(backend: str) -> None:
    """Forward and backward of 8192 tokens: inputs, gradients and all else are at most three times the inputs."""
    result = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 2 < float(result.stdout) < 3, f"{result.stdout.strip()} times the inputs"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"state": torch.zeros(1, 2, 8, 7)}, ValueError, r"state: expected shape \[1, 2, 8, 8\]"),
        ({"state": torch.zeros(1, 2, 8, 8).bfloat16()}, TypeError, "state: expected torch.float32"),
        ({"z": torch.zeros(1, 2, 7)}, ValueError, r"z: expected shape \[1, 2, 8\]"),
        ({"state_indices": torch.tensor([1])}, ValueError, r"state_indices: expected numbers in -1\.\.0"),
        ({"state_indices": torch.tensor([0, 0])}, ValueError, r"state_indices: expected shape \[1\]"),
        ({"q": torch.rand(1, 2, 2, 8)}, ValueError, r"q: expected shape \[B, H, D\]"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_steps_change_nothing(change: dict[str, Any], error: type[Exception], message: str) -> None:
    token = {n: torch.rand(1, 2, 8) for n in ("q", "k", "v", "g")}
    arguments: dict[str, Any] = {**token, "state": torch.zeros(1, 2, 8, 8)} | change
    with pytest.raises(error, match=message):
        subquad.gated_linear_attention_step(**arguments)
    assert not bool(arguments["state"].any())
