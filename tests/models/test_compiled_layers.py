"""Models with converted attention under torch.compile: as many graphs as are needed, and the numbers of eager calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import subquad

from . import test_sink_generate, test_superlinear
from .compiled import Graphs
from .test_sink_generate import greedy, prompt

transformers = pytest.importorskip("transformers", minversion="4.57")
CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}
MODELS: dict[str, Callable[[], Any]] = {
    "sink": lambda: test_sink_generate.converted("llama"),
    "sink-sliding": lambda: test_sink_generate.converted("mistral"),
    "superlinear": lambda: test_superlinear.converted("llama"),
}
pytestmark = [pytest.mark.heavy, pytest.mark.filterwarnings("ignore:subquad. SuperlinearConfig")]


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
    with torch.no_grad(), subquad.use_backend("reference"):
        yield


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


@pytest.mark.parametrize("name", MODELS)
def test_generate_compiles_its_steps_once(name: str, graphs: Graphs) -> None:
    """With a preallocated cache, whose layers become states that count in a tensor where they are no caches of keys."""
    model, ids, mask = MODELS[name](), prompt(9, 2), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    want = greedy(model, ids, 40, attention_mask=mask)
    config = transformers.CompileConfig(backend=graphs, mode=None, fullgraph=True)
    config._compile_all_devices = True  # a CPU is left out otherwise
    options: dict[str, Any] = {"cache_implementation": "static", "compile_config": config, "attention_mask": mask}
    assert torch.equal(greedy(model, ids, 40, **options), want)
    assert 1 <= graphs.count <= 2


@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.full), True])
@pytest.mark.parametrize("name", ["sink", "superlinear"])
def test_models_without_a_cache(name: str, padded: bool, graphs: Graphs) -> None:
    model = MODELS[name]()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for length in (20, 27, 33):
        ids, mask = prompt(length, 2), torch.ones(2, length, dtype=torch.long)
        mask[0, :5] = 0 if padded else 1
        given = {"attention_mask": mask} if padded else {}
        found, want = (m(ids, use_cache=False, **given).logits for m in (compiled, model))
        torch.testing.assert_close(found[mask.bool()], want[mask.bool()], **CLOSE)
    assert graphs.count <= 2
