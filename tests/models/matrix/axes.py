"""The axes of the matrix, which of its cells are refused or not ours, and samples that cover values of several axes together."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import torch

from .kinds import KINDS
from .oracle import Conversion

LOLCATS = {
    "window_size": 3, "linear_covers_window": False, "linear_scale": 1.0, "rope": "linear", "gate": "none",
    "tie_qk_feature_map": False, "conv_size": 1,
}  # fmt: skip
CONVERSIONS = {
    conversion.name: conversion
    for conversion in (
        Conversion("none"),
        Conversion("cats", cats=True),
        Conversion("lawcat", lawcat={}),
        Conversion("lawcat_window", lawcat={"window_size": 4}),
        Conversion("first", lawcat={}, layers=(0,)),
        Conversion("last_window", lawcat={"window_size": 3, "linear_covers_window": False}, layers=(-1,)),
        Conversion(
            "superlinear", superlinear={"sw_index": 1, "num_spans": 2, "backward_factor": 0.9, "forward_factor": 0.4}
        ),
        Conversion("rest_lolcats_cats", cats=True, lawcat=LOLCATS, layers=(1, -1)),
    )
}
AXES: dict[str, tuple[str, ...]] = {
    "kind": tuple(KINDS),
    "conversion": tuple(CONVERSIONS),
    "implementation": ("eager", "sdpa", "subquad"),
    "cache": ("none", "dynamic", "static", "dynamic_chunks", "static_chunks"),
    "padding": ("none", "ones", "left", "right", "inside"),
    "variant": ("plain", "lora_before", "lora_after", "compiled"),
}


@dataclass(frozen=True)
class Case:
    """A cell of the matrix, one value of each axis."""

    kind: str
    conversion: str
    implementation: str
    cache: str
    padding: str
    variant: str

    def __str__(self) -> str:
        return "-".join(self.values)

    @property
    def values(self) -> tuple[str, ...]:
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def cats(self) -> bool:
        return CONVERSIONS[self.conversion].cats

    @property
    def superlinear(self) -> bool:
        return CONVERSIONS[self.conversion].superlinear is not None

    @property
    def attends(self) -> bool:
        return CONVERSIONS[self.conversion].attends

    @property
    def compiled(self) -> bool:
        return self.variant == "compiled"


@dataclass(frozen=True)
class Refusal:
    """Cells that raise an error.

    Attributes:
        name: in the ids of tests.
        reason: why that is right.
        message: a pattern of the error's text.
        of: whether a cell is one.
    """

    name: str
    reason: str
    message: str
    of: Callable[[Case], bool]


REFUSALS = (  # in the order in which they are met
    Refusal(
        "sdpa",
        "transformers has no sdpa for models with sinks or capped scores",
        "does not support an attention implementation",
        lambda case: case.kind in ("gemma2", "gpt-oss") and case.implementation == "sdpa",
    ),
    Refusal(
        "no gate",
        "CATS skips what a gate leaves small; these MLPs are not gated, or experts",
        "model: expected gated MLPs",
        lambda case: case.kind in ("starcoder2", "gpt-oss") and case.cats,
    ),
    Refusal(
        "sinks",
        "linear attention has no softmax that a sink could belong to, and the gate of spans no place for one",
        r"layers\.\d+\.self_attn: attention: expected none with sinks",
        lambda case: case.kind == "gpt-oss" and case.attends,
    ),
    Refusal(
        "fused projections",
        "conversions need q, k and v apart, and Phi-3 has one projection of all",
        r"layers\.\d+\.self_attn: attention: expected q_proj, k_proj, v_proj, o_proj and head_dim, got a Phi3Attention",
        lambda case: case.kind == "phi3" and case.attends,
    ),
    Refusal(
        "sliding",
        "layers that slide are linear as they are, and keep no keys for spans",
        r"layers\.\d+\.self_attn: attention: expected one that sees every key before it, got one with a sliding window of \d",
        lambda case: case.superlinear and any(window is not None for window in KINDS[case.kind].windows),
    ),
)


def refusal_of(case: Case) -> Refusal | None:
    """Why a cell is refused; None if it is not."""
    return next((refusal for refusal in REFUSALS if refusal.of(case)), None)


def _ours(case: Case) -> bool:
    """Softmax models by eager and sdpa show that the truth is true; adapted or compiled they would test transformers alone."""
    return case.conversion != "none" or case.implementation == "subquad" or case.variant == "plain"


@functools.cache
def cells() -> dict[Refusal | None, list[Case]]:
    """All of them, by what refuses them."""
    found: dict[Refusal | None, list[Case]] = {}
    for values in product(*AXES.values()):
        case = Case(*values)
        if _ours(case):
            found.setdefault(refusal_of(case), []).append(case)
    return found


def refused(refusal: Refusal) -> list[Case]:
    """Cells that cover all pairs of values among those of a refusal; it comes before anything is compiled."""
    return cover([case for case in cells()[refusal] if not case.compiled], 2)


def whole() -> list[Case]:
    """Every cell that is not refused."""
    return cells()[None]


def sample(strength: int) -> tuple[list[Case], list[Case]]:
    """Cells of `whole` in which any `strength` values meet that meet in it, and compiled ones apart.

    Those take a hundred times as long: there are as few as let them meet every value of every axis.
    """
    light, heavy = ([case for case in whole() if case.compiled == compiled] for compiled in (False, True))
    return cover(light, strength), cover(heavy, 1)


def cover(cases: Sequence[Case], strength: int) -> list[Case]:
    """A few of the cells, in which any `strength` values meet that meet in any of them. Greedy, and always the same."""
    cases = random.Random(0).sample(cases, len(cases))  # so that what is free differs
    sizes = [len(values) for values in AXES.values()]
    place = [{value: n for n, value in enumerate(values)} for values in AXES.values()]
    numbers = torch.tensor([[of[value] for of, value in zip(place, case.values, strict=True)] for case in cases])
    meetings, total = [], 0  # of every cell, a number for each group of `strength` of its values
    for axes in combinations(range(len(sizes)), strength):
        code = torch.zeros(len(cases), dtype=torch.int64)
        for axis in axes:
            code = code * sizes[axis] + numbers[:, axis]
        meetings.append(code + total)
        total += math.prod(sizes[axis] for axis in axes)
    contains = torch.stack(meetings, 1)
    missing, chosen = torch.zeros(total, dtype=torch.uint8), []
    missing[contains] = 1
    while missing.any():
        best = int(missing[contains].sum(1, dtype=torch.uint8).argmax())
        missing[contains[best]] = 0
        chosen.append(cases[best])
    return chosen
