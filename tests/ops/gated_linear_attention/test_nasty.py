"""The cases in which linear attention goes wrong: fourteen groups, each of them a test somewhere.

 1 gates 0, -60, -1e4, -inf, alternating, beyond the fast range   test_gated_linear_attention.py; 16-bit gates here
 2 saturated, equal and underflowing features                      here; one-hot features there
 3 lengths about tile and chunk edges, shorter than the taps       here
 4 packed sequences: empty, of one token, about a chunk            here; more than a thousand there
 5 odd widths, strides                                             here; layouts and gradient_layouts of the generic tests
 6 head counts, gradients of shared heads                          here
 7 long sequences                                                  test_long_sequences_do_not_drift there
 8 gradients of parts, states in and out                           here; test_a_gradient_of_the_state_alone there
 9 padding                                                         here; models/test_lawcat_module.py, with NaN and 1e30
10 huge, tiny and no numbers                                       here; test_nothing_reaches_earlier_tokens there
11 torch.compile, autocast, inference mode                         here; compilation and operators of the generic tests
12 cancellation in gradients                                       here; test_keys_get_no_gradient_from_constant_values there
13 second derivatives                                              here; double_backward of the generic tests
14 models                                                          models/test_lawcat.py

What cannot run here: addresses beyond 2^31 elements, CUDA graphs, a second device.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import subquad
from subquad import reference
from subquad.testing import Sampler, assert_close, assert_same_bits, backend_cases, backend_params
from subquad.testing.compare import relative_l2
from subquad.testing.specs.gated_linear_attention import SPEC, chunked, draw, oracle

STEM = "gated_linear_attention"
Cases = list[tuple[Any, ...]]
KERNELS = ("native", "simt", "triton")
HEADS = ((4, 4, 2, 2), (4, 2, 2, 2), (4, 1, 1, 1), (2, 2, 2, 2), (4, 2, 4, 1), (8, 1, 1, 1), (6, 3, 1, 3))


def both(native: Cases, others: Cases) -> dict[str, Cases]:
    """All cases for the native kernels, and those that are enough for an interpreter for the others."""
    return {name: native if name == "native" else others for name in KERNELS}


# Relative L2 error and largest error beside the largest element, of results and states, dq dk dv, and dg ds0 dz0.
ACCURACY = {
    torch.float32: ((5e-6, 5e-5), (1e-5, 1e-4), (3e-5, 3e-4)),
    torch.bfloat16: ((3e-3, 1.5e-2), (4e-3, 1.5e-2), (4e-3, 1.5e-2)),
    torch.float16: ((6e-4, 4e-3), (1e-3, 4e-3), (1e-3, 4e-3)),
}


def outputs_of(sample: Any, backend: str | None, which: tuple[str, ...] | None = None) -> dict[str, torch.Tensor]:
    """Results and gradients by name; `which` results get a gradient, all by default. Without a backend the oracle in float64."""
    leaves = {
        n: x.detach().to(torch.float64 if backend is None else x.dtype).requires_grad_()
        for n, x in sample.args.items()
        if x is not None
    }
    function = oracle if backend is None else SPEC.fn
    results = function(**leaves, **sample.kwargs, **({} if backend is None else {"backend": backend}))
    named = dict(zip(("o", "s", "z"), results, strict=False))
    generator = torch.Generator().manual_seed(5)
    narrow = SPEC.fn(**sample.args, **sample.kwargs, backend="native") if backend is None else results
    upstream = {
        n: torch.randn(y.shape, generator=generator).to(like.dtype).to(y)
        for (n, y), like in zip(named.items(), narrow, strict=True)
    }
    chosen = tuple(named) if which is None else which
    grads = torch.autograd.grad(
        [named[n] for n in chosen],
        tuple(leaves.values()),
        [upstream[n] for n in chosen],
        allow_unused=True,
        materialize_grads=True,
    )
    return {n: y.detach() for n, y in named.items()} | {f"d{n}": x for n, x in zip(leaves, grads, strict=True)}


def agree(sample: Any, backend: str, which: tuple[str, ...] | None = None) -> None:
    """Everything within the table. A gradient that cancels is judged beside what cancelled, the largest of all."""
    found, expected = outputs_of(sample, backend, which), outputs_of(sample, None, which)
    largest = max(float(x.norm()) for n, x in expected.items() if n.startswith("d"))
    for name, value in found.items():
        what = expected[name]
        group = 0 if name in "osz" else 1 if name in ("dq", "dk", "dv") else 2
        exact = name in "sz" and backend not in SPEC.tol.products  # products of 16-bit operands are rounded there
        l2, peak = ACCURACY[torch.float32 if exact else sample["q"].dtype][group]
        error, most = float((value.double() - what).norm()), float((value.double() - what).abs().max())
        rest = 0.03 * largest if group else 0.0
        assert error <= l2 * (float(what.norm()) + rest), f"{sample.id}: {name}: error {error:.2e}"
        assert most <= peak * (float(what.abs().max()) + rest), f"{sample.id}: {name}: largest error {most:.2e}"


@backend_params(STEM, *KERNELS)
@pytest.mark.parametrize("dtype", ACCURACY, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("gate", ["channel", "head"])
def test_accuracy(backend: str, device: str, dtype: torch.dtype, gate: str) -> None:
    options: dict[str, Any] = {"gate": gate, "mean": 0.05, "normalize": True, "state": True}
    agree(draw(Sampler(dtype, device), "table", 67, (2, 2, 1, 1), 16, 24, batch=1, **options), backend)
    agree(draw(Sampler(dtype, device), "plain", 35, (2, 1, 2, 2), 24, 16, batch=1, gate=gate, state=True), backend)


@backend_params(STEM, *KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("gate", ["channel", "head"])
def test_gates_of_16_bits(backend: str, device: str, dtype: torch.dtype, gate: str) -> None:
    """Gates in q's dtype, steep and with -inf among them; their gradient has it too. And one decoding step."""
    for mean, steep in ((0.1, False), (6.0, True)):
        sample = draw(
            Sampler(dtype, device), "narrow", 35, (2, 2, 2, 2), 13, 9, gate=gate, mean=mean, batch=1, normalize=True,
            state=True,
        )  # fmt: skip
        g = sample["g"].to(dtype)
        if steep:
            g[:, 20, 1] = -torch.inf
        sample = sample.replace(g=g)
        found = SPEC.fn(**sample.args, **sample.kwargs, backend=backend)
        wide = {n: None if x is None else x.double() for n, x in sample.args.items()}
        for one, two in zip(found, oracle(**wide, **sample.kwargs), strict=True):
            exact = one.dtype is not dtype and backend not in SPEC.tol.products
            assert_close(one.double(), two, ACCURACY[torch.float32 if exact else dtype][0][0])
        if not steep:
            agree(sample, backend)
    state, z = sample["s0"].clone(), sample["z0"].clone()
    rows = [sample[n][:, 20].contiguous() for n in ("q", "k", "v", "g")]
    o = subquad.gated_linear_attention_step(*rows, state, z=z, backend=backend)
    token = {n: sample[n][:, 20:21].double() for n in ("q", "k", "v", "g")}
    expected = oracle(**token, s0=sample["s0"].double(), z0=sample["z0"].double(), normalize=True)
    assert_close(o.double(), expected[0][:, 0], ACCURACY[dtype][0][0])
    assert_close(state.double(), expected[1], 5e-6)
    assert_close(z.double(), expected[2], 5e-6)


