"""Causal convolution and its decoding step: the generic tests of both specs, and what is true of them alone."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import subquad
from subquad import reference
from subquad.testing import Sample, Sampler, Task, assert_same_bits, backend_params, generic_tests, strategies
from subquad.testing.case import Case
from subquad.testing.checks import CHECKS
from subquad.testing.specs.causal_conv1d import CONV, SPECS, draw


@generic_tests(*SPECS)
def test_generic(task: Task, device: str) -> None:
    task.run(device)


@st.composite
def problems(draw_: st.DrawFn, largest: int) -> Sample:
    """Everything free: lengths, widths, taps, groups, states, packed sequences, dtype."""
    sampler = Sampler(draw_(strategies.dtypes(CONV)), seed=draw_(strategies.seeds()))
    tokens, taps = draw_(strategies.extents(1, largest)), draw_(st.integers(1, 8))
    groups = draw_(st.sampled_from((1, 1, 2, 3)))
    head = draw_(st.sampled_from((1, 4, 5, 8)))
    channels = head * groups * draw_(st.integers(1, 4)) if groups > 1 else draw_(strategies.extents(1, 80))
    cu = None
    if draw_(st.booleans()):
        cu = [0, *sorted(draw_(st.lists(st.integers(0, tokens), max_size=6))), tokens]
    options = {"output_final_state": True} if draw_(st.booleans()) else {}
    return draw(
        sampler, "random", 1 if cu else draw_(st.integers(1, 2)), tokens, channels, taps, groups=groups, head_dim=head,
        bias=draw_(st.booleans()), state=taps > 1 and draw_(st.booleans()), residual=draw_(st.booleans()), cu_seqlens=cu,
        activation=draw_(st.sampled_from((None, "silu"))), **options,
    )  # fmt: skip


@backend_params("causal_conv1d")
def test_random_problems(backend: str) -> None:
    """Against the oracle, elementwise; sums that cancel are judged beside the largest element."""

    @settings(max_examples={"native": 80, "simt": 30, "triton": 8, "reference": 10}[backend])
    @given(problems(40 if backend == "triton" else 200))
    def run(sample: Sample) -> None:
        case = Case(CONV, backend, sample["x"].dtype)
        results = [*case.call(sample), *case.gradients(sample).values()]
        wide = case.wide(sample)
        leaves = case.leaves(wide)
        outputs = case.reference(wide, **leaves)
        upstream = [g.to(y.dtype) for g, y in zip(case.upstream(case.call(sample)), outputs, strict=True)]
        reached = [(y, g) for y, g in zip(outputs, upstream, strict=True) if y.requires_grad]
        grads = torch.autograd.grad([y for y, _ in reached], tuple(leaves.values()), [g for _, g in reached])
        atol = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[sample["x"].dtype]
        for actual, expected in zip(results, (*outputs, *grads), strict=True):
            scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
            assert float((actual.double() - expected).abs().max() if expected.numel() else 0.0) <= atol * scale

    run()


@pytest.mark.quick
@backend_params("causal_conv1d")
def test_a_row_beyond_whole_tiles(backend: str) -> None:
    """Several tiles of rows and channels, the last of one row; a residual that is a part of something wider."""
    sample = draw(
        Sampler(),
        "tiles",
        1,
        65,
        70,
        3,
        bias=True,
        state=True,
        residual=True,
        activation="silu",
        output_final_state=True,
    )
    sample = sample.replace(residual=torch.cat([sample["residual"]] * 2, 2)[:, :, :70])
    spec = dataclasses.replace(CONV, samples=lambda _: [sample])
    for check in ("forward", "gradients"):
        Task(spec, CHECKS[check], backend, torch.float32).run()


@backend_params("causal_conv1d", "native")
def test_a_step_of_more_channels_than_a_work_item(backend: str) -> None:
    x, state, weight = torch.randn(2, 600), torch.randn(2, 600, 3), torch.randn(600, 4)
    found, expected = (
        (subquad.causal_conv1d_update(x, past, weight, backend=name), past)
        for name, past in ((backend, state.clone()), ("reference", state.clone()))
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@backend_params("causal_conv1d")
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 15, 16, 17, 63, 64, 65, 129])
def test_pieces_make_the_whole(backend: str, tokens: int) -> None:
    """Split anywhere, through the state, and token by token: the same bits as in one call."""
    s = Sampler()
    x, w, b = s.normal(2, tokens, 12), s.normal(12, 4), s.normal(12)
    zero = torch.zeros(2, 12, 3)
    options = {"activation": "silu", "backend": backend}
    whole, last = subquad.causal_conv1d(x, w, b, initial_state=zero, output_final_state=True, **options)
    cut = tokens // 3
    first, state = subquad.causal_conv1d(x[:, :cut], w, b, initial_state=zero, output_final_state=True, **options)
    rest, end = subquad.causal_conv1d(x[:, cut:], w, b, initial_state=state, output_final_state=True, **options)
    pieces = torch.cat([first, rest], 1)
    if backend == "reference":  # torch's silu rounds by position
        torch.testing.assert_close(pieces, whole)
    else:
        assert_same_bits(pieces, whole)
    assert_same_bits(end, last)
    state = zero.clone()
    steps = [subquad.causal_conv1d_update(x[:, t], state, w, b, **options) for t in range(min(tokens, 17))]
    torch.testing.assert_close(torch.stack(steps, 1), whole[:, :17])
    if tokens <= 17:
        assert_same_bits(state, last)


@backend_params("causal_conv1d")
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_packed_sequences_are_separate(backend: str, integers: torch.dtype) -> None:
    """The bits of each sequence alone; NaN and infinite weights do not cross a boundary, nor reach taps that do not exist."""
    s = Sampler()
    bounds = [0, 0, 1, 3, 64, 64, 67, 130, 130]
    x, w = s.normal(1, 130, 9), s.normal(9, 4)
    cu = torch.tensor(bounds, dtype=integers)
    options: dict[str, Any] = {"output_final_state": True, "backend": backend}
    together, states = subquad.causal_conv1d(x, w, cu_seqlens=cu, **options)
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        alone, state = subquad.causal_conv1d(x[:, start:end], w, **options)
        assert_same_bits(together[:, start:end], alone)
        assert_same_bits(states[n : n + 1], state)
    bad = x.clone()
    bad[:, 3:64] = float("nan")
    poisoned, _ = subquad.causal_conv1d(bad, w, cu_seqlens=cu, **options)
    assert_same_bits(poisoned[:, :3], together[:, :3])
    assert_same_bits(poisoned[:, 64:], together[:, 64:])
    w[:, 0] = float("inf")
    begun, _ = subquad.causal_conv1d(x, w, cu_seqlens=cu, **options)
    assert bool(begun[:, 64:67].isfinite().all()) and not bool(begun[:, 67:130][:, 3:].isfinite().any())


@backend_params("causal_conv1d")
def test_gradients_of_empty_and_short_sequences(backend: str) -> None:
    """An empty sequence hands its state through, and the gradient back; a short one hands on a part."""
    s = Sampler()
    state = s.normal(3, 6, 3).requires_grad_()
    x = s.normal(1, 1, 6).requires_grad_()
    cu = torch.tensor([0, 0, 1, 1])
    _, final = subquad.causal_conv1d(
        x, s.normal(6, 4), initial_state=state, cu_seqlens=cu, output_final_state=True, backend=backend
    )
    assert final is not None
    grad = s.normal(3, 6, 3)
    dstate, dx = torch.autograd.grad(final, (state, x), grad)
    for n in (0, 2):
        assert_same_bits(final[n], state[n])
        assert_same_bits(dstate[n], grad[n])
    assert_same_bits(dstate[1], torch.cat([torch.zeros(6, 1), grad[1, :, :2]], 1))
    assert_same_bits(dx[0, 0], grad[1, :, 2])


@backend_params("causal_conv1d")
def test_shared_inputs_equal_repeated_ones(backend: str) -> None:
    s = Sampler()
    x, w = s.normal(2, 37, 16), s.normal(48, 4)
    y, _ = subquad.causal_conv1d(x, w, channel_groups=3, head_dim=8, backend=backend)
    repeated = x.unflatten(2, (2, 8)).repeat_interleave(3, 2).flatten(2)
    assert_same_bits(y, subquad.causal_conv1d(repeated, w, backend=backend)[0])


@backend_params("causal_conv1d")
def test_against_torch(backend: str) -> None:
    """F.conv1d of a padded input; weight [D, 1, W]; strides of batch and time."""
    s = Sampler()
    w, b = s.normal(7, 1, 4), s.normal(7)
    x = s.normal(19, 3, 11)[:, :, 2:9].transpose(0, 1)
    expected = F.silu(F.conv1d(x.transpose(1, 2), w, b, padding=3, groups=7)[..., :19]).transpose(1, 2)
    torch.testing.assert_close(subquad.causal_conv1d(x, w, b, activation="swish", backend=backend)[0], expected)


@backend_params("causal_conv1d")
def test_flas_wider_state(backend: str) -> None:
    s = Sampler()
    x, w, state = s.normal(2, 5, 6), s.normal(6, 4), s.normal(2, 6, 4)
    state[:, :, 0] = float("nan")
    y, _ = subquad.causal_conv1d(x, w, initial_state=state, backend=backend)
    assert_same_bits(y, subquad.causal_conv1d(x, w, initial_state=state[:, :, 1:], backend=backend)[0])


@backend_params("causal_conv1d")
def test_update_in_place_on_any_strides(backend: str) -> None:
    """Views, rings and pools: what is not named keeps its bits, also between the elements of a view."""
    s = Sampler()
    storage = s.normal(6, 5, 14)
    before = storage.clone()
    pool = storage[:, :, 1:11:2].transpose(1, 2)  # [6, 5 channels, 5 slots]
    x, w = s.normal(3, 2, 5), s.normal(5, 4)
    indices, seen = torch.tensor([4, -1, 1], dtype=torch.int32), torch.tensor([3, 8, 11], dtype=torch.int32)
    y, expected = reference.causal_conv1d.causal_conv1d_update(x, pool, w, None, None, seen, indices)
    actual = subquad.causal_conv1d_update(x, pool, w, cache_seqlens=seen, conv_state_indices=indices, backend=backend)
    torch.testing.assert_close(actual, y)
    assert not actual[1].count_nonzero()
    assert_same_bits(pool, expected)
    pool.copy_(before[:, :, 1:11:2].transpose(1, 2))
    assert_same_bits(storage, before)


def test_update_refuses_gradients() -> None:
    x, w, state = torch.ones(1, 2), torch.ones(2, 4, requires_grad=True), torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=r"^weight: expected a tensor without requires_grad"):
        subquad.causal_conv1d_update(x, state, w, backend="reference")
    with torch.no_grad():
        subquad.causal_conv1d_update(x, state, w, backend="reference")
    assert_same_bits(state, torch.tensor([[[0.0, 0.0, 1.0]] * 2]))


ONES = {"x": torch.ones(1, 4, 6), "weight": torch.ones(6, 4), "backend": "reference"}
BAD = {
    "x dims": ({"x": torch.ones(4, 6)}, ValueError, r"x: expected shape \[B, T, D\], got \[4, 6\]"),
    "weight taps": ({"weight": torch.ones(6, 9)}, ValueError, r"weight: expected shape \[D, W\] .*1..8, got \[6, 9\]"),
    "weight width": ({"weight": torch.ones(5, 4)}, ValueError, r"weight: expected shape \[6, W\].*got \[5, 4\]"),
    "bias": ({"bias": torch.ones(5)}, ValueError, r"bias: expected shape \[6\], got \[5\]"),
    "state": ({"initial_state": torch.ones(1, 6, 2)}, ValueError, r"initial_state: expected shape \[1, 6, 3\], got"),
    "residual": ({"residual": torch.ones(1, 4, 5)}, ValueError, r"residual: expected shape \[1, 4, 6\]"),
    "activation": ({"activation": "relu"}, ValueError, r"activation: expected None, 'silu' or 'swish', got 'relu'"),
    "final": ({"output_final_state": 1}, TypeError, r"output_final_state: expected a bool"),
    "cu dtype": ({"cu_seqlens": torch.ones(2)}, TypeError, r"cu_seqlens: expected int32 or int64, got torch.float32"),
    "cu list": ({"cu_seqlens": [0, 4]}, TypeError, r"cu_seqlens: expected a torch.Tensor, got list"),
    "cu end": ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, r"cu_seqlens: expected numbers from 0 to 4 .*, got"),
    "cu order": (
        {"cu_seqlens": torch.tensor([0, 3, 2, 4])},
        ValueError,
        r"cu_seqlens: expected numbers from 0 to 4 that",
    ),
    "cu batch": (
        {"x": torch.ones(2, 4, 6), "cu_seqlens": torch.tensor([0, 4])},
        ValueError,
        r"cu_seqlens: expected a batch of 1 with packed sequences, got 2",
    ),
    "groups": ({"channel_groups": 0}, ValueError, r"channel_groups: expected at least 1, got 0"),
    "groups type": ({"channel_groups": 2.0}, TypeError, r"channel_groups: expected an int, got float"),
    "head_dim": ({"channel_groups": 2}, ValueError, r"head_dim: expected an int because channel_groups is 2"),
    "head_dim width": ({"channel_groups": 2, "head_dim": 4}, ValueError, r"head_dim: expected a divisor of the 6"),
    "backend": ({"backend": "cuda"}, ValueError, r"backend: expected one of"),
}
UPDATE_BAD = {
    "state": ({"conv_state": torch.ones(1, 6, 2)}, ValueError, r"conv_state: expected shape \[1, 6, L >= 3\], got"),
    "pool": ({"conv_state": torch.ones(2, 6, 3)}, ValueError, r"conv_state: expected shape \[1, 6, L >= 3\], got"),
    "seqlens": (
        {"cache_seqlens": torch.ones(1)},
        TypeError,
        r"cache_seqlens: expected int32 or int64, got torch.float32",
    ),
    "index": (
        {"conv_state_indices": torch.ones(1).int()},
        ValueError,
        r"conv_state_indices: expected numbers in -1\.\.0",
    ),
}


@pytest.mark.parametrize(("changes", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_input(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        subquad.causal_conv1d(**{**ONES, **changes})


@pytest.mark.parametrize(("changes", "kind", "message"), UPDATE_BAD.values(), ids=UPDATE_BAD)
def test_bad_update(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        subquad.causal_conv1d_update(**{**ONES, "x": torch.ones(1, 6), "conv_state": torch.ones(1, 6, 3), **changes})


def test_module_and_compatible_names() -> None:
    """`ShortConvolution` with a cache and padding, and the functions of causal-conv1d in [B, D, T]."""
    torch.manual_seed(0)
    conv = subquad.nn.ShortConvolution(6, 4, bias=True, activation="silu", backend="reference")
    assert {n: list(p.shape) for n, p in conv.state_dict().items()} == {"weight": [6, 1, 4], "bias": [6]}
    x = torch.randn(2, 9, 6)
    y, nothing = conv(x)
    assert nothing is None and y.requires_grad
    with torch.no_grad():
        for cache in (conv.new_state(2), torch.zeros(2, 6, 4)):
            first, same = conv(x[:, :5], cache=cache)
            assert same is cache
            steps = [conv(x[:, t : t + 1], cache=cache)[0] for t in range(5, 9)]
            torch.testing.assert_close(torch.cat([first, *steps], 1), y)
            assert_same_bits(cache, x.transpose(1, 2)[:, :, -cache.shape[2] :].contiguous())
    padded = torch.cat([torch.full((2, 3, 6), float("nan")), x], 1)
    mask = torch.tensor([0, 0, 0, *[1] * 9]).expand(2, 12)
    torch.testing.assert_close(conv(padded, mask=mask)[0][:, 3:], y)
    identity = subquad.nn.ShortConvolution(6, init="identity", backend="reference")
    assert identity.weight[:, 0].tolist() == [[pytest.approx(0.001)] * 3 + [1.0]] * 6

    compat = subquad.compat.causal_conv1d
    w, b = conv.weight[:, 0], conv.bias
    rows = x.transpose(1, 2)
    out, final = compat.causal_conv1d_fn(rows, w, b, return_final_states=True, activation="silu")
    torch.testing.assert_close(out.transpose(1, 2), y)
    assert_same_bits(final, rows[:, :, -3:].contiguous())
    index = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 2, 2, 2, 2, -1, -1, -1]], dtype=torch.int32)
    packed = compat.causal_conv1d_fn(rows, w, b, seq_idx=index, activation="silu").transpose(1, 2)
    torch.testing.assert_close(packed[0, 3:], conv(x[:1, 3:])[0][0])
    torch.testing.assert_close(packed[1, 2:6], conv(x[1:, 2:6])[0][0])
    assert not packed[1, 6:].count_nonzero()
    state = torch.zeros(2, 6, 3)
    step = compat.causal_conv1d_update(rows, state, w.detach(), b.detach(), activation="silu")
    torch.testing.assert_close(step.transpose(1, 2), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 8])
def test_steps_have_the_bits_of_the_whole_sequence(dtype: torch.dtype, taps: int) -> None:
    """One order of the same fused sums; states dense, with channels last, longer than the taps, and a ring."""
    draw = torch.Generator().manual_seed(taps)
    x, weight, bias = (torch.randn(*n, generator=draw).to(dtype) for n in ((19, 13, 277), (277, taps), (277,)))
    expected = subquad.causal_conv1d(x, weight, bias, activation="silu", backend="native")[0]
    dense, longer, ring = (torch.zeros(19, 277, taps - 1 + more, dtype=dtype) for more in (0, 2, 1))
    channels_last = torch.zeros(19, taps - 1, 277, dtype=dtype).transpose(1, 2)
    for t in range(x.shape[1]):
        for state in (dense, longer, channels_last, ring):
            count = torch.full((19,), t, dtype=torch.int32) if state is ring else None
            y = subquad.causal_conv1d_update(
                x[:, t], state, weight, bias, activation="silu", cache_seqlens=count, backend="native"
            )
            assert torch.equal(y, expected[:, t])
    assert torch.equal(dense, x[:, x.shape[1] + 1 - taps :].transpose(1, 2))
    assert torch.equal(channels_last, dense)
