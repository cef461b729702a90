"""The laws of state, tried on a toy that adds to its state: a right one passes; every planted fault fails the law for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from subquad.testing import OpSpec, Sample, Sampler, Task
from subquad.testing.checks import CHECKS
from subquad.testing.runner import tasks

FAULT: str | None = None  # what is wrong with the toy at the moment


def reference(
    x: torch.Tensor, state: torch.Tensor, total: torch.Tensor, index: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    assert index is None
    after = state + x
    return after, after, total + x.to(total.dtype).sum(1)


def _kernel(
    x: torch.Tensor, state: torch.Tensor, total: torch.Tensor, index: torch.Tensor | None = None
) -> torch.Tensor:
    """state[index] += x, total[index] += sum x, for the rows with an index."""
    if FAULT == "copies-inside":
        state.copy_(state.clone().add_(0.0))
    places = torch.arange(x.shape[0]) if index is None else index.long()
    rows = (places >= 0).nonzero().flatten()
    if FAULT == "skipped-writes-last":
        rows = torch.arange(x.shape[0])
    y = torch.empty_like(x) if FAULT == "skipped-is-not-zero" else torch.zeros_like(x)
    if FAULT == "skipped-is-not-zero":
        y.fill_(1.0)
    state[places[rows]] += x[rows]
    total[places[rows]] += x[rows].to(total.dtype).sum(1)
    if FAULT == "writes-outside" and index is not None:
        state.as_strided((1,), (1,), state.storage_offset() + state.numel()).zero_()
    if FAULT == "touches-others" and index is not None:
        state[[i for i in range(state.shape[0]) if i not in places.tolist()][:1]] = 0.0
    y[rows] = state[places[rows]]
    return y


library = torch.library.Library("subquad", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag,)
library.define("toy_step_(Tensor x, Tensor(a!) state, Tensor(b!) total, Tensor? index) -> Tensor", tags=TAGS)
library.define("toy_next(Tensor x, Tensor state, Tensor total, Tensor? index) -> (Tensor, Tensor, Tensor)", tags=TAGS)
library.impl("toy_step_", _kernel, "CPU")


def _next(
    x: torch.Tensor, state: torch.Tensor, total: torch.Tensor, index: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    after = state.clone(), total.clone()
    return _kernel(x, *after, index), *after


library.impl("toy_next", _next, "CPU")
torch.library.register_fake("subquad::toy_step_", lambda x, *_: torch.empty_like(x), lib=library)
torch.library.register_fake(
    "subquad::toy_next", lambda x, s, t, _: tuple(torch.empty_like(a) for a in (x, s, t)), lib=library
)


def _span(x: torch.Tensor) -> tuple[int, int]:
    extent = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1 if x.numel() else 0
    return x.data_ptr(), x.data_ptr() + extent * x.element_size()


def _check_memory(named: dict[str, torch.Tensor]) -> None:
    for name in ("state", "total"):
        if FAULT != "allows-stride-0" and 0 in named[name].stride() and named[name].numel() > 1:
            raise ValueError(f"{name}: expected memory of its own for every element")
        for other, x in named.items():
            if other == name or (FAULT == "allows-inputs" and other == "x"):
                continue
            if FAULT == "allows-two-states" and other != "x":
                continue
            (a, b), (c, d) = _span(named[name]), _span(x)
            shares = x.untyped_storage().data_ptr() == named[name].untyped_storage().data_ptr()
            if shares if FAULT == "refuses-neighbours" else a < d and c < b:
                error = TypeError if FAULT == "other-error" else ValueError
                raise error("shared memory" if FAULT == "nameless" else f"{name}: expected no memory of {other}")


def toy(
    x: torch.Tensor,
    state: torch.Tensor,
    total: torch.Tensor,
    *,
    index: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    named = {"x": x, "state": state, "total": total}
    for name, value in named.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise TypeError(f"{name}: expected a tensor of floats")
        if value.dim() != (1 if name == "total" else 2):
            raise ValueError(f"{name}: expected another shape")
    if FAULT == "writes-before-checks":
        state[0] += 1.0
    for name, value in named.items():
        if FAULT != "drops-gradients" and torch.is_grad_enabled() and value.requires_grad:
            raise ValueError(f"{name}: expected no gradient")
    if not torch.compiler.is_compiling():
        _check_memory(named)
    if index is not None:
        if index.dtype not in (torch.int32, torch.int64) or index.shape != x.shape[:1]:
            raise TypeError("index: expected integers, one for a row")
        if not torch.compiler.is_compiling():
            used = index[index >= 0]
            twice = FAULT != "takes-twice" and used.unique().numel() != used.numel()
            if bool(((index < -1) | (index >= state.shape[0])).any()) or twice:
                raise ValueError("index: expected places of the states, each once")
    with torch.no_grad():
        if FAULT == "functional":
            y, *after = torch.ops.subquad.toy_next(x, state, total, index)
            state.copy_(after[0])
            total.copy_(after[1])
            return y
        return torch.ops.subquad.toy_step_(x, state, total, index)


def samples(sampler: Sampler) -> Iterator[Sample]:
    rows = 0 if sampler.size == "empty" else sampler.tokens or 4
    args = {"x": sampler.normal(rows, 7), "state": sampler.normal(rows, 7), "total": sampler.normal(rows)}
    yield Sample("only", args, rows_independent=True)


SPEC = OpSpec(
    name="toy_step",
    stem="toy_step",
    fn=toy,
    reference=reference,
    samples=samples,
    grad_args=("x", "state", "total"),
    rows=("x", "state", "total"),
    inference=True,
    mutates=("state", "total"),
    indices="index",
)
LAWS = ("state_after_errors", "skipped_rows", "aliased_state", "compiled_in_place")
RIGHT = [task for task in tasks(SPEC, ("native",)) if task.check.name in LAWS]
PLANTED = [
    ("writes-before-checks", "state_after_errors"),
    ("drops-gradients", "state_after_errors"),
    ("takes-twice", "state_after_errors"),
    ("skipped-writes-last", "skipped_rows"),
    ("skipped-is-not-zero", "skipped_rows"),
    ("touches-others", "skipped_rows"),
    ("writes-outside", "skipped_rows"),
    ("allows-two-states", "aliased_state"),
    ("allows-inputs", "aliased_state"),
    ("allows-stride-0", "aliased_state"),
    ("refuses-neighbours", "aliased_state"),
    ("nameless", "aliased_state"),
    ("other-error", "aliased_state"),
    ("functional", "compiled_in_place"),
    ("copies-inside", "compiled_in_place"),
]


@pytest.mark.parametrize("task", RIGHT, ids=[task.id for task in RIGHT])
def test_right_op_passes(task: Task) -> None:
    assert len(RIGHT) == len(LAWS)
    task.run()


@pytest.mark.parametrize(("fault", "check"), PLANTED)
def test_planted_fault_is_found(fault: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setitem(globals(), "FAULT", fault)
    with pytest.raises(AssertionError if fault != "refuses-neighbours" else ValueError):
        Task(SPEC, CHECKS[check], "native", torch.float32).run()
    torch._dynamo.reset()


def test_laws_of_state_are_not_asked_of_other_ops() -> None:
    other = OpSpec(**{**vars(SPEC), "mutates": (), "indices": None})
    assert not {task.check.name for task in tasks(other, ("native",))} & set(LAWS)


def test_results_are_followed_by_what_was_changed() -> None:
    from subquad.testing.case import Case

    case = Case(SPEC, "native")
    sample = case.first()
    before = sample["state"].clone()
    results = case.call(sample)
    assert torch.equal(sample["state"], before) and len(results) == 3
    torch.testing.assert_close(results, reference(**sample.args))  # type: ignore[arg-type]