@backend_params(STEM, *KERNELS)
def test_a_sequence_that_forgets_at_its_first_token(backend: str, device: str) -> None:
    """-inf at the first token cuts the state off, also its gradient; at the last, everything before."""
    for place in (0, 19):
        for gate in ("channel", "head"):
            sample = draw(Sampler(device=device), "cut", 20, (2, 1, 1, 1), 7, 5, gate=gate, batch=1, state=True)
            g = sample["g"].clone()
            g[:, place] = -torch.inf
            agree(sample.replace(g=g), backend)


@backend_params(STEM, *KERNELS)
def test_features_all_equal(backend: str, device: str) -> None:
    """Every past token weighs the same: o is the running mean."""
    q = torch.full((1, 33, 1, 8), 0.25, device=device)
    v = torch.randn(1, 33, 1, 5, generator=torch.Generator().manual_seed(0)).to(device)
    o, _ = subquad.gated_linear_attention(q, q, v, normalize=True, backend=backend)
    count = torch.arange(1, 34, device=device)[:, None, None]
    assert_close(o.double(), v.double().cumsum(1) / count, 5e-6)


@backend_params(STEM, *KERNELS)
def test_features_that_underflow_in_fp16(backend: str, device: str) -> None:
    """The clamp of 1e-12 is 0 in fp16: the denominator is 0 and the result too, nothing is NaN."""
    x = torch.zeros(1, 20, 2, 4, device=device, dtype=torch.float16)
    x[..., 0, 0], x[..., 1, 1] = 60.0, -60.0
    phi = subquad.feature_map(x, fullspace=False, backend="reference")
    q, k = phi[:, :, :1].detach(), phi[:, :, 1:].detach()
    k[..., 1] = 1.0
    q[..., 1] = 0.0
    k[..., 0] = 0.0
    q, k, v = (y.requires_grad_() for y in (q, k, torch.ones(1, 20, 1, 3, device=device, dtype=torch.float16)))
    o, _ = subquad.gated_linear_attention(q, k, v, normalize=True, backend=backend)
    assert bool((o == 0).all())
    for grad in torch.autograd.grad(o.sum(), (k, v)):
        assert not bool(grad.isnan().any())  # but 1 / eps does not fit into fp16


