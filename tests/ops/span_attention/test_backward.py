"""Gradients of attention to spans, bases included: against autograd of the reference in float64, and what they must not see."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from subquad.ops.span_attention import attend
from subquad.testing import Sampler, assert_close, assert_same_bits, assert_three_way, backend_params

BACKENDS = ("native",)
BLOCK = 64  # keys that pairs of query and span meet together
SCALE = 0.3
LIMIT = {torch.float32: 5e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@dataclass(frozen=True)
class Call:
    """Arguments of one call; `leaves` are those that have gradients."""

    leaves: dict[str, torch.Tensor]
    start: torch.Tensor
    end: torch.Tensor
    key_mask: torch.Tensor | None = None

    def spans(self, start: torch.Tensor, end: torch.Tensor) -> Call:
        """The same with other spans, [T, S] or [B, T, H, S]."""
        return replace(self, start=start.expand(self.start.shape), end=end.expand(self.end.shape))

    def with_leaves(self, **leaves: torch.Tensor) -> Call:
        return replace(self, leaves=self.leaves | leaves)

    def double(self) -> Call:
        return replace(self, leaves={name: x.double() for name, x in self.leaves.items()})


def draw(
    batch: int = 1,
    tokens: int = 37,
    keys: int = 150,
    heads: int = 4,
    kv_heads: int = 2,
    d: int = 16,
    dv: int = 24,
    spans: int = 3,
    longest: int = 60,
    *,
    gated: bool = True,
    based: bool = True,
    masked: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Call:
    """Random spans, some outside, some empty; every third base is one of no key."""
    sampler = Sampler(dtype, seed=seed)
    leaves = {
        "q": sampler.normal(batch, tokens, heads, d),
        "k": sampler.normal(batch, keys, kv_heads, d),
        "v": sampler.normal(batch, keys, kv_heads, dv),
    }
    shape = (batch, tokens, heads, spans)
    start = sampler.integers(-3, keys + 3, *shape)
    end = start + sampler.integers(-1, longest, *shape)
    if gated:
        leaves["gate"] = sampler.normal(*shape).float()
    if based:
        leaves["base_out"] = sampler.normal(batch, tokens, heads, dv)
        leaves["base_lse"] = sampler.normal(batch, tokens, heads).float()
        leaves["base_lse"].view(-1)[::3] = -torch.inf
        leaves["base_out"].view(-1, dv)[::3] = torch.nan  # is not read
    key_mask = sampler.integers(0, 4, batch, keys) > 0 if masked else None
    return Call(leaves, start, end, key_mask)


def run(call: Call, backend: str, *wanted: str, **upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    """out, lse and the gradients of the leaves (or those wanted), from random gradients of both, or given ones."""
    leaves = {name: x.clone().requires_grad_(not wanted or name in wanted) for name, x in call.leaves.items()}
    q, k, v = (leaves[name] for name in "qkv")
    gate, base_out, base_lse = (leaves.get(name) for name in ("gate", "base_out", "base_lse"))
    start, end = call.start.int(), call.end.int()
    out, lse = attend(q, k, v, start, end, gate, base_out, base_lse, call.key_mask, None, SCALE, backend)
    sampler = Sampler(seed=7)
    for name, x in (("out", out), ("lse", lse)):
        upstream.setdefault(name, sampler.normal(*x.shape).bfloat16())  # which every dtype holds
    seen = torch.where(lse == -torch.inf, 0.0, lse)
    grads = [upstream[name].to(x.dtype) for name, x in (("out", out), ("lse", lse))]
    names = [name for name in leaves if not wanted or name in wanted]
    found = torch.autograd.grad((out, seen), [leaves[name] for name in names], grads)
    return {"out": out, "lse": lse, **{f"d{name}": x for name, x in zip(names, found, strict=True)}}


def holds(start: torch.Tensor, end: torch.Tensor, keys: int) -> torch.Tensor:
    """Which keys are in which spans, [..., keys]."""
    key = torch.arange(keys)
    return (start[..., None] <= key) & (key <= end[..., None])


def assert_is_reference(call: Call, backend: str, what: str = "", **upstream: torch.Tensor) -> None:
    actual = run(call, backend, **upstream)
    expected = run(call.double(), "reference", **upstream)
    limit = LIMIT[call.leaves["q"].dtype]
    for name, x in expected.items():
        assert actual[name].isfinite().all() or name == "lse", f"{what}: {name} is not finite"
        assert_close(actual[name], x, limit, f"{what}: {name}")


@backend_params("span_attention", *BACKENDS)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("based", [False, True], ids=["", "based"])
@pytest.mark.parametrize("gated", [False, True], ids=["joint", "gated"])
def test_gradients(gated: bool, based: bool, masked: bool, backend: str) -> None:
    for dtype in LIMIT:
        call = draw(gated=gated, based=based, masked=masked, dtype=dtype)
        assert_is_reference(call, backend, str(dtype))
    many = draw(2, 75, 333, 6, 2, 72, 40, 5, 3 * BLOCK, gated=gated, based=based, masked=masked)
    assert_is_reference(many, backend, "many")


SHAPES: dict[str, dict[str, Any]] = {
    "one pair": {"tokens": 1, "keys": 200, "heads": 1, "kv_heads": 1, "spans": 1, "longest": 150, "based": False},
    "one key": {"tokens": 5, "keys": 1, "longest": 4},
    "one span of many tiles": {"tokens": 19, "keys": 11 * BLOCK + 7, "spans": 1, "longest": 11 * BLOCK, "d": 8},
    "more pairs than a tile takes": {"tokens": 151, "keys": 70, "heads": 6, "kv_heads": 1, "spans": 4, "d": 5, "dv": 3},
    "more pairs than an item": {"tokens": 401, "keys": 300, "heads": 3, "kv_heads": 1, "spans": 8, "d": 4, "dv": 4},
    "several ranges of keys": {"tokens": 90, "keys": 1300, "longest": 900, "heads": 2, "kv_heads": 2, "batch": 2},
    "widest": {"tokens": 12, "keys": 90, "d": 256, "dv": 256, "heads": 2, "kv_heads": 1},
}


@backend_params("span_attention", *BACKENDS)
@pytest.mark.parametrize("gated", [False, True], ids=["joint", "gated"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, gated: bool, backend: str) -> None:
    assert_is_reference(draw(**SHAPES[shape], gated=gated), backend, shape)


@backend_params("span_attention", *BACKENDS)
@pytest.mark.parametrize("gated", [False, True], ids=["joint", "gated"])
@pytest.mark.parametrize("keys", [1500, 2000, 8500], ids=["", "of more keys than are at hand", "than are kept"])
def test_one_long_span_among_short_ones(keys: int, gated: bool, backend: str) -> None:
    """Its keys are many tiles away from where it begins, and from those of all others."""
    call = draw(1, 60, keys, 1, 1, spans=2, longest=8, gated=gated)
    call.start[0, 7, 0, 1], call.end[0, 7, 0, 1] = 3, keys - 10
    assert_is_reference(call, backend)


@backend_params("span_attention", *BACKENDS)
@pytest.mark.parametrize("length", [1, 15, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_all_pairs_see_the_same_keys(length: int, backend: str) -> None:
    """At every place in a tile."""
    for first in (0, 1, BLOCK - 1, BLOCK, 2 * BLOCK - 7):
        call = draw(1, 23, 5 * BLOCK, 2, 1, spans=2)
        start = torch.full((2,), first)
        assert_is_reference(call.spans(start, start + length - 1), backend, f"{first}, {length}")


@backend_params("span_attention", *BACKENDS)
@pytest.mark.parametrize("gated", [False, True], ids=["joint", "gated"])
def test_through_lse_alone(gated: bool, backend: str) -> None:
    call = draw(gated=gated)
    nothing = torch.zeros(1, 37, 4, 24)
    assert_is_reference(call, backend, out=nothing)
    assert not run(call, backend, out=nothing)["dv"].any()


@backend_params("span_attention", *BACKENDS)
@pytest.mark.parametrize("gated", [False, True], ids=["joint", "gated"])
def test_rows_that_see_nothing(gated: bool, backend: str) -> None:
    """Zeros, whatever their gradients and queries are; other rows are not concerned."""
    call = draw(gated=gated, based=False)
    call.end[:, 5:9] = call.start[:, 5:9] - 1
    expected = run(call, backend)
    q, upstream = call.leaves["q"].clone(), Sampler(seed=7).normal(1, 37, 4, 24).bfloat16()
    q[:, 5:9], upstream[:, 5:9] = torch.nan, torch.inf
    actual = run(call.with_leaves(q=q), backend, out=upstream)
    for name, x in expected.items():
        assert_same_bits(actual[name], x, name)
    assert not actual["dq"][:, 5:9].any()
    if gated:
        assert not actual["dgate"][:, 5:9].any()
    nobody = replace(call, end=call.start - 1)
    assert not any(x.any() for name, x in run(nobody, backend).items() if name != "lse")


@backend_params("span_attention", *BACKENDS)
@pytest.mark.parametrize("gated", [False, True], ids=["joint", "gated"])
def test_scores_of_minus_infinity(gated: bool, backend: str) -> None:
    """A row of nothing else sees nothing."""
    call = draw(1, 40, 3 * BLOCK, spans=2, gated=gated, based=False)
    start = torch.where(torch.arange(40) % 3 == 0, BLOCK + 5, torch.tensor([[0], [2 * BLOCK + 3]])).T[None, :, None]
    k = call.leaves["k"].clone()
    k[:, BLOCK : 2 * BLOCK] = -torch.inf
    call = call.spans(start, start + 50).with_leaves(q=call.leaves["q"].abs(), k=k)
    found = run(call, backend)
    assert torch.equal(
        found["lse"] == -torch.inf, (start == BLOCK + 5)[..., : found["lse"].shape[3]].expand(-1, -1, 4, -1)
    )
    assert not found["dq"][:, ::3].any()
    for name in ("dk", "dv"):
        assert not found[name][:, BLOCK : 2 * BLOCK].any(), name
    for name in ("dq", "dk", "dv"):
        assert found[name].isfinite().all(), name


@backend_params("span_attention", *BACKENDS)
@pytest.mark.parametrize("gated", [False, True], ids=["joint", "gated"])
@pytest.mark.parametrize("what", ["values that are nearly equal", "scores of hundreds"])
def test_small_differences(what: str, gated: bool, backend: str) -> None:
    """Of large numbers, found about as well as the float32 reference finds them."""
    call = draw(1, 60, 400, 2, 1, 64, 64, 2, 200, gated=gated)
    q, v = (call.leaves[name] for name in "qv")
    call = call.with_leaves(v=v + 100.0) if what.startswith("values") else call.with_leaves(q=q * 60)
    actual, plain = (run(call, b) for b in (backend, "reference"))
    for name, exact in run(call.double(), "reference").items():
        assert_three_way(actual[name], plain[name], exact, 3.0, 1e-6, name)


@backend_params("span_attention", *BACKENDS)
@pytest.mark.parametrize("dtype", list(LIMIT))
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_a_span_does_not_hold(bad: float, dtype: torch.dtype, backend: str) -> None:
    """Keys, values, queries and gradients that are not finite reach what sees them and nothing else."""
    call = draw(2, 40, 3 * BLOCK, masked=True, dtype=dtype)
    key, row = BLOCK + 9, 11
    sees = ((call.start <= key) & (key <= call.end)).any(-1)  # [B, T, H]
    assert call.key_mask is not None
    call.key_mask[:, key] = torch.tensor([True, False])  # in one batch entry it is masked
    clean = run(call, backend)
    for name in ("k", "v"):
        x = call.leaves[name].clone()
        x[:, key] = bad
        actual = run(call.with_leaves(**{name: x}), backend)
        for result in ("dq", "dgate", "dbase_out", "dbase_lse"):
            assert actual[result][1].isfinite().all(), f"{name}: {result} of a masked key"
            assert_close(actual[result][0][~sees[0]], clean[result][0][~sees[0]], LIMIT[dtype], f"{name}: {result}")
        assert not actual["dq"][0][sees[0]].isfinite().all(-1).any()
        seen_with = holds(call.start[0], call.end[0], 3 * BLOCK)
        touched = (seen_with & sees[0][..., None, None]).flatten(0, 2).any(0)
        for result in ("dk", "dv"):
            assert_close(actual[result][1], clean[result][1], LIMIT[dtype], f"{name}: {result} of a masked key")
            assert_close(actual[result][0][~touched], clean[result][0][~touched], LIMIT[dtype], f"{name}: {result}")
    upstream = Sampler(seed=7).normal(2, 40, 4, 24).bfloat16()
    upstream[0, row] = bad
    q = call.leaves["q"].clone()
    q[0, row] = bad
    seen = holds(call.start[0, row], call.end[0, row], 3 * BLOCK)
    by_head = (seen.any(1) & call.key_mask[0]).unflatten(0, (2, 2)).any(1)  # [Hkv, N]
    for actual in (run(call, backend, out=upstream), run(call.with_leaves(q=q), backend)):
        for result in ("dk", "dv"):
            apart = ~by_head.T
            assert_close(actual[result][0][apart], clean[result][0][apart], LIMIT[dtype], result)
            assert_same_bits(actual[result][1], clean[result][1], result)
        others = torch.arange(40) != row
        assert_same_bits(actual["dq"][:, others], clean["dq"][:, others])


@backend_params("span_attention", *BACKENDS)
@pytest.mark.parametrize("gated", [False, True], ids=["joint", "gated"])
def test_only_some_inputs(gated: bool, backend: str) -> None:
    call = draw(gated=gated)
    every = run(call, backend)
    for name in call.leaves:
        assert_same_bits(run(call, backend, name)[f"d{name}"], every[f"d{name}"], name)


@backend_params("span_attention", *BACKENDS)
@pytest.mark.parametrize("gated", [False, True], ids=["joint", "gated"])
def test_any_number_of_threads(gated: bool, backend: str) -> None:
    call = draw(2, 301, 1100, 6, 2, 8, 8, 4, 500, gated=gated)
    expected = run(call, backend)
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for name, x in run(call, backend).items():
                assert_same_bits(x, expected[name], f"{count} threads: {name}")
    finally:
        torch.set_num_threads(before)


@backend_params("span_attention", *BACKENDS)
@pytest.mark.parametrize("gated", [False, True], ids=["joint", "gated"])
def test_a_sequence_among_others(gated: bool, backend: str) -> None:
    """Has the bits that it has alone."""
    call = draw(12, 100, 700, gated=gated, masked=True)
    shapes = {"out": (12, 100, 4, 24), "lse": (12, 100, 4, 3 if gated else 1)}
    upstream = {name: Sampler(seed=1).normal(*shape) for name, shape in shapes.items()}
    every = run(call, backend, **upstream)
    assert call.key_mask is not None
    for b in (0, 7, 11):
        alone = Call(
            {name: x[b : b + 1] for name, x in call.leaves.items()},
            call.start[b : b + 1],
            call.end[b : b + 1],
            call.key_mask[b : b + 1],
        )
        for name, x in run(alone, backend, **{n: x[b : b + 1] for n, x in upstream.items()}).items():
            assert_same_bits(x, every[name][b : b + 1], name)


_MEMORY = """
import torch, subquad
torch.set_num_threads(2)

def peak():  # KiB; ru_maxrss would count the process that started this one
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

def train(tokens, spans):
    leaves = [torch.rand(1, tokens, 2, 64).requires_grad_() for _ in range(3)]
    gate = torch.full((1, tokens, 2, spans), 1 / spans, requires_grad=True)
    start = torch.randint(0, tokens, (1, tokens, 2, spans), dtype=torch.int32)
    before = peak()
    out, lse = subquad.span_attention(*leaves, start, start + 7, gate=gate, backend="native")
    (out.sum() + lse.sum()).backward()
    return 1024 * (peak() - before) / (tokens * 2)

train(256, 16)
print(train(16384, 16))
"""


@pytest.mark.slow
@backend_params("span_attention", "native")
def test_memory_of_training(backend: str) -> None:
    """Bytes for every query row of 16384, 64 elements wide, with 16 spans.

    out and its gradient, dq, dk and dv take 5 * 256 bytes; lse, its gradient, gates' gradients, two terms of a softmax
    and the lists of pairs 8 * 64. One tensor of all slots would take 16 * 256 by itself.
    """
    result = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 2500, f"{result.stdout.strip()} bytes for each row"
