"""The generic checks, tried on a toy op: a right one passes all; every planted fault fails the check made for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from subquad import _backends, _checks
from subquad.ops._autograd import once_differentiable
from subquad.ops._call import by_definition
from subquad.testing import OpSpec, Property, Sample, Sampler, Task, run_all
from subquad.testing.case import Case
from subquad.testing.checks import CHECKS
from subquad.testing.runner import tasks

FAULT: str | None = None  # what is wrong with the toy at the moment


def reference(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    wide = x if x.dtype is torch.float64 else x.float()
    return (wide * (w.detach() if FAULT == "reference-gradient" else w).to(wide.dtype)).to(x.dtype)


def _kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x * w, x [N, D] contiguous, w [D]."""
    y = torch.empty(x.shape, dtype=x.dtype)
    if FAULT == "ignores-strides":
        x = x.as_strided(x.shape, (x.shape[1], 1))
    if FAULT == "writes-input":
        x.mul_(1.0)
        x[0] += 1.0
    wide = x.float() * w.float()
    if FAULT == "value":
        wide = wide * (1 + 1e-4)
    elif FAULT == "rounds-twice":
        wide = wide.bfloat16().float() if x.dtype is torch.float32 else wide
    elif FAULT == "drops-nan":
        wide = wide.nan_to_num()
    elif FAULT == "random":
        wide = wide * (1 + 1e-6 * torch.rand(()))
    elif FAULT == "threads":
        wide = wide * (1 + 1e-6 * torch.get_num_threads())
    elif FAULT == "knows-neighbours":
        wide = wide + 1e-6 * wide.mean(0)
    elif FAULT == "reads-outside" and x.numel():
        wide[0, 0] += 0.0 * x.as_strided((1,), (1,), x.storage_offset() + x.numel())[0]
    elif FAULT == "crashes-on-empty" and not x.numel():
        raise RuntimeError("empty")
    if FAULT == "leaves-gaps":
        y[: x.shape[0] - 1] = wide[: x.shape[0] - 1].to(x.dtype)
    else:
        y.copy_(wide)
    if FAULT == "writes-outside" and y.numel():
        y.as_strided((1,), (1,), y.storage_offset() + y.numel()).zero_()
    if FAULT == "other-strides":
        return y.t().contiguous().t()
    return x if FAULT == "returns-input" else y


def _fake(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=torch.float64 if FAULT == "other-dtype" else x.dtype, device=x.device)