EDGES = (1, 2, 16, 31, 32, 33, 65)  # enough for an interpreter


@backend_cases(
    STEM, "tokens", both([(n,) for n in (*EDGES, 3, 4, 15, 17, 63, 64, 127, 129, 257)], [(n,) for n in EDGES])
)
def test_lengths(backend: str, device: str, tokens: int) -> None:
    sample = draw(
        Sampler(device=device), "length", tokens, (2, 1, 1, 1), 6, 5, mean=0.3, batch=1, normalize=True, state=True
    )
    agree(sample, backend)


@backend_params(STEM, "native")
def test_many_segments(backend: str) -> None:
    """Longer than several segments of the backward, whose states are computed again."""
    sample = draw(Sampler(), "segments", 1060, (2, 1, 1, 1), 5, 6, mean=0.02, batch=1, normalize=True, state=True)
    agree(sample, backend)


@backend_params("causal_conv1d")
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_convolution_shorter_than_its_taps(backend: str, tokens: int) -> None:
    """With a state in and out, and its gradients: part of the state is handed on."""
    s = Sampler(seed=tokens)
    leaves = [s.normal(2, tokens, 5), s.normal(5, 4), s.normal(2, 5, 3)]
    results = []
    for dtype, name in ((torch.float32, backend), (torch.float64, "reference")):
        x, w, state = (y.to(dtype).requires_grad_() for y in leaves)
        y, final = subquad.causal_conv1d(x, w, initial_state=state, output_final_state=True, backend=name)
        upstream = [torch.linspace(-1, 1, z.numel(), dtype=dtype).view(z.shape) for z in (y, final)]
        results.append((y, final, *torch.autograd.grad((y, final), (x, w, state), upstream)))
    for one, two in zip(*results, strict=True):
        assert_close(one.double(), two, 1e-6)


@backend_params("causal_conv1d")
def test_infinite_weights_beyond_the_end(backend: str) -> None:
    """dx of the last inputs of a sequence has no term from outputs that do not exist, whatever their weight."""
    s = Sampler()
    x, w = s.normal(1, 9, 3).requires_grad_(), s.normal(3, 4)
    w[:, 0] = torch.inf
    bounds = torch.tensor([0, 4, 9])
    y, _ = subquad.causal_conv1d(x, w, cu_seqlens=bounds, backend=backend)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    reached = torch.tensor([True, False, False, False, True, True, False, False, False])
    assert torch.equal(dx[0].isfinite().all(-1), ~reached) and bool((dx[0, reached] == torch.inf).all())


PACKED = {
    "empty": (0, 0, 5, 5, 9, 9),
    "ones": (0, 1, 2, 3, 4),
    "edges": (0, 31, 63, 96),
    "halves": (0, 15, 31, 48, 63),
    "nothing": (0, 0, 0),
}


_WIDE = [(name, torch.int64) for name in PACKED]
_FEW = [*_WIDE, ("empty", torch.int32)]


