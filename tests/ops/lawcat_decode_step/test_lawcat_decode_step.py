"""LAWCAT's decoding step: the generic tests, and what is true of it alone."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import subquad
from subquad.testing import Sampler, Task, assert_close, assert_same_bits, backend_params, generic_tests
from subquad.testing.case import Case
from subquad.testing.specs.lawcat_decode_step import POOLS, SPEC, SPECS, draw, oracle

EXAMPLES = {"native": 40, "simt": 6, "triton": 3}
KERNELS = ("native", "simt", "triton")
ALL = (*KERNELS, "reference")


@generic_tests(*SPECS)
def test_generic(task: Task, device: str) -> None:
    task.run(device)


def step(**arguments: Any) -> tuple[torch.Tensor, ...]:
    """The public function on copies of the pools; its result and the pools after it."""
    return Case(SPEC, "native").invoke(arguments, {})


def wide(sample: Any) -> dict[str, Any]:
    return {n: None if x is None else x.double() for n, x in sample.args.items()}


def agree(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], what: str = "") -> None:
    for name, a, b in zip(("o", *POOLS), found, expected, strict=False):
        assert_close(a.double(), b.double(), 1e-5, f"{what} {name}")


@backend_params("lawcat_decode_step", *KERNELS)
def test_random_problems(backend: str, device: str) -> None:
    @settings(max_examples=EXAMPLES[backend], deadline=None, derandomize=True)
    @given(
        keys=st.integers(1, 3),
        per_key=st.integers(1, 3),
        per_state=st.integers(1, 6),
        d=st.integers(1, 40),
        f=st.integers(1, 24),
        dv=st.integers(1, 40),
        taps=st.integers(1, 8),
        gate=st.sampled_from(["channel", "head", "none"]),
        bias=st.booleans(),
        activation=st.sampled_from([None, "silu"]),
        normalize=st.booleans(),
    )
    def run(keys: int, per_key: int, per_state: int, d: int, f: int, dv: int, taps: int, **options: Any) -> None:
        states = keys * per_key
        heads = (states * per_state, keys, states)
        sample = draw(Sampler(device=device, seed=d), "random", heads, d, f, dv, taps=taps, **options)
        agree(step(**sample.args, **sample.kwargs, backend=backend), oracle(**wide(sample), **sample.kwargs))

    run()


@backend_params("lawcat_decode_step", *ALL)
@pytest.mark.parametrize("shared", [False, True])
def test_it_is_what_the_operators_give_one_after_the_other(backend: str, device: str, shared: bool) -> None:
    heads = (4, 2, 2) if shared else (4, 2, 4)
    sample = draw(
        Sampler(device=device), "layer", heads, 8, 4, 12, maps=4, key_maps=heads[2], bias=True, activation="silu"
    )
    a = {n: x.clone() if x is not None and n in POOLS else x for n, x in sample.args.items()}
    features = []
    for x, past, taps, bias, maps in (
        ("q0", "conv_q", "cq", "cq_bias", "wphi"),
        ("k0", "conv_k", "ck", "ck_bias", "wphi_k"),
    ):
        y = subquad.causal_conv1d_update(
            a[x].flatten(1), a[past], a[taps], a[bias], activation="silu", head_dim=8,
            channel_groups=a[taps].shape[0] // a[x][0].numel(),
        )  # fmt: skip
        features.append(subquad.feature_map(y.unflatten(1, (-1, 8))[:, None], a[maps])[:, 0])
    g = F.logsigmoid(a["u"]) / 16.0
    o = subquad.gated_linear_attention_step(*features, a["v"], g, a["state"], z=a["z"])
    agree(step(**sample.args, **sample.kwargs, backend=backend), (o, *(a[n] for n in POOLS)))


@backend_params("lawcat_decode_step", *ALL)
def test_steps_follow_each_other(backend: str, device: str) -> None:
    """Seven tokens in place are what the oracle makes of them, its pools handed on."""
    first = draw(Sampler(device=device), "steps", (4, 2, 4), 8, 4, 8)
    pools = {n: first[n].clone() for n in POOLS}
    expected = {n: first[n].double() for n in POOLS}
    for t in range(7):
        token = draw(Sampler(device=device, seed=t), "token", (4, 2, 4), 8, 4, 8)
        rows = {n: token[n] for n in ("q0", "k0", "v", "u")}
        weights = {n: first[n] for n in ("cq", "ck", "wphi")}
        o = subquad.lawcat_decode_step(**rows, **weights, **pools, backend=backend)
        want, *after = oracle(**{n: x.double() for n, x in (rows | weights).items()}, **expected)
        expected = dict(zip(POOLS, after, strict=True))
        agree((o, *pools.values()), (want, *after), f"token {t}")


@backend_params("lawcat_decode_step", *ALL)
def test_a_pool(backend: str, device: str) -> None:
    sample = draw(Sampler(device=device), "pool", (4, 2, 4), 8, 4, 8, pool=[4, -1, 0], bias=True)
    o, *pools = step(**sample.args, **sample.kwargs, backend=backend)
    agree((o, *pools), oracle(**wide(sample), **sample.kwargs))
    assert not bool(o[1].any())
    for name, pool in zip(POOLS, pools, strict=True):
        rest = [1, 2, 3, 5, 6]
        assert_same_bits(pool[rest], sample[name][rest], name)
        assert not torch.equal(pool[[0, 4]], sample[name][[0, 4]])
    short = sample.with_options(state_indices=sample.kwargs["state_indices"].int())
    for a, b in zip(step(**short.args, **short.kwargs, backend=backend), (o, *pools), strict=True):
        assert_same_bits(a, b)


@backend_params("lawcat_decode_step", *ALL)
@pytest.mark.parametrize("value", [-torch.inf, -1e4, -30.0, 0.0, 30.0, torch.inf])
@pytest.mark.parametrize("gate", ["channel", "head"])
def test_extreme_gates(backend: str, device: str, value: float, gate: str) -> None:
    sample = draw(Sampler(device=device), "gates", (2, 1, 2), 6, 3, 5, gate=gate)
    for clamp in (None, -0.5):
        filled = sample.replace(u=torch.full_like(sample["u"], value)).with_options(clamp_min=clamp)
        agree(step(**filled.args, **filled.kwargs, backend=backend), oracle(**wide(filled), **filled.kwargs))


@backend_params("lawcat_decode_step", *ALL)
def test_a_nan_stays_in_its_head(backend: str, device: str) -> None:
    """Key head 1 of row 0 is NaN: the states and queries of key head 0, and row 1, do not change."""
    sample = draw(Sampler(device=device), "nan", (4, 2, 4), 8, 4, 8)
    clean = step(**sample.args, **sample.kwargs, backend=backend)
    k0 = sample["k0"].clone()
    k0[0, 1] = torch.nan
    found = step(**sample.replace(k0=k0).args, **sample.kwargs, backend=backend)
    assert bool(found[0][0, 2:].isnan().all()) and bool(found[3][0, 2:].isnan().all())
    assert_same_bits(found[0][0, :2], clean[0][0, :2])
    assert_same_bits(found[3][0, :2], clean[3][0, :2])
    for a, b in zip(found, clean, strict=True):
        assert_same_bits(a[1], b[1])


@backend_params("lawcat_decode_step", *ALL)
def test_steep_maps_stay_above_the_least_feature(backend: str, device: str) -> None:
    """Saturated features: a softmax of one, fm_eps elsewhere; the result is finite and the oracle's."""
    sample = draw(Sampler(device=device), "steep", (2, 1, 2), 8, 4, 6)
    steep = sample.replace(wphi=sample["wphi"] * 300)
    found = step(**steep.args, backend=backend)
    assert all(bool(x.isfinite().all()) for x in found)
    for a, b in zip(found, oracle(**wide(steep)), strict=True):
        assert_close(a.double(), b, 2e-4)  # the products are large, and so is what is lost of them


