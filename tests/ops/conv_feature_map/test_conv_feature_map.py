"""The fused convolution and feature map: the generic tests, and what is true of it alone."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import subquad
from subquad.contract import HANDLES
from subquad.reference.feature_map import KINDS
from subquad.testing import Sample, Sampler, Task, assert_same_bits, backend_params, generic_tests, strategies
from subquad.testing.checks import CHECKS
from subquad.testing.compare import assert_close, assert_rounded
from subquad.testing.specs.conv_feature_map import FLOATS, SPEC, SPECS, draw, oracle

EXAMPLES = {"native": 60, "simt": 15, "triton": 3, "reference": 10}
WIDEST = {"native": 100, "simt": 40, "triton": 40, "reference": 100}
STEM = "conv_feature_map"


@generic_tests(*SPECS)
def test_generic(task: Task, device: str) -> None:
    task.run(device)


@st.composite
def problems(draw_: st.DrawFn, widest: int) -> Sample:
    """Everything free: lengths, widths, taps, shared heads and maps, states, packed sequences, kind, dtype."""
    sampler = Sampler(draw_(strategies.dtypes(SPEC)), seed=draw_(strategies.seeds()))
    tokens, taps = draw_(strategies.extents(1, 70)), draw_(st.integers(1, 8))
    groups, sharing = draw_(st.sampled_from((1, 1, 2, 3))), draw_(st.sampled_from((1, 1, 2)))
    kind = draw_(st.sampled_from(KINDS))
    cu = None
    if draw_(st.booleans()):
        cu = [0, *sorted(draw_(st.lists(st.integers(0, tokens), max_size=6))), tokens]
    options = {"output_final_state": True} if draw_(st.booleans()) else {}
    return draw(
        sampler, "random", 1 if cu else draw_(st.integers(1, 2)), tokens, groups * sharing * draw_(st.integers(1, 2)),
        draw_(strategies.extents(1, widest)), draw_(strategies.extents(1, widest)), taps, groups=groups, sharing=sharing,
        bias=draw_(st.booleans()), state=taps > 1 and draw_(st.booleans()), cu_seqlens=cu, kind=kind,
        fullspace=kind == "hedgehog2" or draw_(st.booleans()), activation=draw_(st.sampled_from((None, "silu"))), **options,
    )  # fmt: skip


@backend_params(STEM)
def test_random_problems(backend: str) -> None:
    @settings(max_examples=EXAMPLES[backend])
    @given(problems(WIDEST[backend]))
    def run(sample: Sample) -> None:
        fixed = dataclasses.replace(SPEC, samples=lambda _: [sample])
        for check in ("forward", "gradients"):
            Task(fixed, CHECKS[check], backend, sample["x"].dtype).run()

    run()


def case(
    dtype: torch.dtype = torch.float32, batch: int = 2, tokens: int = 37, **options: Any
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, options) of a call with 6 heads of 20, every third of which has an input of its own."""
    full: dict[str, Any] = {"groups": 3, "bias": True, "state": True, **options}
    sample = draw(Sampler(dtype), "case", batch, tokens, 6, 20, 12, **full)
    return {name: sample[name] for name in FLOATS if sample.args[name] is not None}, dict(sample.kwargs)


