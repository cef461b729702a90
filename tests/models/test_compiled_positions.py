"""Positions that begin at 0 again, beside a mask of ones or a cache, mean in a graph what they mean without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from subquad.integrations.transformers import attention_mask
from subquad.integrations.transformers.attention import attention_forward
from subquad.nn._tokens import read

from .compiled import Graphs

transformers = pytest.importorskip("transformers", minversion="5")
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.filterwarnings("ignore:.*native kernels are not in use"),
]
AGAIN = "position_ids: expected numbers that go on"
ONES, PADDED = torch.ones(2, 9, dtype=torch.bool), torch.ones(2, 9, dtype=torch.bool)
PADDED[1, :2] = False
GOING = torch.arange(9).repeat(2, 1)
PACKED = torch.stack([torch.arange(9), torch.cat([torch.arange(4), torch.arange(5)])])  # the first row is one sequence
ZEROS = torch.zeros_like(GOING)


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


def attend(mask: Any, positions: torch.Tensor, first: Any = 0, keys: int = 9, **more: Any) -> torch.Tensor:
    """Softmax attention of 9 tokens, with a mask as a model of transformers makes it."""
    module = torch.nn.Module()
    q, k = (torch.linspace(-1, 1, 2 * 2 * n * 8).cos().view(2, 2, n, 8) for n in (9, keys))
    made = attention_mask(2, 9, keys, q_offset=first, attention_mask=mask, **more)
    return attention_forward(module, 3 * q, k, k, made, position_ids=positions)[0]


def compiled(run: Callable[..., Any], graphs: Graphs) -> Callable[..., Any]:
    return torch.compile(run, fullgraph=True, backend=graphs)


@pytest.mark.parametrize(
    ("mask", "keys"), [(None, 12), (ONES, 9), (ONES, 12), (PADDED, 9)], ids=["none", "ones", "ones-cache", "padded"]
)
def test_softmax_attention(mask: torch.Tensor | None, keys: int, graphs: Graphs) -> None:
    """One graph; a preallocated cache has keys behind."""
    run = compiled(attend, graphs)
    first, found = torch.tensor(0) if keys > 9 else 0, {}
    for name, positions in {"going": GOING, "packed": PACKED, "zeros": ZEROS}.items():
        found[name] = run(mask, positions, first, keys)
        want = attend(mask, positions, first, keys)
        if mask is not None:
            want, shown = want[mask], found[name][mask]
        torch.testing.assert_close(shown if mask is not None else found[name], want)
    assert graphs.count == 1
    torch.testing.assert_close(found["zeros"], found["going"])
    torch.testing.assert_close(found["packed"][0], found["going"][0])
    assert torch.allclose(found["packed"], found["going"], atol=1e-3) == (mask is PADDED)


def test_one_graph_of_all_lengths(graphs: Graphs) -> None:
    def run(q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        made = attention_mask(2, q.shape[2], q.shape[2], attention_mask=mask)
        positions = torch.arange(q.shape[2])[None]
        return attention_forward(torch.nn.Module(), q, q, q, made, position_ids=positions)[0]

    graph = compiled(run, graphs)
    for length in (9, 10, 14):
        q, mask = torch.ones(2, 2, length, 8), torch.ones(2, length, dtype=torch.bool)
        mask[0, 2] = False
        torch.testing.assert_close(graph(q, mask), run(q, mask))
    assert graphs.count == 2  # the second is for any


@pytest.mark.parametrize("mask", [None, ONES, PADDED], ids=["none", "ones", "padded"])
def test_layers_of_this_package(mask: torch.Tensor | None, graphs: Graphs) -> None:
    """Which tokens begin sequences, as `read` tells them all; with a cache none may."""

    def begins(positions: torch.Tensor, seen: int | None = None) -> torch.Tensor:
        told = read(mask, 2, 9, seen=seen, position_ids=positions).begins
        return torch.zeros(2, 9, dtype=torch.bool) if told is None else told.expand(2, -1)

    run = compiled(begins, graphs)
    for positions in (GOING, PACKED, *(() if mask is None else (ZEROS,))):
        assert torch.equal(run(positions), begins(positions))
    assert graphs.count == 1
    run(GOING, 0)
    if mask is not PADDED:
        with pytest.raises(RuntimeError, match=f"{AGAIN} with a cache where a graph is compiled"):
            run(PACKED, 0)


@pytest.mark.parametrize("first", [3, torch.tensor(3)], ids=["growing", "preallocated"])
def test_refused_behind_cached_tokens(first: Any, graphs: Graphs) -> None:
    run = compiled(attend, graphs)
    torch.testing.assert_close(run(None, GOING + 3, first, 12), attend(None, GOING + 3, first, 12))
    for call, error in ((run, RuntimeError), (attend, ValueError)):
        with pytest.raises(error, match=f"{AGAIN} behind cached tokens"):
            call(None, PACKED, first, 12)


def test_refused_beside_chunks(graphs: Graphs) -> None:
    config = transformers.LlamaConfig(attention_chunk_size=5)
    left = torch.zeros(2, dtype=torch.long)

    def run(positions: torch.Tensor) -> torch.Tensor:
        chunks = transformers.masking_utils.chunked_causal_mask_function(5, left)
        return attend(ONES, positions, mask_function=chunks, use_vmap=False, local_size=5, config=config)

    graph = compiled(run, graphs)
    torch.testing.assert_close(graph(GOING), run(GOING))
    for call, error in ((graph, RuntimeError), (run, ValueError)):
        with pytest.raises(error, match=f"{AGAIN} beside a mask of chunks"):
            call(PACKED)
