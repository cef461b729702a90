"""A compiled step whose guards are looked at until two calls show that only tokens change, and not after that.

Guards (is every module, option and parameter of a model what it was?) cost as much as all else that a step does beside products.
Within one text nothing of that changes. So the graph itself is called as soon as two guarded calls have shown what it takes and
gives: the same tensors, those of the step, and tensors that the call before gave, such as counters; and no other tensors than the
logits and these. What is written besides, is written in place. Anything else keeps its guards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch

BACKEND: Any = "inductor"
# What an operator gives has the strides that it promises: tests show it, not every step.
INDUCTOR = {"size_asserts": False, "alignment_asserts": False}
Tensors = tuple[Any, ...]


@dataclass
class Record:
    """One call of a graph."""

    graph: Callable[..., Tensors]
    inputs: Tensors
    outputs: Tensors


class Recorder:
    """A backend of torch.compile that remembers the last call of what it has compiled, until it is told to forget it."""

    last: Record | None = None

    def __call__(self, graph: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Callable[..., Tensors]:
        compiled = _compiled(graph, examples)

        def call(*inputs: Any) -> Tensors:
            outputs = tuple(compiled(*inputs))
            self.last = Record(compiled, inputs, outputs)
            return outputs

        return call


def _compiled(graph: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Callable[..., Any]:
    if BACKEND != "inductor":
        result: Callable[..., Any] = BACKEND(graph, examples)
        return result
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(graph, examples, config_patches=INDUCTOR)  # type: ignore[arg-type]
    return cast("Callable[..., Any]", compiled)


class Closed:
    """A graph with its inputs, of which only those of the step are to be given.

    Args:
        record: of the last call.
        given: which of its inputs are those of the step: number of the input -> number of the argument.
        carried: inputs that the call before gave: number of the input -> number of the output.
        result: number of the output that is the result.
    """

    def __init__(self, record: Record, given: dict[int, int], carried: dict[int, int], result: int) -> None:
        self.graph, self.given, self.carried, self.result = record.graph, given, carried, result
        self.inputs = list(record.inputs)
        for i, j in carried.items():
            self.inputs[i] = record.outputs[j]  # what an attribute holds since then, and goes on to hold

    def __call__(self, *arguments: torch.Tensor) -> torch.Tensor:
        for i, j in self.given.items():
            self.inputs[i] = arguments[j]
        outputs = self.graph(*self.inputs)
        for i, j in self.carried.items():
            self.inputs[i].copy_(outputs[j])
        result: torch.Tensor = outputs[self.result]
        return result


def closed(
    before: Record | None, after: Record | None, given: tuple[Tensors, Tensors], result: torch.Tensor
) -> Closed | None:
    """The graph of two calls one after the other, if the second shows that it can be called by itself.

    Args:
        before, after: the calls.
        given: the arguments of the step at each.
        result: of the second.
    """
    if before is None or after is None or before.graph is not after.graph:
        return None
    arguments: dict[int, int] = {}
    carried: dict[int, int] = {}
    for i, (old, new) in enumerate(zip(before.inputs, after.inputs, strict=True)):
        if not isinstance(new, torch.Tensor):
            return None
        number = _place(new, given[1])
        output = _place(new, before.outputs)
        if number is not None and old is given[0][number]:
            arguments[i] = number
        elif output is not None and old is not new:
            carried[i] = output
        elif old is not new:
            return None
    place = _place(result, after.outputs)
    known = {place, *carried.values()}
    if place is None or any(j not in known for j in range(len(after.outputs))):
        return None
    return Closed(after, arguments, carried, place)


def _place(x: Any, among: Tensors) -> int | None:
    return next((i for i, other in enumerate(among) if other is x), None)