def separate(
    tensors: dict[str, torch.Tensor], backend: str, activation: str | None = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The two ops."""
    x, maps = tensors["x"], tensors["fm_weight"]
    width, heads = x.shape[3], tensors["conv_weight"].shape[0] // x.shape[3]
    y, final = subquad.causal_conv1d(
        x.flatten(2), tensors["conv_weight"], tensors["conv_bias"], initial_state=tensors["initial_state"],
        output_final_state=True, activation=activation, channel_groups=heads // x.shape[2], head_dim=width, backend=backend,
        cu_seqlens=options.pop("cu_seqlens", None),
    )  # fmt: skip
    weight = maps.repeat_interleave(heads // maps.shape[0], 0)
    return subquad.feature_map(y.unflatten(2, (heads, width)), weight, backend=backend, **options), final


@backend_params(STEM)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("sharing", [1, 2])
def test_equals_the_two_ops(backend: str, activation: str | None, sharing: int) -> None:
    """In float32, to the last bits."""
    tensors, _ = case(sharing=sharing)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    options: dict[str, Any] = {"activation": activation, "backend": backend}
    fused = subquad.conv_feature_map(**leaves, output_final_state=True, **options)
    parts = separate(leaves, **options)
    torch.testing.assert_close(fused[0], parts[0], rtol=2e-6, atol=1e-8)
    assert fused[1] is not None and parts[1] is not None
    assert_same_bits(fused[1], parts[1])
    upstream = [torch.randn_like(y) for y in parts]
    got = torch.autograd.grad(fused, tuple(leaves.values()), upstream)
    wanted = torch.autograd.grad(parts, tuple(leaves.values()), upstream)
    for name, a, b in zip(leaves, got, wanted, strict=True):
        assert_close(a, b, 2e-6, name)


@backend_params(STEM)
@pytest.mark.parametrize("batch", [1, 3])
def test_chunks(backend: str, batch: int) -> None:
    """The sums of a matrix's gradient go over several chunks, whose tiles end where a row of the batch does."""
    sample = draw(Sampler(), "chunks", batch, 300 // batch + 1, 1, 5, 3, state=True, bias=True)
    fixed = dataclasses.replace(SPEC, samples=lambda _: [sample])
    Task(fixed, CHECKS["gradients"], backend, torch.float32).run()


@backend_params(STEM)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_rounded_once(backend: str, dtype: torch.dtype) -> None:
    """The convolution is not rounded before the map: every feature is the float64 result rounded, which two ops' are not."""
    tensors, _ = case(dtype)
    phi, _ = subquad.conv_feature_map(**tensors, backend=backend)
    exact = oracle(**{name: t.double() for name, t in tensors.items()})
    assert_rounded(phi, exact)
    parts, _ = separate(tensors, backend)
    with pytest.raises(AssertionError):
        assert_rounded(parts, exact)


@backend_params(STEM)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 15, 16, 17, 31, 33, 64, 65])
def test_pieces_make_the_whole(backend: str, tokens: int) -> None:
    """Split anywhere, through the state: the same bits as in one call."""
    tensors, _ = case(tokens=tokens)
    x, state = tensors.pop("x"), tensors.pop("initial_state")
    options: dict[str, Any] = {**tensors, "output_final_state": True, "activation": "silu", "backend": backend}
    whole, last = subquad.conv_feature_map(x, initial_state=state, **options)
    cut = tokens // 3
    first, middle = subquad.conv_feature_map(x[:, :cut], initial_state=state, **options)
    rest, end = subquad.conv_feature_map(x[:, cut:], initial_state=middle, **options)
    pieces = torch.cat([first, rest], 1)
    if backend in ("reference", "triton"):  # torch, and numpy in Triton's interpreter, round products by position
        torch.testing.assert_close(pieces, whole)
    else:
        assert_same_bits(pieces, whole)
    assert last is not None and end is not None
    assert_same_bits(end, last)


@backend_params(STEM)
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_packed_sequences_are_separate(backend: str, integers: torch.dtype) -> None:
    """The bits of each sequence alone; NaN and infinite weights do not cross a boundary, nor reach taps that do not exist."""
    bounds = [0, 0, 1, 3, 40, 40, 43, 66, 66]
    tensors, _ = case(batch=1, tokens=66, state=False)
    x = tensors.pop("x")
    cu = torch.tensor(bounds, dtype=integers)
    options: dict[str, Any] = {"output_final_state": True, "backend": backend}
    together, states = subquad.conv_feature_map(x, **tensors, cu_seqlens=cu, **options)
    assert states is not None
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        alone, state = subquad.conv_feature_map(x[:, start:end], **tensors, **options)
        assert state is not None
        if backend in ("reference", "triton"):
            torch.testing.assert_close(together[:, start:end], alone)
        else:
            assert_same_bits(together[:, start:end], alone)
        assert_same_bits(states[n : n + 1], state)
    bad = x.clone()
    bad[:, 3:40] = math.nan
    poisoned, _ = subquad.conv_feature_map(bad, **tensors, cu_seqlens=cu, **options)
    assert_same_bits(poisoned[:, :3], together[:, :3])
    assert_same_bits(poisoned[:, 40:], together[:, 40:])
    assert bool(poisoned[:, 3:40].isnan().all())
    tensors["conv_weight"][:, 0] = math.inf
    begun, _ = subquad.conv_feature_map(x, **tensors, cu_seqlens=cu, **options)
    assert bool(begun[:, 40:43].isfinite().all()) and bool(begun[:, 43:66][:, 3:].isnan().all())


