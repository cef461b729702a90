"""Is memory treated right: layouts, margins, repeated runs, threads, and rows that must not know of each other."""

from __future__ import annotations

import ctypes
import warnings

import torch

from ... import _native
from ..._backends import SubquadWarning
from ..case import Case
from ..compare import assert_close, assert_same_bits
from ..instruments import guarded_allocations, record_ops
from ..layouts import LAYOUTS, changes_strides, lay_out
from ..spec import Sample
from .registry import KERNELS, check


@check(KERNELS)
def freed_storage(case: Case) -> None:
    """A tensor whose memory was given up, as sharded parameters do between their uses, is refused by name, not read."""
    sample = case.fullest()
    for name, value in sample.args.items():
        if value is None or not value.numel():
            continue
        freed = value.clone()
        freed.untyped_storage().resize_(0)
        for cast in (False, True):
            try:
                with torch.no_grad(), torch.autocast(case.device, torch.bfloat16, cast):
                    case.spec.fn(**{**sample.args, name: freed}, **sample.kwargs, backend=case.backend)
            except (ValueError, RuntimeError) as error:
                message = str(error)
            else:
                raise AssertionError(f"{name} was read though its storage is freed")
            assert "whose storage was freed" in message, f"{name}: {message}"


@check()
def layouts(case: Case) -> None:
    """Every layout of every argument gives the contiguous result, or is refused with a message as the spec declares.

    One argument at a time; in Triton's interpreter all at once, each in another layout, until each was in all of them.
    """
    sample = case.fullest(tokens=case.spec.tokens[0])
    contiguous = case.call(sample)
    accepted: dict[str, list[str]] = {}
    for name, value in sample.args.items():
        for layout in LAYOUTS if value is not None else ():
            if value is not None and changes_strides(value, layout):
                if layout in case.spec.refuses.get(name, ()):
                    _refused(case, sample, name, lay_out(value, layout), layout)
                else:
                    accepted.setdefault(name, []).append(layout)
    single = [{name: layout} for name, taken in accepted.items() for layout in taken]
    turns = [
        {name: taken[(turn + i) % len(taken)] for i, (name, taken) in enumerate(accepted.items())}
        for turn in range(len(LAYOUTS))
    ]
    for chosen in turns if case.backend == "triton" and case.device == "cpu" else single:
        variants = {name: lay_out(sample[name], layout) for name, layout in chosen.items()}
        what = ", ".join(f"{name} {layout}" for name, layout in chosen.items())
        same = {name: variants[name].contiguous() for name, layout in chosen.items() if layout == "expanded"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SubquadWarning)  # that a state is copied
            found = case.call(sample, **variants)
        for a, b in zip(found, case.call(sample, **same) if same else contiguous, strict=True):
            assert_close(a, b, case.spec.tol.forward[a.dtype], what)
            assert a.stride() == b.stride(), f"{what}: result strides {a.stride()}, expected {b.stride()}"


def _refused(case: Case, sample: Sample, name: str, variant: torch.Tensor, layout: str) -> None:
    try:
        case.call(sample, **{name: variant})
    except ValueError as error:
        assert str(error).startswith(f"{name}: "), f"the message does not name {name}: {error}"
        assert "stride" in str(error) or "contiguous" in str(error), f"the message does not say what is wrong: {error}"
    else:
        raise AssertionError(f"{name} {layout} was accepted, although the spec says it is refused")


@check()
def gradient_layouts(case: Case) -> None:
    """Gradients with every argument in a layout of its own equal those of contiguous arguments."""
    sample = case.fullest(tokens=case.spec.tokens[0])
    expected = case.gradients(sample)
    for layout in ("transposed", "sliced", "strided", "offset"):
        variants = {}
        for name in case.float_args(sample):
            if layout not in case.spec.refuses.get(name, ()):
                variants[name] = lay_out(sample[name], layout).requires_grad_()
        outputs = case.call(sample, **variants)
        grads = torch.autograd.grad(outputs, tuple(variants.values()), case.upstream(outputs))
        for name, grad in zip(variants, grads, strict=True):
            assert_close(
                grad, expected[name], case.spec.tol.grad[grad.dtype], f"gradient of {name}, arguments {layout}"
            )


