"""What is kept between calls: results of tensors, and tensors at their addresses."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import subquad
from subquad._derived import Derived


@pytest.mark.parametrize(
    "make",
    [
        lambda: subquad.SinkKVCache(2, 1, 8, sink_tokens=2, window=6, kv_dtype=torch.int8),
        lambda: subquad.SuperlinearKVCache(2, 1, 32, 8),
        lambda: subquad.SuperlinearKVCache(2, 1, 32, 8, page_size=16, num_pages=8),
    ],
    ids=["sink", "superlinear", "pages"],
)
def test_preallocated_caches_have_static_addresses(make: Callable[[], Any]) -> None:
    """As torch marks them, also after what replaces tensors; graphs for CUDA write to such inputs in place."""
    marked = torch.empty(0)
    torch._dynamo.mark_static_address(marked, guard=False)
    cache, loaded = make(), make()
    loaded.load_state_dict(cache.state_dict())
    copies = [cache, loaded, copy.deepcopy(cache)]
    if isinstance(cache, subquad.SuperlinearKVCache):
        copies.append(cache.fork())
    else:
        cache.keep(100)
        cache.select(torch.tensor([0]))
    for held in copies:
        assert held.tensors() and all(vars(x) == vars(marked) for x in held.tensors().values())


def test_what_is_derived_of_a_tensor_and_itself_does_not_keep_it() -> None:
    derived, tensor = Derived(), torch.tensor([0])
    assert derived.get(tensor, (tensor,), lambda: 1) == derived.get(tensor, (tensor,), lambda: 2) == 1
    assert derived.get(tensor, (torch.tensor([0]),), lambda: 3) == 3
    with torch.inference_mode():
        assert derived.get(tensor, (tensor,), lambda: 4) == 4
    assert derived.get(tensor, (tensor,), lambda: 5) == 1
    seen = weakref.ref(tensor)
    del tensor
    assert seen() is None