@backend_cases(STEM, "name, integers", both([*_WIDE, *((n, torch.int32) for n in PACKED)], _FEW) | {"reference": _FEW})
def test_packed(backend: str, device: str, name: str, integers: torch.dtype) -> None:
    """As the sequences alone, gradients too; an empty one hands its state and its gradient through, to the bit."""
    bounds = PACKED[name]
    sample = draw(
        Sampler(device=device),
        name,
        bounds[-1],
        (2, 1, 1, 1),
        6,
        5,
        mean=0.2,
        bounds=bounds,
        state=True,
        normalize=True,
    )
    sample = sample.with_options(cu_seqlens=sample.kwargs["cu_seqlens"].to(integers))
    if bounds[-1]:
        agree(sample, backend)
    found = outputs_of(sample, backend)
    generator = torch.Generator().manual_seed(5)
    upstream = {n: torch.randn(found[n].shape, generator=generator).to(device) for n in ("o", "s", "z")}
    for n, (a, b) in enumerate(itertools.pairwise(bounds)):
        if a == b:
            assert_same_bits(found["s"][n], sample["s0"][n])
            assert_same_bits(found["z"][n], sample["z0"][n])
            assert_same_bits(found["ds0"][n], upstream["s"][n])
            assert_same_bits(found["dz0"][n], upstream["z"][n])


@backend_params(STEM, *KERNELS)
@pytest.mark.parametrize("widths", [(60, 100), (96, 80), (1, 1), (5, 1), (1, 33), (256, 3), (2, 256)])
def test_widths(backend: str, device: str, widths: tuple[int, int]) -> None:
    sample = draw(Sampler(device=device), "widths", 18, (1, 1, 1, 1), *widths, batch=1, state=True, mean=0.2)
    agree(sample, backend)


def test_too_wide() -> None:
    x, wide = torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 257)
    for name, arguments in {"v": (x, x, wide), "q": (wide, wide, x), "k": (x, wide, x)}.items():
        with pytest.raises(ValueError, match=rf"^{name}: expected a head dimension in 1\.\.256, got 257"):
            subquad.gated_linear_attention(*arguments)


_CHANNEL = [(heads, "channel") for heads in HEADS]