@check(KERNELS, per_dtype=True, memory=True)
def guards(case: Case) -> None:
    """With NaN around every input, output and workspace: nothing outside is written, and nothing outside is used."""
    if case.device != "cpu":
        return
    for sample in case.samples("small"):
        expected = (*case.call(sample), *case.gradients(sample).values())
        with guarded_allocations() as guards:
            inside = sample.replace(**{n: guards.copy(a, n) for n, a in sample.args.items() if a is not None})
            results = case.call(inside)
            if not case.spec.inference:
                leaves = {n: inside[n].detach().requires_grad_() for n in case.float_args(inside)}
                outputs = case.call(inside, **leaves)
                results += torch.autograd.grad(outputs, tuple(leaves.values()), case.upstream(outputs))
            guards.check()
        for a, b in zip(results, expected, strict=True):
            assert_close(a, b, 1e-6 if a.dtype is torch.float32 else case.spec.tol.forward[a.dtype], sample.id)


@check(per_dtype=True, memory=True)
def determinism(case: Case) -> None:
    """Twenty runs, the same bits, forward and backward. Interpreter and emulator, without concurrency, get two: there
    only memory that was never written can differ, and other orders are the business of `schedules`."""
    sample = case.fullest(size=None)
    expected, grads = case.call(sample), case.gradients(sample)
    sequential = case.backend in ("triton", "simt") and case.device == "cpu"
    for _ in range(1 if sequential else 19):
        for a, b in zip(case.call(sample), expected, strict=True):
            assert_same_bits(a, b, f"{sample.id}: a repeated run")
    for _ in range(1 if sequential else 3):
        for name, grad in case.gradients(sample).items():
            assert_same_bits(grad, grads[name], f"{sample.id}: gradient of {name}, a repeated run")


@check(("native",), per_dtype=True)
def threads(case: Case) -> None:
    """Every raw operator gives the same bits with 1, 2 and 3 threads."""
    if case.device != "cpu":
        return
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for sample in case.samples("large"):
            with record_ops(case.backend) as calls:
                case.call(sample)
                case.gradients(sample)
            first = [call.repeat() for call in calls]
            for count in (2, 3):
                torch.set_num_threads(count)
                for call, expected in zip(calls, first, strict=True):
                    for a, b in zip(call.repeat(), expected, strict=True):
                        assert_same_bits(a, b, f"{sample.id}: {call.name} with {count} threads instead of 1")
            torch.set_num_threads(1)
    finally:
        torch.set_num_threads(before)


@check(("simt",), per_dtype=True, memory=True)
def schedules(case: Case) -> None:
    """The same bits in whatever order blocks, warps and lanes of the emulator run: a missing barrier shows here."""
    emulator = ctypes.CDLL(str(_native.loaded()["_C_simt"]))
    set_seed = emulator.subquad_simt_set_seed
    set_seed.argtypes = [ctypes.c_uint64]
    for sample in case.samples():
        with record_ops(case.backend) as calls:
            case.call(sample)
            case.gradients(sample)
        first = [call.repeat() for call in calls]
        try:
            for seed in (2, 3, 4):
                set_seed(seed)
                for call, expected in zip(calls, first, strict=True):
                    for a, b in zip(call.repeat(), expected, strict=True):
                        assert_same_bits(a, b, f"{sample.id}: {call.name}, schedule {seed}")
        finally:
            set_seed(1)


@check(KERNELS, per_dtype=True, memory=True)
def row_independence(case: Case) -> None:
    """A row's result has the same bits alone, in any order, and beside rows of NaN, where the sample promises it."""
    samples = [s for s in case.samples() if s.rows_independent and _rows(case, s) > 1]
    if not samples:
        raise AssertionError(
            "no sample with several rows promises independence; declare check:row_independence missing"
        )
    for sample in samples:
        count = _rows(case, sample)
        together = case.call(sample)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(3))
        moved = case.call(sample, **{n: sample[n][order] for n in case.rows(sample)})
        for a, b in zip(moved, together, strict=True):
            assert_same_bits(a, b[order], f"{sample.id}: rows in another order")
        for row in {0, count // 2, count - 1}:
            alone = case.call(sample, **{n: sample[n][row : row + 1] for n in case.rows(sample)})
            floats = (n for n in case.rows(sample) if sample[n].is_floating_point())  # counters say what is to be done
            beside_nan = {n: torch.full_like(sample[n], float("nan")) for n in floats}
            for name, tensor in beside_nan.items():
                tensor[row] = sample[name][row]
            poisoned = case.call(sample, **beside_nan)
            for a, b, c in zip(alone, poisoned, together, strict=True):
                assert_same_bits(a[0], c[row], f"{sample.id}: row {row} alone")
                assert_same_bits(b[row], c[row], f"{sample.id}: row {row} beside rows of NaN")


def _rows(case: Case, sample: Sample) -> int:
    return sample[case.spec.rows[0]].shape[0]
