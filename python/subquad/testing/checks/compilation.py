"""Does torch.compile and torch.export take the op whole, without specialising on the number of rows."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..._backends import BACKENDS, use_backend
from ..._backends import unavailable as why_unavailable
from ...contract import NAMESPACES
from ..case import Case
from ..compare import assert_close
from ..spec import Sample
from .registry import check

# Every kind of call is traced for these. Triton and the emulator differ from native in the namespace of their operators,
# whose fakes `fakes` and `opcheck` look at, and take seconds a call: they get one call, with all its tensors and gradients.
_TRACED = ("native", "reference")


def _counter() -> Any:
    """A compiler that counts its graphs. Dynamo is imported when it is needed: that takes seconds."""
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend("aot_eager")


def _function(case: Case, sample: Sample, names: Sequence[str]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The call as a function of the named tensors alone."""

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return case.call(sample, **dict(zip(names, tensors, strict=True)))

    return run


def _same(case: Case, actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], what: str) -> None:
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, b, case.spec.tol.forward[b.dtype], f"{what}: output {i}")
        assert a.dtype is b.dtype and a.stride() == b.stride(), f"{what}: output {i} has other metadata than eager"


def _compare(
    case: Case, compiled: Callable[..., Any], sample: Sample, names: Sequence[str], grad: bool, what: str
) -> None:
    """Compiled against eager, with gradients if asked."""
    tensors = [sample[n] for n in names]
    if not grad:
        _same(case, compiled(*tensors), case.call(sample), what)
        return
    leaves = case.leaves(sample)
    outputs = compiled(*(leaves.get(n, sample[n]) for n in names))
    _same(case, outputs, case.call(sample), what)
    grads = torch.autograd.grad(outputs, tuple(leaves.values()), case.upstream(outputs))
    for (name, expected), actual in zip(case.gradients(sample).items(), grads, strict=True):
        assert_close(actual, expected, case.spec.tol.grad[actual.dtype], f"{what}: gradient of {name}")


def _modes(case: Case) -> tuple[bool, ...]:
    """Without gradients, and with them where the op has any."""
    return (False,) if case.spec.inference else (False, True)


def _names(sample: Sample) -> tuple[str, ...]:
    return tuple(n for n, a in sample.args.items() if a is not None)


@check(heavy=True)
def compile_static(case: Case) -> None:
    """fullgraph compilation of every kind of call, one graph each, with and without gradients."""
    whole = case.backend in _TRACED
    for sample in case.samples("small") if whole else [case.fullest()]:
        for grad in _modes(case) if whole else _modes(case)[-1:]:
            torch._dynamo.reset()
            counter = _counter()
            names = _names(sample)
            compiled = torch.compile(_function(case, sample, names), fullgraph=True, dynamic=False, backend=counter)
            _compare(case, compiled, sample, names, grad, f"{sample.id}, grad {grad}")
            assert counter.frame_count == 1, f"{sample.id}, grad {grad}: {counter.frame_count} graphs instead of 1"


@check((*_TRACED, "triton"), heavy=True)
def compile_dynamic(case: Case) -> None:
    """One graph serves every number of rows; left to itself, torch.compile needs one more for the first."""
    whole = case.backend in _TRACED
    for dynamic, graphs in ((True, 1), (None, 2)) if whole else ((True, 1),):
        for grad in _modes(case) if whole else _modes(case)[-1:]:
            torch._dynamo.reset()
            counter = _counter()
            counts = case.spec.tokens if whole else (case.spec.tokens[0], case.spec.tokens[-1])
            base = case.first(tokens=counts[0])
            names, first = _names(base), None
            compiled = torch.compile(_function(case, base, names), fullgraph=True, dynamic=dynamic, backend=counter)
            for tokens in counts:
                sample = base.replace(**{n: case.first(tokens=tokens)[n] for n in case.rows(base)})
                _compare(case, compiled, sample, names, grad, f"{tokens} rows, dynamic {dynamic}, grad {grad}")
                first = (
                    counter.frame_count if first is None else first
                )  # may be 2: Dynamo starts over for a dynamic float
            count = counter.frame_count - first + 1
            assert count <= graphs, f"{count} graphs for {counts} rows, dynamic {dynamic}, grad {grad}"


class _Exported(nn.Module):
    """The call with everything but the rows' tensors as buffers."""

    def __init__(self, case: Case, sample: Sample) -> None:
        super().__init__()
        self._case, self._sample = case, sample
        self._fixed = tuple(n for n in _names(sample) if n not in case.rows(sample))
        for name in self._fixed:
            self.register_buffer(name, sample[name])

    def forward(self, *rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        fixed = {name: getattr(self, name) for name in self._fixed}
        return self._case.call(self._sample, **fixed, **dict(zip(self._case.rows(self._sample), rows, strict=True)))


@check((*_TRACED, "triton"), heavy=True)
def export(case: Case) -> None:
    """torch.export with a dynamic number of rows, saved and loaded."""
    base = case.first(tokens=case.spec.tokens[0])
    rows = tuple(base[n] for n in case.rows(base))
    tokens = torch.export.Dim("tokens", min=2, max=max(case.spec.tokens))
    program = torch.export.export(
        _Exported(case, base),
        rows,
        dynamic_shapes={"rows": tuple({0: tokens} for _ in rows)},
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    module = torch.export.load(buffer).module()
    for count in case.spec.tokens:
        sample = base.replace(**{n: case.first(tokens=count)[n] for n in case.rows(base)})
        _same(case, module(*(sample[n] for n in case.rows(sample))), case.call(sample), f"exported, {count} rows")


@check(("reference",), heavy=True)
def switching(case: Case) -> None:
    """use_backend takes effect in compiled code: each call runs the operators of the backend in force."""
    spec = case.spec
    available = [b for b in BACKENDS if b not in spec.missing and why_unavailable(spec.stem, b, case.device) is None]
    sample = case.first()
    names = _names(sample)
    executed: list[set[str | None]] = []

    from torch._dynamo.backends.registry import lookup_backend

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        inner = lookup_backend("aot_eager")(module, inputs)
        ours = {getattr(node.target, "namespace", None) for node in module.graph.nodes} & set(NAMESPACES.values())

        def run(*args: Any) -> Any:
            executed.append(ours)
            return inner(*args)

        return run

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *tensors: case.invoke(dict(zip(names, tensors, strict=True)), sample.kwargs),
        fullgraph=True,
        backend=backend,
    )
    for name in (*available, *reversed(available)):
        with use_backend(name):
            result = compiled(*(sample[n] for n in names))
        result = tree_leaves(result)[0]
        assert_close(result, case.reference(sample)[0], spec.tol.forward[result.dtype], f"use_backend({name!r})")
        expected = {NAMESPACES[name]} if name in NAMESPACES else set()
        assert executed[-1] == expected, f"use_backend({name!r}) ran operators of {executed[-1] or 'no backend'}"


@check(("native",), heavy=True, slow=True)
def compile_inductor(case: Case) -> None:
    """The default compiler, forward and backward."""
    torch._dynamo.reset()
    sample = case.first()
    names = _names(sample)
    compiled = torch.compile(_function(case, sample, names), fullgraph=True)
    _compare(case, compiled, sample, names, _modes(case)[-1], "inductor")
