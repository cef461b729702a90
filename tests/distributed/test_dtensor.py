"""Functions called with DTensors: results, gradients, placements; nothing is sent where whole heads or rows are on a rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import subquad
import subquad.distributed
from subquad import IntervalMask

from .programs.common import LIMIT, whole
from .threads import caught, on_ranks

SIZE = 3
B, T, H, K, V = SIZE, 7, 2 * SIZE, 8, 4
WHOLE, ROWS, TOKENS, HEADS, STATES = Replicate(), Shard(0), Shard(1), Shard(2), Shard(1)
PARTS = Partial()


def linear(q: Any, k: Any, v: Any, g: Any = None, s0: Any = None, z0: Any = None) -> Any:
    if s0 is None:
        return subquad.gated_linear_attention(q, k, v, g)[0]
    o, state = subquad.gated_linear_attention(
        q, k, v, g, initial_state=(s0, z0), output_final_state=True, normalize=True
    )
    assert isinstance(state, tuple)
    return o, *state


def attention(q: Any, k: Any, v: Any, sinks: Any = None) -> Any:
    return subquad.interval_attention(q, k, v, IntervalMask.sink(2, 4), sink_logits=sinks)


def biased(q: Any, k: Any, v: Any, bias: Any, slopes: Any) -> Any:
    return subquad.interval_attention(
        q, k, v, IntervalMask.causal(), key_bias=bias, alibi_slopes=slopes.detach(), softcap=3.0, return_lse=True
    )


def convolved(x: Any, weight: Any, bias: Any, state: Any, residual: Any) -> Any:
    options: dict[str, Any] = {"channel_groups": 2, "head_dim": 2} if len(weight) > x.shape[2] else {}
    return subquad.causal_conv1d(
        x, weight, bias, initial_state=state, residual=residual, activation="silu", output_final_state=True, **options
    )


def mapped(x: Any, weight: Any, fm_weight: Any, bias: Any) -> Any:
    return subquad.conv_feature_map(x, weight, fm_weight, bias)[0]


def cats(x: Any, gate: Any, up: Any, down: Any, threshold: Any = 0.3, *biases: Any, **options: Any) -> Any:
    named = dict(zip(("b_gate", "b_up", "b_down"), biases, strict=False))
    threshold = threshold.detach() if isinstance(threshold, torch.Tensor) else threshold
    return subquad.cats_mlp(x, gate, up, down, threshold, **named, **options)


def cats_of_columns(x: Any, gate: Any, up: Any, columns: Any, *more: Any) -> Any:
    """Down as sparse kernels want it."""
    return cats(x, gate, up, columns.t(), *more)


def product(x: Any, codes: Any, bias: Any) -> Any:
    return subquad.quantised_linear(x, codes, bias, format="int4")


def cats_of_codes(x: Any, gate: Any, up: Any, down: Any, threshold: Any = 0.3, *biases: Any, **options: Any) -> Any:
    """Its mask, too."""
    named = dict(zip(("b_gate", "b_up", "b_down", "down_scales"), biases, strict=False))
    threshold = threshold.detach() if isinstance(threshold, torch.Tensor) else threshold
    return subquad.quantised_cats_mlp(x, gate, up, down, threshold, format="int8", return_mask=True, **named, **options)


def shapes(q: int, k: int, v: int) -> list[tuple[int, ...]]:
    return [(B, T, q, K), (B, T, k, K), (B, T, v, V)]


LINEAR = [*shapes(2 * H, H, H), (B, T, H, K), (B, H, K, V), (B, H, K)]
CONVOLUTION = [(B, T, H), (2 * H, 4), (2 * H,), (B, H, 3), (B, T, 2 * H)]
CONV_MAP = [(B, T, H, K), (H * K, 4), (H, K, 3)]
NEURONS = 4 * SIZE + 1  # which the ranks do not divide
MLP = [(B, T, K), (NEURONS, K), (NEURONS, K), (K, NEURONS)]
BIASES = [(NEURONS,), (NEURONS,), (K,)]
BY_NEURONS = [WHOLE, Shard(0), Shard(0), Shard(1)]
WIDE = 32  # groups of codes
CODES = [(B, T, WIDE), *[(NEURONS, WIDE)] * 3, (NEURONS,), (NEURONS,), (NEURONS,), (WIDE,)]
Case = tuple[Callable[..., Any], list[tuple[int, ...]], list[Any], Any]
CASES: dict[str, Case] = {
    "linear, heads": (linear, LINEAR, [HEADS] * 4 + [STATES] * 2, HEADS),
    "linear, rows": (linear, LINEAR, [ROWS] * 6, ROWS),
    "linear, plain, one key head": (linear, shapes(2 * H, 1, H), [HEADS, WHOLE, HEADS], HEADS),
    "linear, gates of heads": (linear, [*shapes(H, H, H), (B, T, H)], [HEADS] * 4, HEADS),
    "attention, heads": (attention, [*shapes(2 * H, H, H), (2 * H,)], [HEADS] * 3 + [Shard(0)], HEADS),
    "attention, rows": (attention, [*shapes(2 * H, H, H), (2 * H,)], [ROWS] * 3 + [WHOLE], ROWS),
    "attention, one key head": (attention, shapes(H, 1, 1), [HEADS, WHOLE, WHOLE], HEADS),
    "attention, bias": (biased, [*shapes(H, H, H), (B, T), (H,)], [ROWS] * 4 + [WHOLE], ROWS),
    "attention, bias of heads": (
        biased, [*shapes(H, H, H), (1, H, T), (1, H)], [HEADS] * 3 + [STATES] * 2, HEADS
    ),
    "feature map, heads": (subquad.feature_map, [(B, T, H, K), (H, K, 3)], [HEADS, Shard(0)], HEADS),
    "feature map, rows": (subquad.feature_map, [(B, T, H, K), (H, K, 3)], [ROWS, WHOLE], ROWS),
    "convolution, rows": (convolved, CONVOLUTION, [ROWS, WHOLE, WHOLE, ROWS, ROWS], ROWS),
    "convolution, heads": (convolved, CONVOLUTION, [HEADS, Shard(0), Shard(0), STATES, HEADS], HEADS),
    "conv and map, rows": (mapped, [*CONV_MAP, (H * K,)], [ROWS, WHOLE, WHOLE, WHOLE], ROWS),
    "conv and map, heads": (mapped, [*CONV_MAP, (H * K,)], [HEADS, Shard(0), Shard(0), Shard(0)], HEADS),
    "feature map, tokens": (subquad.feature_map, [(B, SIZE, H, K)], [TOKENS], TOKENS),
    "CATS, neurons": (cats, MLP, BY_NEURONS, PARTS),
    "CATS, neurons, biases and thresholds": (
        cats, [*MLP, (NEURONS,), *BIASES], [*BY_NEURONS, Shard(0), Shard(0), Shard(0), WHOLE], PARTS
    ),
    "CATS, neurons, columns of down": (
        cats_of_columns, [*MLP[:3], (NEURONS, K), (NEURONS,), *BIASES],
        [WHOLE, *[Shard(0)] * 6, WHOLE], PARTS,
    ),
    "CATS, rows": (cats, [*MLP, (1,), *BIASES], [ROWS, *[WHOLE] * 7], ROWS),
    "CATS, tokens": (cats, [*MLP, (NEURONS,), *BIASES], [TOKENS, *[WHOLE] * 7], TOKENS),
    "product with codes, rows": (product, [(B * T, WIDE), (12, WIDE), (12,)], [ROWS, WHOLE, WHOLE], ROWS),
    "product with codes, outputs": (product, [(B * T, WIDE), (12, WIDE), (12,)], [WHOLE, Shard(0), Shard(0)], TOKENS),
    "CATS of codes, neurons": (
        cats_of_codes, CODES, [WHOLE, *[Shard(0)] * 3, Shard(0), Shard(0), Shard(0), WHOLE], PARTS
    ),
    "CATS of codes, tokens": (cats_of_codes, CODES, [TOKENS, *[WHOLE] * 7], TOKENS),
    "CATS of codes, scales of 32 neurons": (
        cats_of_codes, [(B, T, WIDE), *[(32 * SIZE, WIDE)] * 3, (1,), *[(32 * SIZE,)] * 2, (WIDE,), (SIZE, WIDE)],
        [WHOLE, *[Shard(0)] * 3, WHOLE, Shard(0), Shard(0), WHOLE, Shard(0)], PARTS,
    ),
    "CATS of codes, scales that do not fit": (
        cats_of_codes, [(B, T, WIDE), *[(32, WIDE)] * 3, (1,), *[(32,)] * 2, (WIDE,), (1, WIDE)],
        [WHOLE, *[Shard(0)] * 3, *[WHOLE] * 5], None,
    ),
    "CATS, whole": (cats, [*MLP, (), *BIASES], [WHOLE] * 8, WHOLE),
}  # fmt: skip


def drawn(sizes: list[tuple[int, ...]], fn: Callable[..., Any]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(size, generator=generator) for size in sizes]
    if fn is linear:  # weights of one sign, decays
        made = [x if i == 2 else x.abs() for i, x in enumerate(made)]
        made[3:4] = [-0.1 * x for x in made[3:4]]
    if fn is product:
        made[1] = subquad.quantise(made[1], "int4")
    if fn is cats_of_codes:
        made[1:4] = [subquad.quantise(x, "int8") for x in made[1:4]]
        if len(made) == 9:  # codes of down, and the bytes of fp16 scales
            made[3] = torch.randint(0, 256, sizes[3], generator=generator, dtype=torch.uint8)
            made[8] = made[8].abs().div(50).half().view(torch.uint8)
    return made


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    torch.testing.assert_close(found, expected, rtol=0, atol=LIMIT * float(expected.abs().max()))
    return True


def compare(fn: Callable[..., Any], sizes: list[tuple[int, ...]], placements: list[Any], out: Any) -> None:
    plain = [x.requires_grad_(x.is_floating_point()) for x in drawn(sizes, fn)]
    learn = [i for i, x in enumerate(plain) if x.requires_grad]
    expected = fn(*plain)
    first = expected[0] if isinstance(expected, tuple) else expected
    weight = torch.linspace(-1, 1, first.numel()).view_as(first)
    grads = torch.autograd.grad((first * weight).sum(), [plain[i] for i in learn], allow_unused=True)

    def body(rank: int) -> None:
        mesh = init_device_mesh("cpu", (SIZE,), mesh_dim_names=("tp",))
        pairs = zip(plain, placements, strict=True)
        given = [distribute_tensor(x.detach(), mesh, [p]).requires_grad_(x.requires_grad) for x, p in pairs]
        with CommDebugMode() as sent:
            found = fn(*given)
        results = found if isinstance(found, tuple) else (found,)
        if out is not None:
            assert results[0].placements == (out,) and sent.get_total_counts() == 0
        for a, b in zip(results, expected if isinstance(expected, tuple) else (expected,), strict=True):
            assert torch.equal(whole(a), b) if b.dtype is torch.bool else close(whole(a), b.detach())
        own = distribute_tensor(weight, mesh, [WHOLE if p == PARTS else p for p in results[0].placements])
        learned = [given[i] for i in learn]
        for a, b in zip(torch.autograd.grad((results[0] * own).sum(), learned, allow_unused=True), grads, strict=True):
            assert (a is None) is (b is None)
            if b is not None:
                close(whole(a), b)

    on_ranks(SIZE, body)


@pytest.mark.parametrize("name", CASES)
def test_dtensors(name: str) -> None:
    """Results without a gradient are among them: the state and the log-sum-exp."""
    fn, sizes, placements, out = CASES[name]
    compare(fn, sizes, placements, out)


NO_FIT: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], list[Any]]] = {
    "linear": (linear, shapes(2 * H, 2, 2), [HEADS, WHOLE, WHOLE]),
    "attention": (attention, shapes(2 * H, 2, 2), [HEADS, WHOLE, WHOLE]),
    "convolution": (
        convolved, [(B, T, H), (H, 4), (H,), (B, H, 3), (B, T, H)], [HEADS, Shard(0), Shard(0), STATES, HEADS]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_FIT)
def test_what_does_not_fit(name: str) -> None:
    """Two key heads on three ranks: queries are brought together, never paired with others' keys. And channels in no groups."""
    compare(*NO_FIT[name], None)


