"""What all ops do alike around their mathematics: autocast, layouts, gradients, indices, states, bounds of sequences."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing

import subquad
from subquad import _backends
from subquad._checks import unshared
from subquad.contract import CONTRACTS, HANDLES, OPERATORS
from subquad.ops import _call
from subquad.testing import assert_same_bits, backend_params

STEPS = ("causal_conv1d_update", "gated_linear_attention_step", "lawcat_decode_step")


def step_arguments(name: str, rows: int = 3, pool: int = 5) -> tuple[dict[str, Any], dict[str, torch.Tensor], str]:
    """(arguments without the states, states, name of the indices) of a step."""
    g = torch.Generator().manual_seed(3)

    def new(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=g)

    if name == "causal_conv1d_update":
        return {"x": new(rows, 6), "weight": new(6, 4)}, {"conv_state": new(pool, 6, 3)}, "conv_state_indices"
    if name == "gated_linear_attention_step":
        tensors = {"q": new(rows, 2, 8), "k": new(rows, 2, 8), "v": new(rows, 2, 5), "g": -new(rows, 2, 8)}
        return tensors, {"state": new(pool, 2, 8, 5), "z": new(pool, 2, 8)}, "state_indices"
    tensors = {"q0": new(rows, 2, 8), "k0": new(rows, 2, 8), "v": new(rows, 2, 5), "u": new(rows, 2, 6)}
    tensors |= {"cq": new(16, 4), "ck": new(16, 4), "wphi": new(2, 8, 3)}
    states = {"conv_q": new(pool, 16, 3), "conv_k": new(pool, 16, 3), "state": new(pool, 2, 6, 5), "z": new(pool, 2, 6)}
    return tensors, states, "state_indices"


def run_step(name: str, backend: str, tensors: dict[str, Any], states: dict[str, Any], **options: Any) -> torch.Tensor:
    return getattr(subquad, name)(**tensors, **states, **options, backend=backend)


def copies(states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: state.clone() for name, state in states.items()}


def same(states: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    for name, state in states.items():
        assert_same_bits(state, before[name], name)


# --- autocast ----------------------------------------


@backend_params("cats_mlp", "native", "reference")
def test_autocast_casts_before_it_checks(backend: str) -> None:
    """Mixed dtypes under autocast: float32 activations beside 16-bit weights, as torch's own linear layer takes them."""
    x, w = torch.randn(3, 8), [torch.randn(16, 8).bfloat16() for _ in range(2)]
    down = torch.randn(8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = subquad.cats_mlp(x, *w, down, 0.1, backend=backend)
    assert_same_bits(y, subquad.cats_mlp(x.bfloat16(), *w, down.bfloat16(), 0.1, backend=backend))
    with pytest.raises(TypeError, match=r"^w_gate: expected torch.float32 as x has"):
        subquad.cats_mlp(x, *w, down, 0.1, backend=backend)


@backend_params("cats_mlp", "reference")
def test_autocast_leaves_float64_alone(backend: str) -> None:
    """As torch's own products do: an oracle does not lose its digits to a model's autocast."""
    x, weights = torch.randn(3, 8).double(), [torch.randn(s).double() for s in ((16, 8), (16, 8), (8, 16))]
    outside = subquad.cats_mlp(x, *weights, 0.1, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(subquad.cats_mlp(x, *weights, 0.1, backend=backend), outside)


@backend_params("cats_mlp", "native")
def test_backward_under_autocast_is_that_outside(backend: str) -> None:
    x, gate, up = (torch.randn(s, requires_grad=True) for s in ((20, 8), (16, 8), (16, 8)))
    down = torch.randn(8, 16, requires_grad=True)
    y = subquad.cats_mlp(x, gate, up, down, 0.1, backend=backend)
    upstream = torch.randn_like(y)
    outside = torch.autograd.grad(y, (x, gate, up, down), upstream, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(y, (x, gate, up, down), upstream)
    for a, b in zip(inside, outside, strict=True):
        assert_same_bits(a, b)


@backend_params("gated_linear_attention", "reference", "native")
@pytest.mark.parametrize("op", ["gated_linear_attention", "interval_attention", "conv_feature_map"])
def test_nothing_below_an_op_is_cast_again(op: str, backend: str) -> None:
    q, k, v = (torch.rand(1, 9, 2, 8).bfloat16() for _ in range(3))

    def call() -> torch.Tensor:
        if op == "gated_linear_attention":
            return subquad.gated_linear_attention(q, k, v, normalize=True, backend=backend)[0]
        if op == "interval_attention":
            out = subquad.interval_attention(q, k, v, subquad.IntervalMask.causal(9), backend=backend)
            assert isinstance(out, torch.Tensor)
            return out
        return subquad.conv_feature_map(q, k[0, :, 0].T.repeat(2, 1)[:, :3], v[0, :2].transpose(1, 2), backend=backend)[
            0
        ]

    outside = call()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(call(), outside)


@backend_params("causal_conv1d", "native", "reference")
@pytest.mark.parametrize("name", STEPS)
def test_steps_under_autocast(name: str, backend: str) -> None:
    """The operands are cast, the states keep their dtype: what a layer of mixed precision hands over works in every step."""
    tensors, states, _ = step_arguments(name, pool=3)
    low = torch.bfloat16
    narrow = {n: s.to(low) if n.startswith("conv") else s for n, s in states.items()}
    gates = ("g", "u")
    mixed = {n: x if i % 2 or n in gates else x.to(low) for i, (n, x) in enumerate(tensors.items())}
    expected_states, found_states = copies(narrow), copies(narrow)
    cast = {n: x if n in gates else x.to(low) for n, x in tensors.items()}
    expected = run_step(name, backend, cast, expected_states)
    with torch.autocast("cpu", dtype=low):
        found = run_step(name, backend, mixed, found_states)
    assert_same_bits(found, expected)
    same(found_states, expected_states)


@pytest.mark.heavy
@backend_params("cats_mlp", "native")
def test_compiled_training_under_autocast(backend: str) -> None:
    """The backward, which a compiler traces apart from the autocast it will run under, has the bits of eager code."""
    tensors = [torch.randn(s, requires_grad=True) for s in ((20, 8), (16, 8), (16, 8), (8, 16))]
    compiled = torch.compile(lambda *a: subquad.cats_mlp(*a, 0.3), fullgraph=True, backend="aot_eager")
    found = []
    for function in (lambda *a: subquad.cats_mlp(*a, 0.3), compiled):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = function(*tensors)
        found.append(torch.autograd.grad(y.float().square().sum(), tensors))
    for eager, traced in zip(*found, strict=True):
        assert_same_bits(traced, eager)


@pytest.mark.heavy
@pytest.mark.parametrize("op", ["gated_linear_attention", "interval_attention", "superlinear_attention"])
def test_any_number_of_tokens_compiles_once_and_is_exported(op: str) -> None:
    """Without a backend asked for, and what tracing saw does not stay behind for eager calls."""
    config = subquad.SuperlinearConfig(sw_index=1)

    def call(q: torch.Tensor) -> torch.Tensor:
        if op == "gated_linear_attention":
            return subquad.gated_linear_attention(q, q, q)[0]
        if op == "superlinear_attention":
            return subquad.superlinear_attention(q, q, q, q, config=config)  # type: ignore[return-value]
        out = subquad.interval_attention(q, q, q, subquad.IntervalMask.causal(q.shape[1]))
        assert isinstance(out, torch.Tensor)
        return out

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    with torch.no_grad():
        for tokens in (5, 7, 70, 23):
            q = torch.rand(1, tokens, 2, 8)
            assert_same_bits(compiled(q), call(q))
    assert counter.frame_count <= 2

    class Model(torch.nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return call(q)

    example = torch.rand(1, 6, 2, 8)
    sizes = ({1: torch.export.Dim("tokens", min=2, max=64)},)
    exported = torch.export.export(Model(), (example,), dynamic_shapes=sizes, strict=False)
    assert_same_bits(exported.module()(example), call(example))


def test_meta_tensors_have_shapes() -> None:
    with torch.device("meta"):
        assert subquad.cats_activation(torch.empty(3, 4), 0.1).shape == (3, 4)
        q, state = torch.empty(2, 2, 8), torch.empty(2, 2, 8, 8)
        assert subquad.gated_linear_attention_step(q, q, q, None, state).shape == (2, 2, 8)
        with pytest.raises(ValueError, match=r"^backend: got 'native' .* on meta, .* kernels for cpu and cuda only"):
            subquad.cats_activation(q, 0.1, backend="native")


@backend_params("interval_attention", "native", "reference")
def test_no_tokens_with_strides_of_another_layout(backend: str) -> None:
    """A tensor without elements is contiguous to PyTorch whatever its strides are."""
    q, k, v = (torch.rand(1, t, 8, 2).transpose(2, 3).requires_grad_() for t in (0, 5, 5))
    out = subquad.interval_attention(q, k, v, subquad.IntervalMask.full(0, 5), backend=backend)
    grads = torch.autograd.grad(out, (q, k, v), torch.empty(1, 0, 2, 8))
    assert out.shape == (1, 0, 2, 8) and [g.shape for g in grads] == [q.shape, k.shape, v.shape]
    assert not any(g.any() for g in grads)


@backend_params("gated_linear_attention", "native", "reference")
def test_gradients_of_no_sequences(backend: str) -> None:
    q, s, z = (torch.rand(shape, requires_grad=True) for shape in ((0, 5, 2, 8), (0, 2, 8, 8), (0, 2, 8)))
    options: dict[str, Any] = {"normalize": True, "output_final_state": True, "backend": backend}
    o, (s1, z1) = subquad.gated_linear_attention(q, q, q, initial_state=(s, z), **options)
    grads = torch.autograd.grad((o.sum() + s1.sum() + z1.sum()), (q, s, z))
    assert [g.shape for g in grads] == [q.shape, s.shape, z.shape]


# --- steps: one contract ----------------------------------------


@backend_params("causal_conv1d", "native", "reference")
@pytest.mark.parametrize("name", STEPS)
def test_steps_refuse_what_needs_a_gradient(name: str, backend: str) -> None:
    """Of any argument: a gradient is never dropped silently."""
    tensors, states, _ = step_arguments(name, pool=3)
    before = copies(states)
    for argument in (*tensors, *states):
        wanting = {n: x.clone().requires_grad_(n == argument) for n, x in (tensors | states).items()}
        with pytest.raises(ValueError, match=f"^{argument}: expected a tensor without requires_grad"):
            run_step(name, backend, {}, wanting)
        assert_same_bits(wanting[argument].detach(), (tensors | before)[argument])
        with torch.no_grad():
            run_step(name, backend, {}, wanting)


@backend_params("causal_conv1d", "native", "reference")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", STEPS)
def test_steps_take_indices_of_both_widths(name: str, dtype: torch.dtype, backend: str) -> None:
    tensors, states, indices = step_arguments(name)
    places = torch.tensor([4, -1, 0], dtype=dtype)
    found, expected = copies(states), copies(states)
    o = run_step(name, backend, tensors, found, **{indices: places})
    assert not bool(o[1].any())
    for row, place in ((0, 4), (2, 0)):
        one = {n: x[row : row + 1] if x.shape[0] == 3 else x for n, x in tensors.items()}
        chosen = {n: s[place : place + 1].clone() for n, s in states.items()}
        alone = run_step(name, backend, one, chosen)
        torch.testing.assert_close(o[row], alone[0])
        for n, s in chosen.items():
            expected[n][place] = s[0]
    torch.testing.assert_close(found, expected)
    for n in found:
        assert_same_bits(found[n][1:4], states[n][1:4])


@backend_params("causal_conv1d", "native", "reference")
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(
    ("places", "kind", "message"),
    [
        ([0, 1, 0], ValueError, r"expected every place at most once, got \[0, 1, 0\]"),
        ([0, 1, 5], ValueError, r"expected numbers in -1..4, got \[0, 1, 5\]"),
        ([0, 1, -2], ValueError, r"expected numbers in -1..4, got \[0, 1, -2\]"),
        ([0, 1], ValueError, r"expected shape \[3\], got \[2\]"),
        ([[0], [1], [2]], ValueError, r"expected shape \[3\], got \[3, 1\]"),
        ([0.0, 1.0, 2.0], TypeError, "expected int32 or int64, got torch.float32"),
    ],
    ids=["twice", "beyond", "below", "few", "two dimensions", "float"],
)
def test_steps_refuse_the_same_indices_with_the_same_words(
    name: str, places: list[Any], kind: type[Exception], message: str, backend: str
) -> None:
    tensors, states, indices = step_arguments(name)
    before = copies(states)
    with pytest.raises(kind, match=f"^{indices}: {message}$"):
        run_step(name, backend, tensors, states, **{indices: torch.tensor(places)})
    same(states, before)


@backend_params("causal_conv1d", "native", "reference", "simt")
@pytest.mark.parametrize("name", STEPS)
def test_steps_of_no_rows(name: str, backend: str) -> None:
    tensors, states, indices = step_arguments(name, rows=0)
    weights = step_arguments(name)[0]
    rows = {n: x if n in ("x", "q", "k", "v", "g", "q0", "k0", "u") else weights[n] for n, x in tensors.items()}
    before = copies(states)
    assert run_step(name, backend, rows, states, **{indices: torch.zeros(0, dtype=torch.int64)}).shape[0] == 0
    same(states, before)


@pytest.mark.heavy
def test_wide_indices_do_not_wrap() -> None:
    """Where values are not looked at, what lies outside is skipped, whatever its lowest 32 bits say."""
    tensors, states, _ = step_arguments("causal_conv1d_update", rows=2, pool=3)
    step = torch.compile(subquad.causal_conv1d_update, fullgraph=True, backend="aot_eager")
    before = copies(states)
    y = step(tensors["x"], states["conv_state"], tensors["weight"], conv_state_indices=torch.tensor([0, 2**32 + 1]))
    assert not bool(y[1].any())
    assert_same_bits(states["conv_state"][1:], before["conv_state"][1:])
    assert not torch.equal(states["conv_state"][0], before["conv_state"][0])


def test_tokens_before_may_be_more_than_32_bits_count() -> None:
    tensors, states, _ = step_arguments("causal_conv1d_update", pool=3)
    found = []
    for seen in (torch.tensor([4, 5, 6]), torch.tensor([4, 5, 6]) + 3 * (2**31 + 5)):
        ring = states["conv_state"].clone()
        found.append((subquad.causal_conv1d_update(**tensors, conv_state=ring, cache_seqlens=seen), ring))
    for a, b in zip(*found, strict=True):
        assert_same_bits(a, b)


@pytest.mark.heavy
@pytest.mark.parametrize("name", STEPS[1:])
def test_compiled_steps_refuse_what_they_would_have_to_copy(name: str) -> None:
    tensors, states, _ = step_arguments(name, pool=3)
    states["state"] = states["state"].mT.contiguous().mT
    with pytest.raises(Exception, match=r"state: expected a contiguous tensor under torch.compile"):
        torch.compile(getattr(subquad, name), fullgraph=True, backend="aot_eager")(**tensors, **states)


@backend_params("causal_conv1d", "native", "reference")
@pytest.mark.filterwarnings("ignore:subquad")
@pytest.mark.parametrize("layout", ["rows of a larger buffer", "transposed", "every other"])
@pytest.mark.parametrize("name", STEPS)
def test_steps_take_states_of_any_strides(name: str, layout: str, backend: str) -> None:
    tensors, states, _ = step_arguments(name, pool=3)

    def laid_out(x: torch.Tensor) -> torch.Tensor:
        if layout == "transposed":
            return x.transpose(-1, -2).contiguous().transpose(-1, -2)
        wide = (
            torch.full((2 * x.shape[0], *x.shape[1:]), 7.0)
            if layout == "every other"
            else torch.full((x.shape[0], 2, *x.shape[1:]), 7.0)
        )
        view = wide[::2] if layout == "every other" else wide[:, 1]
        return view.copy_(x)

    expected_states = copies(states)
    expected = run_step(name, backend, tensors, expected_states)
    found_states = {n: laid_out(s) for n, s in states.items()}
    found = run_step(name, backend, tensors, found_states)
    assert_same_bits(found, expected)
    same(found_states, expected_states)
    for state in found_states.values():  # and nothing beside it
        if layout != "transposed":
            rest = torch.empty(0).set_(state.untyped_storage())
            assert int((rest == 7.0).sum()) == rest.numel() - state.numel()


def test_a_state_that_must_be_copied_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_call, "_warned", set())
    tensors, states, _ = step_arguments("gated_linear_attention_step", pool=3)
    states["z"] = states["z"].mT.contiguous().mT
    with pytest.warns(subquad.SubquadWarning, match="z is not contiguous and is copied at every step") as caught:
        for _ in range(2):
            run_step("gated_linear_attention_step", "native", tensors, states)
    assert len(caught) == 1


@backend_params("causal_conv1d", "native", "reference")
@pytest.mark.parametrize("name", STEPS)
def test_steps_refuse_states_that_share_memory(name: str, backend: str) -> None:
    tensors, states, _ = step_arguments(name, pool=3)
    first = next(iter(states))
    state = states[first]
    expanded = {**states, first: state[:1].expand_as(state)}
    with pytest.raises(ValueError, match=f"^{first}: expected elements of their own"):
        run_step(name, backend, tensors, expanded)
    operand = next(iter(tensors))
    inside = state.flatten()[-tensors[operand].numel() :].view(tensors[operand].shape)
    with pytest.raises(ValueError, match=f"^{first}: expected memory of its own.* that {operand} has$"):
        run_step(name, backend, {**tensors, operand: inside}, states)


def tensors_of(*tensors: torch.Tensor) -> Callable[[], None]:
    names = tuple("abcdef"[: len(tensors)])
    return lambda: unshared(names, tensors, tuple(range(len(tensors))), (0,))


def test_memory_that_is_shared() -> None:
    buffer = torch.zeros(4, 3, 5)
    tensors_of(buffer[:, 0], buffer[:, 1], buffer[:, 2])()  # side by side in every row
    tensors_of(buffer[:2], buffer[2:])()
    tensors_of(buffer[:, :, 0], buffer[:, :, 1])()
    tensors_of(buffer[..., :-1], buffer[..., -1], buffer[:2, :, 4])()  # a state with its sums as the last column
    tensors_of(buffer[:, 1:, :2], buffer[:, :2, 2:])()
    tensors_of(buffer[:0], buffer)()
    for other in (buffer, buffer[:, 0], buffer[3], buffer.flatten()[-1:], buffer.view(torch.int32)):
        with pytest.raises(ValueError, match=r"^a: expected memory of its own.* that b has"):
            tensors_of(buffer, other)()
    for a, b in (
        (buffer[:, :2], buffer[:, 1:]),
        (buffer[..., :3], buffer[..., 2:]),
        (buffer[:, 1, :2], buffer[:, 1:, 1]),
    ):
        with pytest.raises(ValueError, match=r"^a: expected memory of its own"):
            tensors_of(a, b)()
    line = torch.zeros(20)
    across = line.as_strided((3, 2), (5, 1), 4)  # the end of a row and the beginning of the next
    tensors_of(line.as_strided((4, 3), (5, 1), 1), across)()
    with pytest.raises(ValueError, match=r"^a: expected memory of its own"):
        tensors_of(line.as_strided((4, 2), (5, 1), 0), across)()
    with pytest.raises(ValueError, match=r"^a: expected elements of their own"):
        tensors_of(torch.zeros(8).unfold(0, 4, 2))()
    tensors_of(torch.zeros(8).unfold(0, 4, 4))()


# --- bounds of sequences ----------------------------------------

BAD_BOUNDS: dict[str, tuple[Any, type[Exception], str]] = {
    "list": ([0, 6], TypeError, "expected a torch.Tensor, got list"),
    "float": (torch.tensor([0.0, 6.0]), TypeError, "expected int32 or int64, got torch.float32"),
    "bool": (torch.tensor([False, True]), TypeError, "expected int32 or int64, got torch.bool"),
    "scalar": (torch.tensor(6), ValueError, r"expected shape \[N \+ 1\], got \[\]"),
    "empty": (torch.tensor([], dtype=torch.int64), ValueError, r"expected shape \[N \+ 1\], got \[0\]"),
    "start": (torch.tensor([1, 6]), ValueError, r"expected numbers from 0 to 6 that do not decrease, got \[1, 6\]"),
    "falls": (
        torch.tensor([0, 4, 2, 6]),
        ValueError,
        r"expected numbers from 0 to 6 that do not decrease, got \[0, 4, 2, 6\]",
    ),
}


def packed_ops() -> dict[str, Callable[[Any], Any]]:
    """Every op with `cu_seqlens`, on 6 tokens."""
    x, q = torch.rand(1, 6, 4), torch.rand(1, 6, 2, 4)
    return {
        "causal_conv1d": lambda cu: subquad.causal_conv1d(x, torch.rand(4, 3), cu_seqlens=cu),
        "conv_feature_map": lambda cu: subquad.conv_feature_map(
            q, torch.rand(8, 3), torch.rand(2, 4, 2), cu_seqlens=cu
        ),
        "gated_linear_attention": lambda cu: subquad.gated_linear_attention(q, q, q, cu_seqlens=cu),
        "LawcatAttention": lambda cu: subquad.nn.LawcatAttention(4, 2)(x, cu_seqlens=cu),
        "IntervalMask.packed": lambda cu: subquad.IntervalMask.packed(cu),
        "Packed": lambda cu: subquad.Packed(cu),
    }


@pytest.mark.parametrize("bad", BAD_BOUNDS)
def test_bad_bounds_get_the_same_words_everywhere(bad: str) -> None:
    value, kind, message = BAD_BOUNDS[bad]
    for name, op in packed_ops().items():
        with pytest.raises(kind, match=f"^cu_seqlens: {message}$"):
            op(value)
            raise AssertionError(f"{name} accepted it")


def test_bounds_of_another_length_or_a_batch() -> None:
    for name, op in packed_ops().items():
        if name not in ("IntervalMask.packed", "Packed"):  # which have no tokens to compare with
            with pytest.raises(
                ValueError, match=r"^cu_seqlens: expected numbers from 0 to 6 that do not decrease, got"
            ):
                op(torch.tensor([0, 5]))
            with pytest.raises(ValueError, match=r"^cu_seqlens: expected sequences of 6 tokens in all, got 5$"):
                op(subquad.Packed(torch.tensor([0, 5])))
            op(torch.tensor([0, 2, 6]))
            op(subquad.Packed(torch.tensor([0, 2, 6])))
    x = torch.rand(2, 3, 4)
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected a batch of 1 with packed sequences, got 2$"):
        subquad.causal_conv1d(x, torch.rand(4, 3), cu_seqlens=torch.tensor([0, 3]))


def test_packed_bounds_give_the_bits_of_the_tensor() -> None:
    cu = torch.tensor([0, 0, 2, 6])
    for name, op in packed_ops().items():
        if name in ("causal_conv1d", "conv_feature_map", "gated_linear_attention"):
            torch.manual_seed(1)
            a = op(cu)[0]
            torch.manual_seed(1)
            assert_same_bits(a, op(subquad.Packed(cu))[0])


def test_bounds_are_looked_at_once_per_model_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers, three operators each: one check, one conversion. A changed tensor is looked at again."""
    looked = []
    init = subquad.Packed.__init__
    monkeypatch.setattr(subquad.Packed, "__init__", lambda self, *a: (looked.append(1), init(self, *a))[1])
    layers = [subquad.nn.LawcatAttention(4, 2, layer_idx=i) for i in range(2)]
    x, cu = torch.rand(1, 6, 4), torch.tensor([0, 2, 6])
    for layer in layers:
        layer(x, cu_seqlens=cu)
    assert len(looked) == 1
    cu[1] = 5
    a = layers[0](x, cu_seqlens=cu)[0]
    assert len(looked) == 2
    assert_same_bits(a, layers[0](x, cu_seqlens=cu.clone())[0])
    cu[1] = 7
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected numbers from 0 to 6"):
        layers[0](x, cu_seqlens=cu)


def test_packed_bounds_are_their_own() -> None:
    for dtype in (torch.int32, torch.int64):
        cu = torch.tensor([0, 2, 6], dtype=dtype)
        packed = subquad.Packed(cu)
        cu[1] = 5
        assert packed.int32.tolist() == packed.int64.tolist() == [0, 2, 6]
        assert packed.sequence.tolist() == [0, 0, 1, 1, 1, 1]


def test_bounds_that_were_looked_at_are_not_kept_alive() -> None:
    layer, x = subquad.nn.LawcatAttention(4, 2), torch.rand(1, 6, 4)
    seen = []
    for _ in range(5):
        cu = torch.tensor([0, 2, 6])
        layer(x, cu_seqlens=cu)
        seen.append(weakref.ref(cu))
        del cu
    gc.collect()
    assert [ref() for ref in seen] == [None] * 5


def test_bounds_in_inference_mode() -> None:
    layer, x = subquad.nn.LawcatAttention(4, 2), torch.rand(1, 6, 4)
    with torch.no_grad():
        expected = layer(x, cu_seqlens=torch.tensor([0, 2, 6]))[0]
    with torch.inference_mode():
        assert_same_bits(layer(x, cu_seqlens=torch.tensor([0, 2, 6]))[0].clone(), expected)


# --- backends: the truth in one table ----------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which every backend runs, as far as choosing goes."""
    monkeypatch.setattr(
        _backends, "unavailable", lambda stem, backend, device, build=False: CONTRACTS[stem].missing.get(backend)
    )
    for name in ("_choices", "_ready", "_warned"):
        monkeypatch.setattr(_backends, name, type(getattr(_backends, name))())
    monkeypatch.setattr(_backends, "_override", None)
    monkeypatch.setattr(_backends, "_from_env", None)


def test_few_tokens_prefer_what_the_contract_says(gpu: None) -> None:
    for stem, contract in CONTRACTS.items():
        assert _call.choose(stem, "cuda", None, tokens=contract.few + 1) == contract.cuda[0]
        if contract.few:
            assert _call.choose(stem, "cuda", None, tokens=contract.few) == contract.cuda_few[0]
            assert _call.choose(stem, "cuda", None, tokens=1, training=True) == contract.cuda[0]
            assert _call.choose(stem, "cuda", "triton", tokens=1) == "triton"
        assert _call.choose(stem, "cpu", None, tokens=1) == contract.cpu[0]


def test_gradients_come_from_the_backend_that_has_them(gpu: None) -> None:
    for name, operator in OPERATORS.items():
        if operator.backward is None:
            continue
        has = OPERATORS[operator.backward].cuda
        assert _backends.backward_backend(name, "native", "cpu") == "native"
        assert _backends.backward_backend(name, "triton", "cuda") == "triton"
        assert _backends.backward_backend(name, "native", "cuda") == ("native" if has else "triton")
        assert _backends.backward_backend(name, "simt", "cpu") == ("simt" if has else "native")


def test_the_report_knows_both_rules(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from subquad import report

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    entry = report.collect()["ops"]["interval_attention"]["cuda"]
    assert (entry["chosen"], entry["few_tokens"], entry["chosen_for_few_tokens"]) == ("triton", 16, "native")
    rows = {line.split("|")[1].strip(" `"): line for line in report.support_table().splitlines()[2:]}
    assert "| fwd bwd | fwd | fwd bwd | fwd | fwd bwd |" in rows["interval_attention"]
    assert "up to 16 tokens: native > triton > reference; gradients of native: triton |" in rows["interval_attention"]
    assert "| step | step | step | step | step |" in rows["lawcat_decode_step"]
    assert "| fwd bwd step | fwd step | fwd bwd step | fwd step | fwd bwd step |" in rows["gated_linear_attention"]


def amid_nan(*shape: int) -> torch.Tensor:
    """Random numbers [1, T, ...] with a hundred rows of NaN before and behind them."""
    memory = torch.full((1, shape[1] + 200, *shape[2:]), float("nan"))
    return memory[:, 100:-100].copy_(torch.rand(shape))


@pytest.mark.quick
@backend_params("gated_linear_attention", "native", "triton", "simt")
def test_bounds_that_reach_outside_are_clamped(backend: str) -> None:
    """Operators do not trust what on a GPU nobody has read: they stay inside the tensors."""
    good, bad = torch.tensor([0, 3, 6]), torch.tensor([-5, 3, 100])
    q, k, v = (amid_nan(1, 6, 2, 8) for _ in range(3))
    x, weight = amid_nan(1, 6, 4), torch.rand(4, 3)
    places = {good: [0, 0, 0, 1, 1, 1], bad: [-1, 0, 0, 1, 1, 9]}
    results = []
    for bounds, sequence in places.items():
        linear = HANDLES[backend]["gated_linear_attention_fwd"](q, k, v, None, None, None, bounds, 1.0, 1e-10, False)
        packed = bounds.int(), torch.tensor(sequence, dtype=torch.int32)
        conv = HANDLES[backend]["causal_conv1d_fwd"](x, weight, None, None, None, *packed, 1, 4, False, True)
        results.append([linear[0], linear[2], *conv])
    for expected, found in zip(*results, strict=True):
        assert not expected.isnan().any()
        assert_same_bits(found, expected)
