"""The fuzzer: every op's random calls are right, a planted fault is found, made small, and can be run again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from subquad._dev import fuzz
from subquad.testing import OpSpec, Sample, backend_params
from subquad.testing.case import Case
from subquad.testing.choices import Choices, replayed
from subquad.testing.judge import check
from subquad.testing.specs import SPECS

CONFIGURATIONS = 15


@pytest.mark.parametrize(
    "spec", [pytest.param(s, id=s.name, marks=pytest.mark.backend(s.stem, "native")) for s in SPECS]
)
def test_random_calls(spec: OpSpec) -> None:
    found = fuzz.search(spec, "native", CONFIGURATIONS, seed=7)
    assert found.taken is None, f"{found.error}\n{fuzz.command(found, 'native')}"
    assert found.count >= CONFIGURATIONS


FAULT = ""


def toy(x: torch.Tensor, w: torch.Tensor, *, backend: str) -> torch.Tensor:
    if FAULT == "wide" and x.shape[1] > 16 and x.stride(0) != x.shape[1]:
        x = x.as_strided(x.shape, (x.shape[1], 1), x.storage_offset())
    if FAULT == "nan":
        x = x.nan_to_num()
    if FAULT == "gradient" and x.shape[0] > 3:
        w = 0.5 * w + 0.5 * w.detach()
    return (x.float() * w.float()).to(x.dtype)


def random(c: Choices) -> Sample:
    rows, width = c.integer("rows", 0, 9), c.extent("width", 1, 70)
    return c.vary(Sample("random", {"x": c.sampler.normal(rows, width), "w": c.sampler.normal(width)}))


TOY = OpSpec(
    name="toy",
    stem="toy",
    fn=toy,
    reference=lambda x, w: (x.to(torch.promote_types(x.dtype, torch.float32)) * w).to(x.dtype),
    samples=lambda sampler: [],
    random=random,
    grad_args=("x", "w"),
    rows=("x",),
)


def found(fault: str, monkeypatch: pytest.MonkeyPatch, count: int = 200) -> fuzz.Finding:
    monkeypatch.setitem(globals(), "FAULT", fault)
    return fuzz.search(TOY, "reference", count)


def test_a_right_op_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = found("", monkeypatch)
    assert finding.taken is None and finding.count >= 200


@pytest.mark.parametrize(
    ("fault", "smallest", "error"),
    [
        ("wide", {"rows": "1", "width": "17", "x.layout": "strided"}, "output 0: nan"),
        ("nan", {"rows": "1", "poison": "nan"}, "expected nan"),
        ("gradient", {"rows": "4"}, "gradient of w: error"),
    ],
)
def test_a_planted_fault_is_found_and_made_small(
    fault: str, smallest: dict[str, str], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = found(fault, monkeypatch)
    assert finding.taken is not None and error in finding.error
    rest = {name: value for name, value in finding.taken.items() if name not in smallest}
    assert {name: finding.taken[name] for name in smallest} == smallest
    assert set(rest) <= {"x.layout", "gradients", "contents.of"}, rest
    with pytest.raises(AssertionError, match=error):  # the same call again
        fuzz.run_one(TOY, replayed(finding.taken), "reference")
    monkeypatch.setitem(globals(), "FAULT", "")
    fuzz.run_one(TOY, replayed(finding.taken), "reference")


def test_a_finding_is_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    line = fuzz.command(found("nan", monkeypatch), "reference")
    assert line.startswith("python -m subquad._dev.fuzz --backend reference --replay toy rows=1")
    words = ["--backend", "reference", "--replay", "cats_activation", "rows=2", "width=3", "activation=gelu"]
    assert fuzz.main(words) == 0
    assert capsys.readouterr().out == "cats_activation: right\n"
    for wrong, message in (("rows=41", "rows: expected one of 0, 1"), ("depth=2", "replay: .*depth")):
        with pytest.raises(ValueError, match=message):
            fuzz.main([*words, wrong])


def test_a_run_of_one_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--backend", "reference", "--op", "feature_map", "--count", "3"]) == 0
    assert "feature_map (reference): 3 configurations" in capsys.readouterr().out


def test_simple_choices_are_left_out() -> None:
    choices = Choices(TOY, replayed({"rows": "3", "cu": "2", "cu.1": "5"}))
    assert choices.integer("rows", 0, 9) == 3 and choices.extent("width", 1, 70) == 1
    assert choices.bounds("cu", 9) == [0, 0, 5, 9] and choices.places("places", 3) is None
    assert choices.taken == {"rows": "3", "cu": "2", "cu.1": "5"}
    with pytest.raises(ValueError, match="got 'rows'"):
        choices.integer("rows", 0, 9)


def cancelling(factor: float) -> tuple[Case, Sample]:
    """A product that cancels, computed with an error of `factor` units in the last place of its terms."""
    x = torch.linspace(1.0, 2.0, 8).repeat(3, 2)
    w = torch.cat([torch.ones(8), -torch.ones(8)])

    def fn(x: torch.Tensor, w: torch.Tensor, *, backend: str) -> torch.Tensor:
        return (x * w).sum(1) + factor * 6e-8 * x.abs().sum(1)

    def reference(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (x * w).sum(1)

    spec = OpSpec(**{**vars(TOY), "fn": fn, "reference": reference})
    return Case(spec, "reference"), Sample("cancelling", {"x": x, "w": w})


def test_what_rounding_costs_is_allowed_and_no_more() -> None:
    check(*cancelling(1.0))
    with pytest.raises(AssertionError, match="of it roundings"):
        check(*cancelling(1000.0))


def test_every_spec_draws_random_calls() -> None:
    assert [spec.name for spec in SPECS if spec.random is None] == []


@backend_params("cats_activation", "native")
def test_levels_are_chosen_in_processes_of_their_own(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    class Done:
        returncode = 0

    def run(command: list[str], **_: Any) -> Done:
        commands.append(command)
        return Done()

    monkeypatch.setattr(fuzz.subprocess, "run", run)
    assert fuzz.main(["--isa", "all", "--count", "5", "--op", "cats_mlp", "--seed", "3"]) == 0
    assert [c[:2] for c in commands] == [["env", f"SUBQUAD_CPU_ISA={level}"] for level in fuzz._levels()]
    assert all(c[4:] == ["subquad._dev.fuzz", "--count", "5", "--seed", "3", "--op", "cats_mlp"] for c in commands)