def test_a_mesh_of_two_dimensions() -> None:
    """Rows over one, heads over the other."""
    sizes = [(4, T, 8, K), (4, T, 4, K), (4, T, 4, V)]
    plain = drawn(sizes, linear)
    expected = linear(*plain)

    def body(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        given = [distribute_tensor(x, mesh, [ROWS, HEADS]) for x in plain]
        with CommDebugMode() as sent:
            found = linear(*given)
        assert found.placements == (ROWS, HEADS) and sent.get_total_counts() == 0
        close(whole(found), expected)

    on_ranks(4, body)


# --- the CATS MLP ----------------------------------------

FEW: dict[str, tuple[int, list[Any], dict[str, Any]]] = {
    "neurons": (2, BY_NEURONS, {}),
    "neurons, a union": (2, BY_NEURONS, {"mask_mode": "union"}),
    "tokens": (5, [TOKENS, *[WHOLE] * 3], {}),
    "tokens, a union": (5, [TOKENS, *[WHOLE] * 3], {"mask_mode": "union"}),
    "many tokens, dense": (18, [TOKENS, *[WHOLE] * 3], {"prefill": "dense"}),
    "neurons, dense": (18, BY_NEURONS, {"prefill": "dense"}),
    "channels of tokens, columns of gates": (2, [HEADS, Shard(1), WHOLE, WHOLE], {}),
    "weights alone": (2, [TOKENS, *BY_NEURONS[1:]], {}),
}


@pytest.mark.parametrize("neurons", [NEURONS, 4])  # of the latter two ranks have two, one has none
@pytest.mark.parametrize("down", ["rows", "columns"])
@pytest.mark.parametrize("name", FEW)
def test_few_tokens(name: str, down: str, neurons: int) -> None:
    """The sparse kernels, in both layouts of the down projection; what all tokens of a call decide is decided by all."""
    tokens, placements, options = FEW[name]
    sizes = [(1, tokens, K), (neurons, K), (neurons, K), (K, neurons)]
    plain = drawn(sizes, cats)
    if down == "columns":
        plain[3] = plain[3].t().contiguous().t()
    with torch.no_grad():
        expected = cats(*plain, 3.0, **options)
        assert not options or not torch.equal(expected, cats(*plain, 3.0))

    def body(rank: int) -> None:
        mesh = init_device_mesh("cpu", (SIZE,), mesh_dim_names=("tp",))
        given = [distribute_tensor(x, mesh, [p]) for x, p in zip(plain, placements, strict=True)]
        with torch.no_grad():
            found = cats(*given, 3.0, **options)
        close(whole(found), expected)

    on_ranks(SIZE, body)


def test_an_mlp_on_a_mesh_of_two_dimensions() -> None:
    """Rows over one, neurons over the other; the bias of down enters once."""
    sizes = [(4, T, K), (6, K), (6, K), (K, 6), (6,), (6,), (6,), (K,)]
    plain = [x.requires_grad_() for x in drawn(sizes, cats)]
    expected = cats(*plain)
    grads = torch.autograd.grad(expected.square().sum(), plain, allow_unused=True)

    def body(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        split = [WHOLE, Shard(0), Shard(0), Shard(1), Shard(0), Shard(0), Shard(0), WHOLE]
        pairs = zip(plain, [ROWS, *[WHOLE] * 7], split, strict=True)
        given = [distribute_tensor(x.detach(), mesh, [a, b]).requires_grad_() for x, a, b in pairs]
        with CommDebugMode() as sent:
            found = cats(*given)
        assert found.placements == (ROWS, PARTS) and sent.get_total_counts() == 0
        close(whole(found), expected.detach())
        loss = found.redistribute(placements=[ROWS, WHOLE]).square().sum()
        for a, b in zip(torch.autograd.grad(loss, given, allow_unused=True), grads, strict=True):
            assert (a is None) is (b is None)
            if b is not None:
                close(whole(a), b)

    on_ranks(4, body)


def test_an_mlp_with_plain_tensors_is_refused() -> None:
    x, gate, up, down = drawn(MLP, cats)

    def body(rank: int) -> list[str]:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        given = [distribute_tensor(t, mesh, [WHOLE]) for t in (x, gate, up)]
        threshold = torch.zeros(NEURONS)
        columns = distribute_tensor(down, mesh, [WHOLE])
        return [caught(lambda: cats(*given, down)), caught(lambda: cats(*given, columns, threshold))]

    for found in on_ranks(2, body):
        assert found == [
            f"TypeError: {name}: expected a DTensor as x is, got a Tensor" for name in ("w_down", "threshold")
        ]


def test_an_mlp_on_two_meshes_is_refused() -> None:
    """Of one shape each, or of two: parts would meet others' parts."""
    x, gate, up, down = drawn(MLP, cats)

    def body(rank: int) -> list[str]:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        pairs = zip((gate, up, down), BY_NEURONS[1:], strict=True)
        weights = [distribute_tensor(t, mesh["tp"], [p]) for t, p in pairs]
        rows = [distribute_tensor(x, mesh["dp"], [ROWS]), distribute_tensor(x, mesh, [ROWS, WHOLE])]
        return [caught(lambda x=x: cats(x, *weights)) for x in rows]

    for found in on_ranks(4, body):
        assert all(line.startswith("ValueError: w_gate: expected the mesh of x, DeviceMesh(") for line in found)
        assert all("'tp'" in line or "tp=" in line for line in found)