@backend_params(STEM)
def test_nan_stays_in_reach(backend: str) -> None:
    """Of one head and the tokens that the taps reach; of one map in the heads that share it."""
    tensors, _ = case(sharing=2)
    x = tensors["x"]
    clean, _ = subquad.conv_feature_map(**tensors, backend=backend)
    bad = x.clone()
    bad[1, 5, 1, 7] = math.nan
    phi, _ = subquad.conv_feature_map(**{**tensors, "x": bad}, backend=backend)
    reached = torch.zeros(phi.shape[:3], dtype=torch.bool)
    reached[1, 5:9, 3:] = True
    assert torch.equal(phi.isnan().all(-1), reached) and torch.equal(phi.isnan().any(-1), reached)
    assert_same_bits(phi[~reached], clean[~reached])
    maps = tensors["fm_weight"].clone()
    maps[1, 0, 0] = math.nan
    phi, _ = subquad.conv_feature_map(**{**tensors, "fm_weight": maps}, backend=backend)
    reached = torch.zeros(phi.shape[:3], dtype=torch.bool)
    reached[:, :, 2:4] = True
    assert torch.equal(phi.isnan().any(-1), reached)


@backend_params(STEM)
def test_shared_heads_and_maps_equal_repeated_ones(backend: str) -> None:
    tensors, _ = case(sharing=3, state=False)
    phi, _ = subquad.conv_feature_map(**tensors, backend=backend)
    repeated = {
        **tensors,
        "x": tensors["x"].repeat_interleave(3, 2),
        "fm_weight": tensors["fm_weight"].repeat_interleave(3, 0),
    }
    assert_same_bits(phi, subquad.conv_feature_map(**repeated, backend=backend)[0])


@backend_params(STEM)
def test_weight_of_a_module_and_wider_state(backend: str) -> None:
    """conv_weight [D, 1, W] as nn.Conv1d has it; a state of width W, whose first column is ignored."""
    tensors, _ = case()
    expected, _ = subquad.conv_feature_map(**tensors, backend=backend)
    wide = torch.cat([torch.full((2, 40, 1), math.nan), tensors["initial_state"]], 2)
    changed = {**tensors, "conv_weight": tensors["conv_weight"][:, None], "initial_state": wide}
    assert_same_bits(subquad.conv_feature_map(**changed, backend=backend)[0], expected)


@backend_params(STEM)
def test_gradients_of_empty_and_short_sequences(backend: str) -> None:
    """An empty sequence hands its state through, and the gradient back."""
    tensors, options = case(batch=1, tokens=1, cu_seqlens=[0, 0, 1, 1])
    state = tensors["initial_state"].requires_grad_()
    _, final = subquad.conv_feature_map(**tensors, **options, output_final_state=True, backend=backend)
    assert final is not None
    grad = torch.randn_like(final)
    (dstate,) = torch.autograd.grad(final, state, grad)
    for n in (0, 2):
        assert_same_bits(final[n], state[n])
        assert_same_bits(dstate[n], grad[n])
    assert_same_bits(dstate[1], torch.cat([torch.zeros(40, 1), grad[1, :, :2]], 1))


# --- bad input ----------------------------------------

ONES: dict[str, Any] = {
    "x": torch.ones(1, 4, 2, 3), "conv_weight": torch.ones(12, 4), "fm_weight": torch.ones(4, 3, 5), "backend": "reference",
}  # fmt: skip
BAD = {
    "x list": ({"x": [1.0]}, TypeError, r"x: expected a torch.Tensor, got list"),
    "x dims": ({"x": torch.ones(4, 6)}, ValueError, r"x: expected shape \[B, T, Hx, d\] .*got \[4, 6\]"),
    "x wide": ({"x": torch.ones(1, 4, 2, 257)}, ValueError, r"x: expected shape .* d in 1..256, got"),
    "taps": ({"conv_weight": torch.ones(12, 9)}, ValueError, r"conv_weight: expected shape .*1..8, got \[12, 9\]"),
    "channels": (
        {"conv_weight": torch.ones(9, 4)},
        ValueError,
        r"conv_weight: expected shape \[H \* 3, W\].*got \[9, 4\]",
    ),
    "none": ({"conv_weight": torch.ones(0, 4)}, ValueError, r"conv_weight: expected shape .*got \[0, 4\]"),
    "bias": ({"conv_bias": torch.ones(6)}, ValueError, r"conv_bias: expected shape \[12\], got \[6\]"),
    "maps dims": ({"fm_weight": torch.ones(3, 5)}, ValueError, r"fm_weight: expected shape \[M, 3, f\].*got \[3, 5\]"),
    "maps width": ({"fm_weight": torch.ones(4, 2, 5)}, ValueError, r"fm_weight: expected shape \[M, 3, f\]"),
    "maps count": ({"fm_weight": torch.ones(3, 3, 5)}, ValueError, r"fm_weight: .* M a divisor of the 4 heads"),
    "maps none": ({"fm_weight": torch.ones(0, 3, 5)}, ValueError, r"fm_weight: .* M a divisor of the 4 heads"),
    "maps wide": ({"fm_weight": torch.ones(4, 3, 257)}, ValueError, r"fm_weight: expected shape .* f in 1..256"),
    "maps dtype": ({"fm_weight": torch.ones(4, 3, 5).half()}, TypeError, r"fm_weight: expected torch.float32 as x has"),
    "state": ({"initial_state": torch.ones(1, 6, 2)}, ValueError, r"initial_state: expected shape \[1, 6, 3\], got"),
    "activation": ({"activation": "relu"}, ValueError, r"activation: expected None, 'silu' or 'swish', got 'relu'"),
    "final": ({"output_final_state": 1}, TypeError, r"output_final_state: expected a bool"),
    "cu": ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, r"cu_seqlens: expected numbers from 0 to 4 .*, got"),
    "kind": ({"kind": "elu"}, ValueError, r"kind: expected one of 'softmax', .*got 'elu'"),
    "half": ({"kind": "hedgehog2", "fullspace": False}, ValueError, r"fullspace: expected True with kind 'hedgehog2'"),
    "eps": ({"eps": -1.0}, ValueError, r"eps: expected a finite number that is not negative, got -1.0"),
    "backend": ({"backend": "cuda"}, ValueError, r"backend: expected one of"),
}


