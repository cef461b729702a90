"""Every argument that is wrong is named, before anything was computed: the states stay as they were, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import subquad
from subquad.testing import Sampler, backend_params
from subquad.testing.compare import assert_same_bits
from subquad.testing.specs.sink_attention_step import CHANGED, draw, rotation

STEM = "sink_attention_step"
Arguments = dict[str, Any]
Change = Callable[[Arguments], Arguments]


def counter(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


# What is changed in a good call of two rows, the argument to blame, and the type of the error.
WRONG: dict[str, tuple[Change, str, type[Exception]]] = {
    "k of three dimensions": (lambda a: {"k": a["k"][0]}, "k", ValueError),
    "k of no heads": (lambda a: {"k": a["k"][:, :, :0]}, "k", ValueError),
    "k too wide": (lambda a: {"k": torch.zeros(2, 3, 2, 257)}, "k", ValueError),
    "k of integers": (lambda a: {"k": a["k"].int()}, "k", TypeError),
    "v of other tokens": (lambda a: {"v": a["v"][:, :2]}, "v", ValueError),
    "v of another dtype": (lambda a: {"v": a["v"].half()}, "v", TypeError),
    "q of another head_dim": (lambda a: {"q": a["q"][..., :6]}, "q", ValueError),
    "q of heads that are no multiple": (lambda a: {"q": a["q"][:, :, :3]}, "q", ValueError),
    "q on another device": (lambda a: {"q": a["q"].to("meta")}, "q", ValueError),
    "sink_k of another batch": (lambda a: {"sink_k": a["sink_k"][:1]}, "sink_k", ValueError),
    "sink_k that is none": (lambda a: {"sink_k": None}, "sink_k", TypeError),
    "sink_v of other places": (lambda a: {"sink_v": a["sink_v"][:, :, :1]}, "sink_v", ValueError),
    "ring_k of no places": (lambda a: {"ring_k": a["ring_k"][:, :, :0], "window": 0}, "ring_k", ValueError),
    "ring_k of another dtype": (lambda a: {"ring_k": a["ring_k"].double()}, "ring_k", TypeError),
    "ring_v of other places": (lambda a: {"ring_v": a["ring_v"][:, :, 1:]}, "ring_v", ValueError),
    "ring_v of another dtype than ring_k": (lambda a: {"ring_v": a["ring_v"].to(torch.int8)}, "ring_v", TypeError),
    "bytes without scales": (
        lambda a: {"ring_k": a["ring_k"].to(torch.int8), "ring_v": a["ring_v"].to(torch.int8)},
        "k_scale",
        ValueError,
    ),
    "scales of floats": (lambda a: {"k_scale": torch.ones(2, 2, 9)}, "k_scale", ValueError),
    "seen of int32": (lambda a: {"seen": a["seen"].int()}, "seen", TypeError),
    "seen of another batch": (lambda a: {"seen": counter(1, 2, 3)}, "seen", ValueError),
    "written as a list": (lambda a: {"written": [20, 1]}, "written", TypeError),
    "first of two dimensions": (lambda a: {"first": a["first"][None]}, "first", ValueError),
    "a window wider than the ring": (lambda a: {"window": 10}, "window", ValueError),
    "a negative window": (lambda a: {"window": -1}, "window", ValueError),
    "a window that is no integer": (lambda a: {"window": 2.5}, "window", TypeError),
    "m of another batch": (lambda a: {"m": counter(1)}, "m", ValueError),
    "m beyond the columns": (lambda a: {"m": counter(1, 4)}, "m", ValueError),
    "m below 0": (lambda a: {"m": counter(-1, 1)}, "m", ValueError),
    "m of floats": (lambda a: {"m": torch.ones(2)}, "m", TypeError),
    "sink_logits of other heads": (lambda a: {"sink_logits": torch.zeros(3)}, "sink_logits", ValueError),
    "sink_logits as a list": (lambda a: {"sink_logits": [0.0] * 4}, "sink_logits", TypeError),
    "a rope wider than a head": (lambda a: {"rope": rotation(10)}, "rope", ValueError),
    "a rope of numbers": (lambda a: {"rope": torch.ones(4)}, "rope", TypeError),
    "an unknown key_rope": (lambda a: {"key_rope": "both"}, "key_rope", ValueError),
    "unknown positions": (lambda a: {"positions": "relative"}, "positions", ValueError),
    "together as a string": (lambda a: {"together": "no"}, "together", TypeError),
    "commit as a number": (lambda a: {"commit": 1}, "commit", TypeError),
    "scale as a string": (lambda a: {"scale": "1"}, "scale", TypeError),
    "an unknown backend": (lambda a: {"backend": "fast"}, "backend", ValueError),
}


@backend_params(STEM, "native", "reference")
@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(backend: str, what: str) -> None:
    sample = draw(Sampler(), "good", tokens=3, rotary=8, logits=-1.0)
    change, name, kind = WRONG[what]
    arguments: Arguments = {**sample.args, **sample.kwargs, "backend": backend}
    arguments |= change(arguments)
    before = {n: x.clone() for n, x in arguments.items() if n in CHANGED and isinstance(x, torch.Tensor)}
    with pytest.raises(kind, match=f"^{name}: "):
        subquad.sink_attention_step(**arguments)
    for n, value in before.items():
        assert_same_bits(arguments[n], value, n)


@backend_params(STEM, "native", "reference")
def test_scales_must_fit(backend: str) -> None:
    sample = draw(Sampler(), "good", tokens=3, ring="int8")
    for name in ("k_scale", "v_scale"):
        for wrong, kind in (
            (sample[name].double(), TypeError),
            (sample[name][..., 1:], ValueError),
            (None, ValueError),
        ):
            with pytest.raises(kind, match=f"^{name}: "):
                subquad.sink_attention_step(**{**sample.args, name: wrong}, **sample.kwargs, backend=backend)


@backend_params(STEM, "native", "reference")
def test_counters_are_not_trusted(backend: str) -> None:
    """A negative `seen` counts as 0; one that is larger than what was ever written reads the ring, and nothing outside it."""
    sample = draw(Sampler(), "good", tokens=3, seen=(-7, 10**12), rotary=8)
    out, lse = subquad.sink_attention_step(**sample.args, **sample.kwargs, backend=backend)
    assert sample["seen"].tolist() == [3, 10**12 + 3]
    empty = draw(Sampler(), "good", tokens=3, seen=(0, 10**12), rotary=8)
    expected = subquad.sink_attention_step(**empty.args, **empty.kwargs, backend=backend)
    assert_same_bits(out, expected[0])
    assert_same_bits(lse, expected[1])