@backend_cases(
    STEM, "heads, gate",
    both(
        [*_CHANNEL, *((heads, "head") for heads in HEADS)],
        [*_CHANNEL, *((heads, "head") for heads in ((4, 2, 4, 1), (8, 1, 1, 1)))],
    ),
)  # fmt: skip
def test_shared_heads_are_repeated_ones(backend: str, device: str, heads: tuple[int, ...], gate: str) -> None:
    """Results as if heads were repeated in memory, gradients their sums over the group."""
    sample = draw(Sampler(device=device), "heads", 19, heads, 6, 5, gate=gate, batch=1, normalize=True, final=False)
    found = outputs_of(sample, backend)
    wide = {n: x.double().requires_grad_() for n, x in sample.args.items() if x is not None}
    repeated = {n: x.repeat_interleave(heads[0] // x.shape[2], 2) for n, x in wide.items()}
    (o,) = oracle(**repeated, normalize=True, final=False)
    assert_close(found["o"].double(), o.detach(), 5e-6)
    upstream = torch.randn(o.shape, generator=torch.Generator().manual_seed(5)).to(device)
    for name, grad in zip(wide, torch.autograd.grad(o, tuple(wide.values()), upstream.double()), strict=True):
        assert_close(found[f"d{name}"].double(), grad, 3e-5, name)


@backend_params(STEM, *KERNELS)
@pytest.mark.parametrize("which", [("o",), ("s",), ("z",), ("o", "z"), ("s", "z")], ids="-".join)
def test_gradients_of_parts(backend: str, device: str, which: tuple[str, ...]) -> None:
    sample = draw(
        Sampler(device=device), "parts", 34, (2, 2, 1, 1), 7, 5, mean=0.2, batch=1, normalize=True, state=True
    )
    agree(sample, backend, which)


@backend_params(STEM, *KERNELS, "reference")
def test_states_are_not_shared(backend: str, device: str) -> None:
    """The state that comes out is another tensor than the one that went in, also when there was nothing to do."""
    for tokens in (0, 3):
        sample = draw(Sampler(device=device), "alias", tokens, (1, 1, 1, 1), 4, 3, normalize=True, state=True)
        before = sample["s0"].clone(), sample["z0"].clone()
        _, s, z = SPEC.fn(**sample.args, **sample.kwargs, backend=backend)
        assert s.data_ptr() != sample["s0"].data_ptr() and z.data_ptr() != sample["z0"].data_ptr()
        assert_same_bits(sample["s0"], before[0])
        assert_same_bits(sample["z0"], before[1])


@backend_params(STEM, *KERNELS, "reference")
def test_a_column_of_ones(backend: str, device: str) -> None:
    """One tensor with z as its last column is the same state, in and out, with gradients."""
    sample = draw(Sampler(device=device), "ones", 19, (2, 1, 1, 1), 6, 5, batch=1, normalize=True, state=True)
    rows = [sample[n] for n in ("q", "k", "v", "g")]
    pair = sample["s0"].clone().requires_grad_(), sample["z0"].clone().requires_grad_()
    one = torch.cat([sample["s0"], sample["z0"].unsqueeze(-1)], -1).requires_grad_()
    options: dict[str, Any] = {"normalize": True, "output_final_state": True, "backend": backend}
    o, (s, z) = subquad.gated_linear_attention(*rows, initial_state=pair, **options)
    same, wide = subquad.gated_linear_attention(*rows, initial_state=one, **options)
    assert_same_bits(same, o)
    assert_same_bits(wide, torch.cat([s, z.unsqueeze(-1)], -1))
    grads = torch.autograd.grad(o.sum() + s.sum() + z.sum(), pair)
    (grad,) = torch.autograd.grad(same.sum() + wide.sum(), one)
    assert_same_bits(grad, torch.cat([grads[0], grads[1].unsqueeze(-1)], -1))


@backend_params(STEM, *KERNELS)
def test_padding_that_decays_nothing(backend: str, device: str) -> None:
    """Keys, values and gates of 0 between tokens change no token's result and no state."""
    sample = draw(Sampler(device=device), "padding", 30, (1, 1, 1, 1), 6, 5, batch=1, normalize=True, state=True)
    expected = SPEC.fn(**sample.args, **sample.kwargs, backend=backend)
    places = torch.tensor([i + i // 3 for i in range(30)], device=device)  # a gap after every third token, and before
    padded = {}
    for name in ("q", "k", "v", "g"):
        x = sample[name].new_zeros(1, 42, *sample[name].shape[2:])
        padded[name] = x.index_copy(1, places + 2, sample[name])
    found = SPEC.fn(**sample.replace(**padded).args, **sample.kwargs, backend=backend)
    assert_close(found[0][:, places + 2].double(), expected[0].double(), 5e-6)
    for one, two in zip(found[1:], expected[1:], strict=True):
        assert_close(one.double(), two.double(), 5e-6)


@backend_params(STEM, *KERNELS)
@pytest.mark.parametrize("gate", ["channel", "head"])
def test_bad_gates_reach_no_earlier_token(backend: str, device: str, gate: str) -> None:
    sample = draw(
        Sampler(device=device), "gates", 36, (2, 2, 2, 2), 7, 5, gate=gate, batch=2, normalize=True, final=False
    )
    (clean,) = SPEC.fn(**sample.args, **sample.kwargs, backend=backend)
    for place, value in itertools.product((9, 21), (torch.nan, torch.inf)):
        g = sample["g"].clone()
        g[1, place] = value
        (o,) = SPEC.fn(**sample.replace(g=g).args, **sample.kwargs, backend=backend)
        assert_same_bits(o[0], clean[0])
        assert_close(o[1, :place].double(), clean[1, :place].double(), 1e-6)
        assert not bool(o[1, place].isfinite().any())


@backend_params(STEM, *KERNELS)
def test_nan_in_one_row_leaves_the_gradients_of_others(backend: str, device: str) -> None:
    sample = draw(Sampler(device=device), "nan", 20, (2, 1, 1, 1), 7, 5, batch=2, normalize=True, final=False)
    clean = outputs_of(sample, backend)
    for name in ("q", "k", "v", "g") if backend == "native" else ("v", "g"):
        x = sample[name].clone()
        x[1, 11] = torch.nan
        found = outputs_of(sample.replace(**{name: x}), backend)
        for other in ("q", "k", "v", "g"):
            assert_same_bits(found[f"d{other}"][0], clean[f"d{other}"][0])


@backend_params(STEM, *KERNELS)
def test_positive_gates(backend: str, device: str) -> None:
    """Growth is computed exactly as long as the states are finite, then infinity is infinity."""
    sample = draw(Sampler(device=device), "growth", 33, (1, 1, 1, 1), 4, 3, batch=1, state=True)
    agree(sample.replace(g=-sample["g"] * 2), backend)
    g = sample["g"].clone()
    g[:, 9] = 200.0
    args = sample.replace(
        g=g, k=sample["k"].abs(), v=sample["v"].abs(), q=sample["q"].abs(), s0=sample["s0"].abs()
    ).args
    o, s = SPEC.fn(**args, **sample.kwargs, backend=backend)
    assert bool(o[:, :9].isfinite().all()) and bool((o[:, 9:] == torch.inf).all()) and bool((s == torch.inf).all())


@backend_params(STEM, *KERNELS)
def test_large_and_tiny_values(backend: str, device: str) -> None:
    """fp16 near its largest number; denormal float32 values; results stay between the least and the largest value."""
    sample = draw(Sampler(device=device), "range", 33, (2, 1, 1, 1), 8, 5, batch=1, normalize=True, final=False)
    half = {n: sample[n].half() for n in ("q", "k", "g")}
    v = torch.where(sample["v"] > 0, 65504.0, 65000.0).half()
    (o,) = SPEC.fn(**sample.replace(**half, v=v).args, **sample.kwargs, backend=backend)
    assert bool((o >= v.min()).all()) and bool((o <= v.max()).all())
    v = sample["v"] * 1e-38
    (o,) = SPEC.fn(**sample.replace(v=v).args, **sample.kwargs, backend=backend)
    wide = sample.replace(v=v).to(torch.float64, ("q", "k", "v", "g")).args
    (expected,) = oracle(**wide, **sample.kwargs)
    assert_close(o.double(), expected, 5e-6)
    (o,) = SPEC.fn(**sample.args, **sample.kwargs, backend=backend)
    slack = 1e-6 * float(sample["v"].abs().max())
    least, most = sample["v"].cummin(1).values, sample["v"].cummax(1).values
    assert bool((o >= least - slack).all()) and bool((o <= most + slack).all())


@backend_params(STEM, *KERNELS)
def test_large_keys_under_decay(backend: str, device: str) -> None:
    """A key that overflows when the decay of its chunk is divided out: every token has its own small error."""
    sample = draw(Sampler(device=device), "keys", 40, (1, 1, 1, 1), 4, 3, batch=1, final=False)
    g, k = torch.zeros_like(sample["g"]), sample["k"].clone()
    g[:, 16:31], k[:, 31] = -2.5, k[:, 31] * 1e30
    large = sample.replace(g=g, k=k)
    (o,) = SPEC.fn(**large.args, final=False, backend=backend)
    (expected,) = oracle(**large.to(torch.float64, ("q", "k", "v", "g")).args, final=False)
    for t in range(40):
        assert_close(o[:, t].double(), expected[:, t], 1e-5, f"token {t}")


@backend_params(STEM, *KERNELS)
@pytest.mark.parametrize("steep", [slice(1, 16), slice(17, 32)])
def test_decay_in_half_a_chunk(backend: str, device: str, steep: slice) -> None:
    """Beyond the range of float32 on one side of the chunk's middle, so that only queries or only keys overflow."""
    sample = draw(Sampler(device=device), "half", 40, (1, 1, 1, 1), 4, 3, batch=1, normalize=True)
    g = torch.zeros_like(sample["g"])
    g[:, steep] = -6.0
    agree(sample.replace(g=g), backend)


@pytest.mark.heavy
@backend_params(STEM, "native", "triton")
def test_one_graph_for_every_length(backend: str) -> None:
    """fullgraph and dynamic: three lengths, one graph; steps in place inside of it change the caller's states."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, ...]:
        o, (s, z) = subquad.gated_linear_attention(q, k, v, g, normalize=True, output_final_state=True, backend=backend)
        last = [x[:, -1] for x in (q, k, v, g)]
        return o, subquad.gated_linear_attention_step(*last, s, z=z, backend=backend), s, z

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for tokens in (7, 19, 33):
        sample = draw(Sampler(), "compiled", tokens, (2, 1, 1, 1), 6, 5, batch=1, normalize=True)
        rows = [sample[n] for n in ("q", "k", "v", "g")]
        for one, two in zip(compiled(*rows), run(*rows), strict=True):
            assert_close(one, two, 1e-6)
        graphs.append(counter.frame_count)  # may be 2 at first: Dynamo starts over for a dynamic float
    assert graphs[0] == graphs[-1], graphs

    torch._dynamo.reset()
    step = torch.compile(
        lambda rows, s, z: subquad.gated_linear_attention_step(*rows, s, z=z, backend=backend), fullgraph=True
    )
    states = [(torch.rand(1, 1, 6, 5, generator=g), torch.rand(1, 1, 6, generator=g)) for g in
              (torch.Generator().manual_seed(0) for _ in range(2))]  # fmt: skip
    last = [x[:, -1] for x in rows]
    assert_close(step(last, *states[0]), subquad.gated_linear_attention_step(*last, states[1][0], z=states[1][1]), 1e-6)
    for one, two in zip(*states, strict=True):
        assert_close(one, two, 1e-6)


@backend_params(STEM, *KERNELS)
def test_inference_mode_and_autocast(backend: str, device: str) -> None:
    sample = draw(Sampler(device=device), "modes", 18, (2, 1, 1, 1), 6, 5, batch=1, normalize=True, state=True)
    expected = SPEC.fn(**sample.args, **sample.kwargs, backend=backend)
    rows = [sample[n][:, 0] for n in ("q", "k", "v", "g")]
    states = sample["s0"].clone(), sample["z0"].clone()
    with torch.inference_mode():
        for one, two in zip(SPEC.fn(**sample.args, **sample.kwargs, backend=backend), expected, strict=True):
            assert_same_bits(one, two)
        subquad.gated_linear_attention_step(*rows, states[0], z=states[1], backend=backend)
    assert not torch.equal(states[0], sample["s0"])
    leaves = {n: x.clone().requires_grad_() for n, x in sample.args.items() if x is not None}
    with torch.autocast(device, dtype=torch.bfloat16):
        low = SPEC.fn(**leaves, **sample.kwargs, backend=backend)
    assert [x.dtype for x in low] == [torch.bfloat16, torch.float32, torch.float32]
    cast = sample.to(torch.bfloat16, ("q", "k", "v"))
    for one, two in zip(low, SPEC.fn(**cast.args, **cast.kwargs, backend=backend), strict=True):
        assert_same_bits(one, two)
    grads = torch.autograd.grad([x.float().sum() for x in low], tuple(leaves.values()))
    assert all(g.dtype is torch.float32 and bool(g.isfinite().all()) for g in grads)


@backend_params(STEM, "native")
def test_gate_gradients_that_cancel(backend: str) -> None:
    """Over 8192 tokens of nearly equal queries and keys dg is the small difference of sums of q dq and k dk."""
    generator = torch.Generator().manual_seed(0)
    q, k = (1 + 1e-3 * torch.randn(1, 8192, 1, 4, generator=generator) for _ in range(2))
    v = torch.randn(1, 8192, 1, 3, generator=generator)
    g = -0.002 * torch.rand(1, 8192, 1, 4, generator=generator)
    leaves = [x.requires_grad_() for x in (q, k, v, g)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    o, _ = subquad.gated_linear_attention(*leaves, normalize=True, eps=0.0, backend=backend)
    upstream = torch.cos(torch.arange(o.numel(), dtype=torch.float64)).view(o.shape)
    grads = torch.autograd.grad(o, leaves, upstream.float())
    expected = torch.autograd.grad(chunked(*wide), wide, upstream)
    for name, one, two, bound in zip("qkvg", grads, expected, (2e-4, 1e-5, 1e-5, 3e-5), strict=True):
        assert relative_l2(one, two) <= bound, (name, relative_l2(one, two))


def test_second_derivatives_of_the_references() -> None:
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64).requires_grad_()

    attention = reference.gated_linear_attention.gated_linear_attention
    rows = new(1, 3, 2, 2), new(1, 3, 1, 2), new(1, 3, 2, 1), (-new(1, 3, 1, 2)).detach().requires_grad_()
    states = new(1, 2, 2, 1), new(1, 2, 2)
    convolution = reference.causal_conv1d.causal_conv1d
    for function, leaves in (
        (lambda q, k, v, g, s, z: attention(q, k, v, g, s, z, None, 0.7, 1e-3, True), (*rows, *states)),
        (lambda x, w, b, s: convolution(x, w, b, s, silu=True), (new(1, 4, 2), new(2, 3), new(2), new(1, 2, 2))),
        (lambda x, w: reference.feature_map.feature_map(x, w), (new(1, 2, 1, 3), new(1, 3, 2))),
    ):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)
