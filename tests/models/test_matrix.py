"""Model kinds x conversions x attention implementations x caches x padding x adapters: every cell is the float64 model.

A lane runs a sample in which any two values meet, the full lane one in which any three do, and compiled cells (each value once);
`--matrix whole` runs all, an hour without `-k "not compiled"`. A cell is `matrix.axes.Case`, its truth `matrix.oracle`.
"""

from __future__ import annotations

import warnings
from itertools import combinations
from typing import Any

import pytest

from subquad import SubquadWarning

from .matrix import axes, run
from .matrix.axes import AXES, CONVERSIONS, REFUSALS, Case, Refusal
from .matrix.kinds import adapt_by_peft

transformers = pytest.importorskip("transformers", minversion="5")
TOLERANCE = 2e-5  # float32 gives 1e-6; a token too many or too few, 1e-2


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        if metafunc.config.getoption("--matrix") == "whole":
            chosen = axes.whole()
        else:
            light, heavy = axes.sample(3 if metafunc.config.getoption("--lane") == "full" else 2)
            chosen = light + heavy
        marks = {True: [pytest.mark.heavy, pytest.mark.full], False: []}
        metafunc.parametrize("cell", [pytest.param(case, id=str(case), marks=marks[case.compiled]) for case in chosen])
    if "refusal" in metafunc.fixturenames:
        found = [(refusal, case) for refusal in REFUSALS for case in axes.refused(refusal)]
        ids = [f"{refusal.name.replace(' ', '_')}-{case}" for refusal, case in found]
        metafunc.parametrize(("refusal", "refused"), found, ids=ids)


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    """Tiny models are told that their positions do not fit their RoPE, and CATS that it skips nothing beside adapters."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SubquadWarning)
        yield
    transformers.logging.set_verbosity(level)


def test_cell(cell: Case) -> None:
    found = run.errors(cell)
    assert all(error <= TOLERANCE for error in found.values()), found  # NaN is not


@pytest.mark.parametrize("cache", ["none", "static"])
@pytest.mark.parametrize("variant", ["lora_before", "lora_after"])
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("kind", ["qwen2", "phi3"])
def test_peft(kind: str, conversion: str, variant: str, cache: str) -> None:
    """The library's own adapters do what the stand-in's do."""
    pytest.importorskip("peft")
    case = Case(kind, conversion, "subquad", cache, "left", variant)
    refusal = axes.refusal_of(case)
    if refusal is not None:
        with pytest.raises(ValueError, match=refusal.message):
            run.errors(case, adapt_by_peft)
    else:
        found = run.errors(case, adapt_by_peft)
        assert all(error <= TOLERANCE for error in found.values()), found


def test_refused(refusal: Refusal, refused: Case) -> None:
    with pytest.raises(ValueError, match=refusal.message):
        run.errors(refused)


def test_the_samples_cover() -> None:
    """Any two values that meet in a cell meet in the sample; in CI any three of cells that are not compiled."""
    every = axes.whole()
    for strength in (2, 3):
        light, heavy = axes.sample(strength)
        for chosen, of, together in (
            (light, [case for case in every if not case.compiled], strength),
            (heavy, [case for case in every if case.compiled], 1),
            (light + heavy, every, 2),
        ):
            for places in combinations(range(len(AXES)), together):
                meet = [{tuple(case.values[place] for place in places) for case in some} for some in (chosen, of)]
                assert meet[0] == meet[1], (strength, places)
        assert len({str(case) for case in light + heavy}) == len(light) + len(heavy)


def test_every_value_is_somewhere_and_every_refusal_needed() -> None:
    for place, (axis, values) in enumerate(AXES.items()):
        assert {case.values[place] for case in axes.whole()} == set(values), axis
    assert all(axes.cells()[refusal] for refusal in REFUSALS)
