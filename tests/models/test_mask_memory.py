"""Masks with a name cost O(T): no tensor of [T, T] is made, and packed rows need no more memory than one long row."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from subquad import use_backend
from subquad.integrations.transformers import attention_mask, register

transformers = pytest.importorskip("transformers", minversion="5")
utils = transformers.masking_utils
LONG = 16384


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


class Memory(TorchDispatchMode):
    """Storages that operators made: bytes of the largest, and the most that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.largest = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in given:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def tiny() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=1, vocab_size=16,
        attn_implementation="subquad",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def packings() -> dict[str, dict[str, Any]]:
    """Sixteen documents of unequal lengths, said in every way that a collator says it."""
    lengths = torch.full((16,), LONG // 16)
    lengths[::2] += 100
    lengths[1::2] -= 100
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {
        "positions": {"position_ids": positions},
        "positions beside ones": {"position_ids": positions, "attention_mask": torch.ones(1, LONG)},
        "cu_seq_lens": {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu.clone(), "max_length_q": 1124, "max_length_k": 1124},
    }


@pytest.mark.backend("interval_attention", "native")
def test_packed_rows_need_the_memory_of_one_row() -> None:
    """Forward and backward of the same T; the mask of one long row is three numbers."""
    model, ids, found = tiny(), torch.randint(16, (1, LONG)), {}
    for name, packing in {"one row": {}, **packings()}.items():
        with Memory() as memory, use_backend("native"):
            model(ids, use_cache=False, **packing).logits.sum().backward()
        model.zero_grad()
        found[name] = memory.peak
        assert memory.largest < LONG * LONG / 8, name  # a [T, T] mask of bits
    assert all(peak <= 1.3 * found["one row"] for peak in found.values()), found


# --- what each of the library's masks makes ----------------------------------------

T = 640
IDS = (torch.arange(T) // 160)[None]
BLOCKS = torch.where(torch.arange(T) % 64 < 40, torch.arange(T) // 64, -1)[None]
REAL = torch.arange(T)[None] >= 30


def _blocks_cut_by_a_window() -> Any:
    """The sliding layers of Gemma 3 and 4 with images."""
    function = utils.or_masks(utils.causal_mask_function, utils.blockwise_overlay(BLOCKS))
    return utils.and_masks(function, utils.sliding_window_overlay(50))


def _packed() -> Any:
    function = utils.remap_positions_for_packed_sequence(utils.causal_mask_function, torch.arange(T)[None] % 160)
    return utils.and_masks(function, utils.packed_sequence_mask_function(IDS))


NAMED: dict[str, Callable[[], Any]] = {
    "causal": lambda: utils.causal_mask_function,
    "sliding": lambda: utils.sliding_window_causal_mask_function(50),
    "chunked": lambda: utils.chunked_causal_mask_function(100, torch.tensor([30])),
    "full": lambda: utils.bidirectional_mask_function,
    "sliding both ways": lambda: utils.sliding_window_bidirectional_mask_function(20),
    "sliding both ways, joined in the other order": lambda: utils.and_masks(
        utils.bidirectional_mask_function, utils.sliding_window_bidirectional_overlay(20)
    ),
    "sequences both ways": lambda: utils.and_masks(
        utils.bidirectional_mask_function, utils.packed_sequence_mask_function(IDS)
    ),
    "packed": _packed,
    "prefix or image": lambda: utils.or_masks(utils.causal_mask_function, utils.blockwise_overlay(BLOCKS)),
    "image in a window": lambda: utils.or_masks(
        utils.sliding_window_causal_mask_function(50), utils.blockwise_overlay(BLOCKS)
    ),
    "image cut by a window": _blocks_cut_by_a_window,
    "to the left and right": lambda: utils.and_masks(
        utils.bidirectional_mask_function,
        transformers.models.t5gemma2.modeling_t5gemma2.sliding_window_mask_function(31, is_causal=False),
    ),
    "nothing to the right": lambda: utils.and_masks(
        utils.bidirectional_mask_function,
        transformers.models.moonshine_streaming.modeling_moonshine_streaming.sliding_window_mask_function((7, 0)),
    ),
}


@pytest.mark.parametrize("padding", [None, REAL], ids=["", "padded"])
@pytest.mark.parametrize("name", NAMED)
def test_no_square_tensor(name: str, padding: torch.Tensor | None, caplog: pytest.LogCaptureFixture) -> None:
    arguments: dict[str, Any] = {
        "batch_size": 1, "q_length": T, "kv_length": T, "mask_function": NAMED[name](), "attention_mask": padding,
    }  # fmt: skip
    with Memory() as memory, caplog.at_level(logging.DEBUG, logger="subquad"):
        mask = attention_mask(**arguments)
    assert memory.largest < T * T / 8 and not caplog.records
    dense = utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    assert torch.equal(mask.to_dense().expand_as(dense), dense)


def test_a_mask_without_a_name_is_dense_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def every_fifth(batch: Any, head: Any, q: Any, kv: Any) -> Any:
        return (q - kv) % 5 == 0

    with caplog.at_level(logging.DEBUG, logger="subquad"):
        mask = attention_mask(1, 20, 20, mask_function=every_fifth, use_vmap=True)
    place = torch.arange(20)
    assert torch.equal(mask.to_dense()[0, 0], (place[:, None] - place) % 5 == 0)
    (record,) = caplog.records
    assert "dense mask [1, 1, 20, 20]" in record.message and "every_fifth" in record.message


def test_a_mask_in_four_dimensions_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    with caplog.at_level(logging.DEBUG, logger="subquad"):
        tiny()(torch.randint(16, (1, 20)), attention_mask=mask)
    (record,) = caplog.records
    assert record.message == "dense mask [1, 1, 20, 20]: given in four dimensions"


@pytest.mark.parametrize("kind", ["int64", "float32"])
def test_a_mask_function_that_says_neither_true_nor_false(kind: str) -> None:
    def lies(batch: Any, head: Any, q: Any, kv: Any) -> Any:
        return (kv <= q).to(getattr(torch, kind))

    with pytest.raises(TypeError, match=f"^mask_function: expected one that returns bool, got torch.{kind}"):
        attention_mask(1, 20, 20, mask_function=lies, use_vmap=True)
