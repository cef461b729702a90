"""Are the raw operators good citizens of torch: schema, fakes, checkpointing, function transforms."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..case import Case
from ..compare import assert_close, assert_same_bits
from ..instruments import OpCall, record_ops
from .registry import KERNELS, check

_PER_OP = {
    "native": 3,
    "triton": 1,
    "simt": 3,
}  # opcheck runs every call several times, which takes an interpreter long


def recorded(case: Case) -> list[OpCall]:
    """Calls of raw operators that the small samples lead to."""
    calls = []
    for sample in case.samples("small"):
        with record_ops(case.backend) as seen:
            case.call(sample)
            case.gradients(sample)
        calls += seen
    if not calls:
        raise AssertionError(f"no operator of {case.namespace} was called by any sample")
    return calls


@check(KERNELS)
def opcheck(case: Case) -> None:
    """torch.library.opcheck: schema, autograd registration, fake tensors, AOT dispatch with dynamic shapes."""
    counts: dict[str, int] = {}
    for call in recorded(case):
        counts[call.name] = counts.get(call.name, 0) + 1
        if counts[call.name] <= _PER_OP[case.backend]:
            detached = tree_map(lambda a: a.detach() if isinstance(a, torch.Tensor) else a, call.args)
            torch.library.opcheck(call.op, detached)


@check(KERNELS, per_dtype=True)
def fakes(case: Case) -> None:
    """The fake of a raw operator has the shape, dtype, device, strides and storage offset of the real result."""
    for call in recorded(case):
        with FakeTensorMode() as mode:
            fake = call.op(*tree_map(lambda a: mode.from_tensor(a) if isinstance(a, torch.Tensor) else a, call.args))
        for promised, real in zip(tree_leaves(fake), tree_leaves(call.result), strict=True):
            for attribute in ("shape", "dtype", "device", "stride", "storage_offset"):
                a, b = getattr(promised, attribute), getattr(real, attribute)
                a, b = (a(), b()) if callable(a) else (a, b)
                assert a == b, f"{call.name}: the fake promises {attribute} {a}, the kernel returned {b}"


@check(KERNELS)
def checkpointing(case: Case) -> None:
    """Selective checkpointing sees the operators: what it saves runs once instead of twice, same gradients."""
    sample = case.first()
    expected = case.gradients(sample)

    def count(must_save: bool) -> int:
        def policy(_: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
            ours = getattr(op, "namespace", None) == case.namespace
            return CheckpointPolicy.MUST_SAVE if ours and must_save else CheckpointPolicy.PREFER_RECOMPUTE

        leaves = case.leaves(sample)
        names = tuple(leaves)

        def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return case.call(sample, **dict(zip(names, tensors, strict=True)))

        with record_ops(case.backend) as calls:
            outputs = checkpoint(
                run,
                *leaves.values(),
                use_reentrant=False,
                context_fn=lambda: create_selective_checkpoint_contexts(policy),
            )
            grads = torch.autograd.grad(outputs, tuple(leaves.values()), case.upstream(outputs))
        for name, grad in zip(names, grads, strict=True):
            assert_same_bits(grad, expected[name], f"gradient of {name} under checkpointing")
        return sum(call.name.endswith("_fwd") for call in calls)

    with record_ops(case.backend) as calls:
        case.call(sample, **case.leaves(sample))
    forward = sum(call.name.endswith("_fwd") for call in calls)  # without those that a backward runs
    recomputed, saved = count(False), count(True)
    assert recomputed == saved + forward and saved >= forward > 0, (
        f"forward operators ran {recomputed} times recomputed, {saved} times saved, {forward} times in a forward pass"
    )


@check()
def vmap(case: Case) -> None:
    """torch.vmap over the rows' tensors equals a loop, and so do per-sample gradients."""
    samples = [case.first(tokens=case.spec.tokens[0], seed=seed) for seed in range(3)]
    base, rows = samples[0], case.rows(samples[0])
    stacked = tuple(torch.stack([s[n] for s in samples]) for n in rows)
    shared = {n: a for n, a in case.leaves(base).items() if n not in rows}

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return case.call(base, **dict(zip(rows, tensors, strict=True)))

    batched = torch.vmap(run)(*stacked)
    for k, sample in enumerate(samples):
        looped = run(*(sample[n] for n in rows))
        for a, b in zip(batched, looped, strict=True):
            assert_close(a[k], b, case.spec.tol.forward[b.dtype], f"sample {k} of vmap")

    floats = tuple(n for n in rows if base[n].is_floating_point())
    places = {n: x for n, x in zip(rows, stacked, strict=True) if n not in floats}

    def loss(
        tensors: tuple[torch.Tensor, ...], weights: dict[str, torch.Tensor], given: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        outputs = case.call(base, **dict(zip(floats, tensors, strict=True)), **weights, **given)
        return sum((y.float().square().sum() for y in outputs), torch.zeros(()))

    per_sample = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None, 0))(
        tuple(x for n, x in zip(rows, stacked, strict=True) if n in floats),
        {n: w.detach() for n, w in shared.items()},
        places,
    )
    for k, sample in enumerate(samples):
        tensors = tuple(sample[n].detach().requires_grad_() for n in floats)
        expected = torch.autograd.grad(
            loss(tensors, shared, {n: sample[n] for n in places}), (*tensors, *shared.values())
        )
        for name, a, b in zip((*floats, *shared), tree_leaves(per_sample), expected, strict=True):
            assert_close(a[k], b, case.spec.tol.grad[b.dtype], f"gradient of {name}, sample {k} of vmap(grad)")