@backend_params("lawcat_decode_step", *KERNELS)
def test_taps_as_modules_have_them(backend: str, device: str) -> None:
    sample = draw(Sampler(device=device), "layer", (4, 2, 4), 8, 4, 8)
    expected = step(**sample.args, backend=backend)
    with_dimension = sample.replace(cq=sample["cq"][:, None], ck=sample["ck"][:, None])
    for a, b in zip(step(**with_dimension.args, backend=backend), expected, strict=True):
        assert_same_bits(a, b)


def test_autocast_follows_the_pools() -> None:
    sample = draw(Sampler(), "autocast", (4, 2, 4), 8, 4, 8)
    narrow = sample.replace(**{n: sample[n].bfloat16() for n in ("conv_q", "conv_k")})
    with torch.autocast("cpu", torch.bfloat16):
        o, conv_q, _, state, _ = step(**narrow.args)
    assert o.dtype is torch.bfloat16 and conv_q.dtype is torch.bfloat16 and state.dtype is torch.float32


def test_twenty_schedules(emulator: ctypes.CDLL) -> None:
    """Seeds beyond those of the generic check, on the sample with the most sharing."""
    set_seed = emulator.subquad_simt_set_seed
    sample = draw(Sampler(), "seeds", (12, 1, 2), 9, 5, 36, bias=True, batch=1)
    expected = step(**sample.args, backend="simt")
    try:
        for seed in range(2, 22):
            set_seed(seed)
            for a, b in zip(step(**sample.args, backend="simt"), expected, strict=True):
                assert_same_bits(a, b, f"schedule {seed}")
    finally:
        set_seed(1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q0": torch.zeros(2, 4, 2, 8)}, ValueError, r"q0: expected shape \[B, H, D\]"),
        ({"q0": torch.zeros(2, 3, 8)}, ValueError, "q0: expected a multiple of the 4 heads of state, got 3"),
        ({"k0": torch.zeros(2, 3, 8)}, ValueError, "k0: expected a number of heads that divides 4, got 3"),
        ({"k0": torch.zeros(2, 2, 7)}, ValueError, r"k0: expected shape \[2, 2, 8\]"),
        ({"v": torch.zeros(2, 2, 8).bfloat16()}, TypeError, "v: expected torch.float32 as q0 has"),
        ({"u": torch.zeros(2, 2, 7)}, ValueError, r"u: expected shape \[2, H, 8\] or \[2, H\]"),
        ({"u": torch.zeros(2, 3)}, ValueError, "u: expected a number of heads that divides 4, got 3"),
        ({"u": torch.zeros(2, 2).half()}, TypeError, "u: expected float32"),
        ({"cq": torch.zeros(32, 9)}, ValueError, "cq: expected at most 8 taps, got 9"),
        ({"ck": torch.zeros(31, 4)}, ValueError, r"ck: expected shape \[32, 4\]"),
        ({"wphi": torch.zeros(3, 8, 4)}, ValueError, "wphi: expected a number of maps that divides the 4 heads"),
        ({"wphi_k": torch.zeros(4, 8, 5)}, ValueError, r"wphi_k: expected shape \[4, 8, 4\]"),
        ({"conv_q": torch.zeros(2, 32, 4)}, ValueError, r"conv_q: expected shape \[2, 32, 3\]"),
        ({"state": torch.zeros(2, 4, 8, 8).double()}, TypeError, "state: expected torch.float32"),
        ({"state": torch.zeros(2, 4, 7, 8)}, ValueError, "state: expected an even number of features"),
        ({"z": torch.zeros(2, 4, 7)}, ValueError, r"z: expected shape \[2, 4, 8\]"),
        ({"cq_bias": torch.zeros(31)}, ValueError, r"cq_bias: expected shape \[32\]"),
        ({"activation": "relu"}, ValueError, "activation: expected None, 'silu' or 'swish'"),
        ({"tau": 0.0}, ValueError, "tau: expected a number above 0"),
        ({"fm_eps": -1.0}, ValueError, "fm_eps: expected a number that is not negative"),
        ({"clamp_min": float("nan")}, ValueError, "clamp_min: expected a finite number"),
        ({"state_indices": torch.tensor([0, 2])}, ValueError, r"state_indices: expected numbers in -1\.\.1"),
        ({"state_indices": torch.tensor([1, 1])}, ValueError, "state_indices: expected every place at most once"),
        ({"backend": "cuda"}, ValueError, "backend"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named_and_changes_nothing(change: dict[str, Any], error: type[Exception], message: str) -> None:
    sample = draw(Sampler(), "bad", (4, 2, 4), 8, 4, 8)
    arguments: dict[str, Any] = {**sample.args} | change
    before = {n: arguments[n].clone() for n in POOLS}
    with pytest.raises(error, match=message):
        subquad.lawcat_decode_step(**arguments)
    for name in POOLS:
        assert_same_bits(arguments[name], before[name])


def test_a_gradient_is_refused() -> None:
    sample = draw(Sampler(), "grad", (4, 2, 4), 8, 4, 8)
    with pytest.raises(ValueError, match="wphi: expected a tensor without requires_grad"):
        subquad.lawcat_decode_step(**{**sample.args, "wphi": sample["wphi"].clone().requires_grad_()})


def test_the_peers_are_right() -> None:
    """What the benchmarks compare with computes the same."""
    sample = draw(Sampler(), "peer", (4, 2, 4), 8, 4, 8)
    expected = step(**sample.args)[0]
    for name in ("composed", "eager"):
        call = SPEC.peers[name](sample)
        assert call is not None
        assert_close(call().double(), expected.double(), 1e-5, name)