library = torch.library.Library("subquad", "FRAGMENT")
library.define("toy_scale_fwd(Tensor x, Tensor w) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
library.impl("toy_scale_fwd", _kernel, "CPU")
torch.library.register_fake("subquad::toy_scale_fwd", _fake, lib=library)


class _Toy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return _kernel(x, w) if FAULT == "bypasses-operator" else torch.ops.subquad.toy_scale_fwd(x, w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, w = ctx.saved_tensors
        if FAULT == "gradient-ignores-strides":
            x = x.as_strided(x.shape, (x.shape[1], 1))
        grad_w = (grad.float() * x.float()).sum(0) * (1.01 if FAULT == "gradient" else 1.0)
        if FAULT == "gradient-needs-other" and not ctx.needs_input_grad[0]:
            grad_w = grad_w * 2
        return (grad.float() * w.float()).to(x.dtype), grad_w.to(w.dtype)


class _Twice(_Toy):
    """Pretends to be differentiable twice."""

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, w = ctx.saved_tensors
        return torch.ops.subquad.toy_scale_fwd(grad, w.detach()), (grad.float() * x.float()).sum(0).to(w.dtype)


def toy(x: torch.Tensor, w: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    for name, value in (("x", x), ("w", w)):
        if FAULT != "takes-anything" and (not isinstance(value, torch.Tensor) or not value.is_floating_point()):
            raise TypeError(f"{name}: expected a tensor")
        if FAULT != "takes-anything" and (value.dtype.itemsize == 1 or value.dtype is not x.dtype):
            raise TypeError(f"{name}: expected another dtype")
        if FAULT not in ("takes-anything", "takes-sparse") and value.layout is not torch.strided:
            raise TypeError(f"{name}: expected a dense tensor")
        if FAULT != "reads-freed":
            _checks.memory(name, value)
    wide = x.dtype is torch.float64
    if backend is None and wide and FAULT != "refuses-float64":
        backend = "reference"
    if FAULT == "drops-tangents":
        x, w = (forward_ad.unpack_dual(value).primal for value in (x, w))
    if FAULT != "vmap" and (backend == "reference" or by_definition((x, w))):
        return reference(x.contiguous(), w)
    if wide:
        raise TypeError("x: expected a narrower dtype, got float64")
    if FAULT == "looks-at-values" and bool((x > 100).any()):
        raise ValueError("x: too large")
    if FAULT == "counts-rows" and x.shape[0] in (3, 5):
        x = x + 0
    x = x if "ignores-strides" in str(FAULT) else x.contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):
        return (_Twice if FAULT == "differentiates-twice" else _Toy).apply(x, w)
    return _kernel(x, w) if FAULT == "bypasses-operator" else torch.ops.subquad.toy_scale_fwd(x, w)


def samples(sampler: Sampler) -> Iterator[Sample]:
    width = 33 if sampler.size == "large" else 7
    rows = 0 if sampler.size == "empty" else sampler.tokens or 4
    w = sampler.normal(width)
    yield Sample("only", {"x": sampler.normal(rows, width), "w": w}, rows_independent=True)


def _linear(case: Case) -> None:
    sample = case.first()
    x = sample["x"]
    assert x is not None
    torch.testing.assert_close(case.call(sample, x=2 * x)[0], 2 * case.call(sample)[0])


SPEC = OpSpec(
    name="toy_scale",
    stem="toy_scale",
    fn=toy,
    reference=reference,
    samples=samples,
    grad_args=("x", "w"),
    rows=("x",),
    properties=(Property("linear", _linear),),
    missing={"check:switching": "the toy is not in the backend table", "check:levels": "the toy is Python"},
)
RIGHT = [task for task in tasks(SPEC, ("native", "reference")) if not task.check.slow and not task.missing]


@pytest.mark.parametrize("task", RIGHT, ids=[task.id for task in RIGHT])
def test_right_op_passes(task: Task) -> None:
    task.run()


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("value", "forward"),
        ("rounds-twice", "forward"),
        ("leaves-gaps", "forward"),
        ("gradient", "gradients"),
        ("gradient-needs-other", "partial_gradients"),
        ("reference-gradient", "gradcheck"),
        ("differentiates-twice", "double_backward"),
        ("crashes-on-empty", "empty"),
        ("takes-anything", "dtypes"),
        ("takes-sparse", "dtypes"),
        ("refuses-float64", "float64"),
        ("drops-tangents", "tangents"),
        ("drops-nan", "nan"),
        ("ignores-strides", "layouts"),
        ("gradient-ignores-strides", "gradient_layouts"),
        ("writes-outside", "guards"),
        ("reads-outside", "guards"),
        ("writes-input", "guards"),
        ("random", "determinism"),
        ("threads", "threads"),
        ("knows-neighbours", "row_independence"),
        ("returns-input", "opcheck"),
        ("other-strides", "fakes"),
        ("other-dtype", "fakes"),
        ("bypasses-operator", "checkpointing"),
        ("bypasses-operator", "opcheck"),
        ("vmap", "vmap"),
        pytest.param("looks-at-values", "compile_static", marks=pytest.mark.heavy),
        pytest.param("counts-rows", "compile_dynamic", marks=pytest.mark.heavy),
        pytest.param("counts-rows", "export", marks=pytest.mark.heavy),
    ],
)
def test_planted_fault_is_found(fault: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = "reference" if "reference" in fault else "native"
    torch._dynamo.reset()
    monkeypatch.setitem(globals(), "FAULT", fault)
    with pytest.raises(Exception) as caught:
        Task(SPEC, CHECKS[check], backend, torch.float32).run()
    assert not isinstance(caught.value, (NameError, KeyError, AttributeError)), caught.value
    torch._dynamo.reset()


def test_autocast_declaration_is_checked() -> None:
    wrong = OpSpec(**{**vars(SPEC), "autocast": "cast"})
    with pytest.raises(AssertionError, match="autocast"):
        Task(wrong, CHECKS["autocast"], "native", torch.float32).run()


def test_every_check_has_a_planted_fault() -> None:
    marks = test_planted_fault_is_found.pytestmark  # type: ignore[attr-defined]
    planted = {getattr(values, "values", values)[1] for values in marks[0].args[1]} | {"autocast"}
    # switching needs the backend table (test_backends.py), freed_storage a planted read of freed memory, levels native kernels
    # (test_levels.py), schedules the emulator (tests/emulator/test_simt.py), and laws of state a toy that has one
    # (test_state_laws.py)
    laws = {name for name, check in CHECKS.items() if not check.applies(SPEC)}
    assert set(CHECKS) - planted - laws == {"switching", "freed_storage", "levels", "schedules", "compile_inductor"}


def test_run_all_reports_instead_of_raising(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "unavailable", lambda *_, **__: None)
    monkeypatch.setitem(globals(), "FAULT", "value")
    outcomes = {o.task.id: o for o in run_all(SPEC, "native", checks=("forward", "empty", "switching", "linear"))}
    assert outcomes["toy_scale-forward-native-fp32"].status == "failed"
    assert "relative L2 error" in outcomes["toy_scale-forward-native-fp32"].detail
    assert outcomes["toy_scale-empty-native-bf16"].status == "passed"
    assert outcomes["toy_scale-linear-native-fp16"].status == "passed"
    assert len(outcomes) == 9


def test_run_all_skips_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "unavailable", lambda *_, **__: "no such machine")
    assert {(o.status, o.detail) for o in run_all(SPEC, "native", checks=("forward",))} == {
        ("skipped", "no such machine")
    }
    assert run_all(SPEC, "reference", checks=("switching",))[0].detail == SPEC.missing["check:switching"]


def test_run_all_refuses_unknown_checks() -> None:
    with pytest.raises(ValueError, match=r"checks: expected some of .* got nonsense"):
        run_all(SPEC, "reference", checks=("nonsense",))
