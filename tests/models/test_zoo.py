"""Models of every kind: under "subquad" they say what they say under "eager" in float64.

An entry is `zoo.entry.Entry`; docs/models.md has the table of them, which `python -m tests.models.zoo` writes.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from .zoo import run, table
from .zoo.entries import ENTRIES
from .zoo.entry import Entry

transformers = pytest.importorskip("transformers", minversion="5")
TRIED = [entry for entry in ENTRIES if not entry.refused]
REFUSED = [entry for entry in ENTRIES if entry.refused]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The quick lane has one model of every kind of attention."""
    if "tried" in metafunc.fixturenames:
        of_each_kind = list({entry.attention: entry for entry in reversed(TRIED)}.values())
        chosen = of_each_kind if metafunc.config.getoption("--lane") == "quick" else TRIED
        metafunc.parametrize("tried", chosen, ids=[entry.name.replace(" ", "_") for entry in chosen])


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Tiny models are told that their positions do not fit their RoPE."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)
    run.model_of.cache_clear()


def test_a_model(tried: Entry) -> None:
    """In float64 all of the entry; in float32 what the chosen kernels compute."""
    for dtype in (torch.float64, torch.float32):
        found = run.errors(tried, dtype)
        assert run.within(found, dtype), (dtype, found)


@pytest.mark.parametrize("entry", REFUSED, ids=[entry.name for entry in REFUSED])
def test_a_refusal(entry: Entry) -> None:
    model = run.ours_of(entry, torch.float64)
    with pytest.raises((TypeError, ValueError), match=entry.refused):
        model(**run.inputs_of(entry)[0])


def test_the_table_is_that_of_the_entries() -> None:
    assert table.DOCUMENT.read_text() == table.document(), "python -m tests.models.zoo"
    assert table.table() in table.document()