@pytest.mark.parametrize(("changes", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_input(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        subquad.conv_feature_map(**{**ONES, **changes})


RAW = {
    "x dims": ({"x": torch.ones(1, 4, 2, 3)}, "x"),
    "x strides": ({"x": torch.ones(1, 6, 4).mT}, "x"),
    "taps": ({"conv_weight": torch.ones(12, 9)}, "conv_weight"),
    "conv strides": ({"conv_weight": torch.ones(4, 12).t()}, "conv_weight"),
    "bias": ({"conv_bias": torch.ones(6)}, "conv_bias"),
    "maps dims": ({"fm_weight": torch.ones(3, 5)}, "fm_weight"),
    "maps wide": ({"fm_weight": torch.ones(4, 3, 257)}, "fm_weight"),
    "maps count": ({"fm_weight": torch.ones(3, 3, 5)}, "fm_weight"),
    "maps none": ({"fm_weight": torch.ones(0, 3, 5)}, "fm_weight"),
    "maps dtype": ({"fm_weight": torch.ones(4, 3, 5).half()}, "fm_weight"),
    "maps strides": ({"fm_weight": torch.ones(4, 5, 3).mT}, "fm_weight"),
    "state": ({"initial_state": torch.ones(2, 6, 3)}, "initial_state"),
    "groups": ({"groups": 1}, "(head_dim|conv_weight)"),
    "kind": ({"kind": 5}, "kind"),
    "half": ({"kind": 4, "fullspace": False}, "fullspace"),
}


@backend_params(STEM, "native", "simt", "triton")
def test_backward_protects_memory(backend: str) -> None:
    arguments = (
        torch.ones(1, 4, 6), torch.ones(12, 4), torch.ones(4, 3, 5), None, None, None, None, 2, False, 0, True, 1e-12,
    )  # fmt: skip
    op = HANDLES[backend]["conv_feature_map_bwd"]
    phi, final = torch.ones(1, 4, 4, 10), torch.ones(1, 6, 3)
    assert [g.shape for g in op(phi, final, *arguments)] == [(1, 4, 6), (12, 4), (4, 3, 5), (0,), (0,)]
    for name, call in {
        "grad_phi": (phi[:, :3], final), "grad_final": (phi, final[:, :5]), "fm_weight": (phi, None),
    }.items():  # fmt: skip
        changed = list(arguments)
        if name == "fm_weight":
            changed[2] = torch.ones(3, 3, 5)
        with pytest.raises((RuntimeError, ValueError), match=rf"\b{name}: "):
            op(*call, *changed)
    with pytest.raises((RuntimeError, ValueError), match=r"\bgrad_phi: "):
        op(phi.half(), None, *arguments)


@backend_params(STEM, "native", "simt", "triton")
@pytest.mark.parametrize(("changes", "name"), RAW.values(), ids=RAW)
def test_operators_protect_memory(backend: str, changes: dict[str, Any], name: str) -> None:
    call: dict[str, Any] = {
        "x": torch.ones(1, 4, 6), "conv_weight": torch.ones(12, 4), "fm_weight": torch.ones(4, 3, 5), "conv_bias": None,
        "initial_state": None, "cu_seqlens": None, "sequence": None, "groups": 2, "silu": False, "kind": 0,
        "fullspace": True, "eps": 1e-12, "output_final_state": False,
    }  # fmt: skip
    op = HANDLES[backend]["conv_feature_map_fwd"]
    assert op(**call)[0].shape == (1, 4, 4, 10)
    with pytest.raises((RuntimeError, ValueError), match=rf"\b{name}: "):
        op(**{**call, **changes})
