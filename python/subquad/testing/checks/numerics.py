"""Are the numbers right: values, gradients, dtypes, empty and non-finite input, autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from ... import _native
from ..case import Case
from ..compare import assert_close, assert_same_bits, assert_same_nonfinite
from ..instruments import record_ops
from ..levels import at_level
from ..levels import levels as levels_under_test
from ..spec import Sample
from .registry import KERNELS, check


@check(per_dtype=True)
def forward(case: Case) -> None:
    """Results against the float64 oracle on the same rounded inputs: table, three-way rule, elementwise rule."""
    for sample in case.samples():
        oracle = case.reference(case.wide(sample))
        pairs = zip(case.call(sample), case.reference(sample), oracle, strict=True)
        for i, (actual, reference, expected) in enumerate(pairs):
            what = f"{sample.id}: output {i}"
            case.judge(actual, reference, expected, case.spec.tol.forward, what, rounded=sample.rounded_once)


@check(per_dtype=True)
def gradients(case: Case) -> None:
    """Gradients against float64 autograd of the reference, by the same rules."""
    for sample in case.samples():
        actual = case.gradients(sample)
        reference, oracle = _reference_gradients(case, sample), _reference_gradients(case, sample, wide=True)
        for name, grad in actual.items():
            what = f"{sample.id}: gradient of {name}"
            assert grad.shape == sample[name].shape, f"{what}: shape {list(grad.shape)}"
            case.judge(grad, reference[name], oracle[name], case.spec.tol.grad, what, rounded=sample.rounded_once)


def _reference_gradients(case: Case, sample: Sample, wide: bool = False) -> dict[str, torch.Tensor]:
    upstream = case.upstream(case.reference(sample))
    leaves = case.leaves(case.wide(sample) if wide else sample)
    outputs = case.reference(sample, **leaves)
    upstream = tuple(g.to(y.dtype) for g, y in zip(upstream, outputs, strict=True))
    return dict(zip(leaves, torch.autograd.grad(outputs, tuple(leaves.values()), upstream), strict=True))


@check(("reference",))
def gradcheck(case: Case) -> None:
    """The reference's gradient against finite differences in float64: the oracle of the oracle."""
    for sample in case.with_dtype(torch.float64).samples("small"):
        if sample.true_gradient:
            leaves = case.leaves(sample)

            def function(*tensors: torch.Tensor, sample: Sample = sample, names: tuple[str, ...] = tuple(leaves)):  # type: ignore[no-untyped-def]
                return case.reference(sample, **dict(zip(names, tensors, strict=True)))

            assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True), sample.id


@check(("reference",))
def float64(case: Case) -> None:
    """Without `backend=` the first that takes it runs, which is the reference; kernels asked for refuse it."""
    sample = case.wide(case.fullest())
    for cast in (False, True):
        with torch.autocast(case.device, torch.bfloat16, cast):
            for a, b in zip(case.invoke(sample.args, sample.kwargs), case.reference(sample), strict=True):
                assert_close(a, b, 1e-12, "float64")
    try:
        case.invoke(sample.args, {**sample.kwargs, "backend": "native"})
    except (TypeError, ValueError) as error:  # ValueError: there is none to ask
        assert "float64" in str(error) or str(error).startswith("backend: "), str(error)
    else:
        raise AssertionError("a kernel took float64")


@check()
def tangents(case: Case) -> None:
    """Forward-mode differentiation against the float64 reference's: of all arguments and of each alone, a state among them."""
    sample = case.fullest()
    names, generator = case.float_args(sample), torch.Generator().manual_seed(98)
    direction = {n: torch.randn(sample[n].shape, generator=generator).to(sample[n].dtype) for n in names}
    for chosen in (names, *((n,) for n in names)):
        with torch.no_grad(), forward_ad.dual_level():
            duals = {n: forward_ad.make_dual(sample[n], direction[n]) for n in chosen}
            wide = {n: forward_ad.make_dual(sample[n].double(), direction[n].double()) for n in chosen}
            pairs = zip(case.call(sample, **duals), case.reference(case.wide(sample), **wide), strict=True)
            for i, (actual, expected) in enumerate(pairs):
                found, oracle = (forward_ad.unpack_dual(x).tangent for x in (actual, expected))
                what = f"{sample.id}: tangent of output {i} along {', '.join(chosen)}"
                if oracle is None:
                    assert found is None or not found.count_nonzero(), what
                    continue
                assert found is not None, f"{what} was dropped"
                assert_close(found, oracle, 1e-4, what)


