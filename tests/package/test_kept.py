"""What is kept between calls: results of tensors, and tensors at their addresses."""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable
from pathlib import Path
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


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells which memory wants huge pages")
def test_large_caches_ask_for_huge_pages() -> None:
    def wants(x: torch.Tensor) -> bool:
        place = x.data_ptr() + x.nbytes // 2
        flags, inside = "", False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                begin, end = (int(part, 16) for part in line.split()[0].split("-"))
                inside = begin <= place < end
            elif inside and line.startswith("VmFlags:"):
                flags = line
        return " hg" in flags

    large = subquad.SinkKVCache(1, 8, 128, sink_tokens=4, window=8192, dtype=torch.float32)
    pages = subquad.SuperlinearKVCache(1, 8, 8192, 128, dtype=torch.float32)
    small = subquad.SinkKVCache(1, 1, 16, sink_tokens=4, window=32, dtype=torch.float32)
    assert wants(large.ring_k) and wants(large.ring_v) and wants(pages.k) and not wants(small.ring_k)
    assert not large.ring_k.any() and not pages.k.any()