@check()
def partial_gradients(case: Case) -> None:
    """One gradient alone has the bits it has among all; an expanded upstream gradient is understood."""
    sample = case.fullest()
    together = case.gradients(sample)
    for name, grad in together.items():
        assert_same_bits(case.gradients(sample, (name,))[name], grad, f"gradient of {name} alone")
    leaves = case.leaves(sample)
    outputs = case.call(sample, **leaves)
    ones = tuple(torch.ones_like(y) for y in outputs)
    dense = torch.autograd.grad(outputs, tuple(leaves.values()), ones, retain_graph=True)
    expanded = tuple(torch.ones((), dtype=y.dtype, device=y.device).expand(y.shape) for y in outputs)
    for name, a, b in zip(leaves, torch.autograd.grad(outputs, tuple(leaves.values()), expanded), dense, strict=True):
        assert_same_bits(a, b, f"gradient of {name} with an expanded upstream gradient")


@check(KERNELS)
def double_backward(case: Case) -> None:
    """A second derivative raises instead of being silently wrong or, in a gradient penalty, silently left out."""
    sample = case.first()
    for variable_upstream in (False, True):
        leaves = case.leaves(sample)
        outputs = case.call(sample, **leaves)
        upstream = tuple(g.requires_grad_(variable_upstream) for g in case.upstream(outputs))
        grads = torch.autograd.grad(outputs, tuple(leaves.values()), upstream, create_graph=True)
        loss = torch.stack([y.float().sum() for y in (*outputs, *(g.square() for g in grads))]).sum()
        try:
            torch.autograd.grad(loss, tuple(leaves.values()), allow_unused=True)
        except RuntimeError as error:
            assert "once_differentiable" in str(error), f"the error does not say why: {error}"
        else:
            raise AssertionError("a second derivative was computed, although the backward kernel has none")


@check(per_dtype=True)
def empty(case: Case) -> None:
    """Extents of zero give what the reference gives, forward and backward."""
    samples = case.samples("empty")
    assert samples, "the spec has no empty samples"
    for sample in samples:
        for actual, reference in zip(case.call(sample), case.reference(sample), strict=True):
            assert_same_bits(actual, reference, sample.id)
        for name, grad in case.gradients(sample).items():
            assert grad.shape == sample[name].shape, f"{sample.id}: gradient of {name}: shape {list(grad.shape)}"
            assert not bool(grad.count_nonzero()) or name.startswith("b_"), (
                f"{sample.id}: gradient of {name} is not zero"
            )


@check()
def dtypes(case: Case) -> None:
    """Supported dtypes give the reference's result dtype; everything else, and what is sparse, is a TypeError that names the
    argument."""
    for dtype in case.spec.dtypes:
        sample = case.with_dtype(dtype).first()
        got = [y.dtype for y in case.call(sample)]
        wanted = [y.dtype for y in case.reference(sample)]
        assert got == wanted, f"{dtype}: result dtypes {got}, expected {wanted}"
    sample = case.fullest()
    for name in case.float_args(sample):
        value = sample[name]
        others: list[Any] = [value.to(t) for t in (torch.int32, torch.complex64, torch.float8_e4m3fn)]
        for wrong in (*others, value.tolist()):
            _raises_about(case, sample.replace(**{name: wrong}), name, TypeError)
        if name != case.float_args(sample)[0]:
            _raises_about(case, sample.replace(**{name: value.bfloat16()}), name, TypeError)
    for name, tensor in sample.args.items():
        if tensor is not None:
            _raises_about(case, sample.replace(**{name: tensor.to_sparse()}), name, TypeError)
    if case.backend != "reference":
        _raises_about(case, case.wide(sample), case.float_args(sample)[0], TypeError)


def _raises_about(case: Case, sample: Sample, name: str, kind: type[Exception]) -> None:
    try:
        case.call(sample)
    except kind as error:
        assert str(error).startswith(f"{name}: "), f"the message does not name {name}: {error}"
    else:
        value = sample[name]
        raise AssertionError(f"{name} = {getattr(value, 'dtype', type(value))} was accepted")


@check(per_dtype=True)
def nan(case: Case) -> None:
    """One NaN or Inf in an argument shows in exactly the results that the oracle says depend on it."""
    sample = case.fullest(tokens=case.spec.tokens[0])
    generator = torch.Generator().manual_seed(5)
    values = [float("inf"), float("nan"), float("-inf"), float("nan"), float("nan")]
    if (
        case.backend == "triton" and case.device == "cpu"
    ):  # minutes in the interpreter; 0 * inf shows what NaN does, and more
        values = values[: 3 if case.dtype is case.spec.dtypes[0] else 1]
    for name in case.float_args(sample):
        for value in values:
            poisoned = sample[name].contiguous().clone()
            poisoned.view(-1)[int(torch.randint(poisoned.numel(), (), generator=generator))] = value
            bad = sample.replace(**{name: poisoned})
            oracle = case.reference(case.wide(bad))
            for i, (actual, expected) in enumerate(zip(case.call(bad), oracle, strict=True)):
                what = f"{value} in {name}: output {i}"
                assert_same_nonfinite(actual, expected, what)
                assert_close(actual, expected, case.limit(actual.dtype, case.spec.tol.forward), what)


@check(("native",), per_dtype=True)
def levels(case: Case) -> None:
    """Every raw operator runs the kernels of the level that was asked for, and those agree with the weakest level's."""
    if case.device != "cpu":
        return
    level, weakest = case.level or _native.cpu_isa(), levels_under_test()[0]
    for sample in case.samples("small"):
        with record_ops(case.backend) as calls:
            case.call(sample)
            case.gradients(sample)
        for call in calls:
            found = {}
            for asked in (level, weakest):
                with at_level(asked):
                    found[asked] = call.repeat()
                    ran = _native.cpu_isas_ran()
                told = ran in ({asked}, {case.spec.lesser_levels.get(str(asked))})
                assert told, f"{sample.id}: {call.name}: kernels of {ran or 'no level'} ran, expected {asked}"
            table = case.spec.tol.grad if call.name.endswith("_bwd") else case.spec.tol.forward
            for i, (a, b) in enumerate(zip(found[level], found[weakest], strict=True)):
                assert_close(a, b, case.limit(a.dtype, table), f"{sample.id}: {call.name}: output {i} at {level}")


@check()
def autocast(case: Case) -> None:
    """The op runs in the autocast dtype or is left alone, as declared; gradients keep their parameter's dtype."""
    sample = case.fullest()
    low = torch.bfloat16
    expected_sample = sample.to(low, case.float_args(sample)) if case.spec.autocast == "cast" else sample
    with torch.autocast(case.device, dtype=low):
        actual = case.call(sample)
    for a, b in zip(actual, case.call(expected_sample), strict=True):
        assert_same_bits(a, b, "result under autocast")
    if case.spec.inference:
        return
    leaves = case.leaves(sample)
    with torch.autocast(case.device, dtype=low):
        outputs = case.call(sample, **leaves)
    grads = torch.autograd.grad(outputs, tuple(leaves.values()), case.upstream(outputs))
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        assert grad.dtype is leaf.dtype, f"gradient of {name}: {grad.dtype}, the parameter is {leaf.dtype}"
        expected = case.gradients(expected_sample)[name]
        assert_close(grad, expected.to(grad.dtype), case.spec.tol.grad[low], f"gradient of {name}")
