"""LAWCAT layers with a softmax window on shards, beside one process: outputs, and gradients of inputs and of all parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.func import functional_call

import subquad.distributed as sd
from subquad.distributed.context import ShardedMask
from subquad.nn import LawcatAttention

from .test_operators import LAYOUTS, TOKENS, batch_of, bounds_of, compare, normal

WIDTH = 8
WINDOW = 9  # more than some shards have tokens
SHIPPED: dict[str, Any] = {"linear_scale": 1.0, "tie_qk_feature_map": False}  # as examples/weights has it
OTHERS: dict[str, dict[str, Any]] = {
    "lolcats": {"gate": "none", "conv_size": 1, "linear_scale": 1.0, "rope": "linear"},
    "shared": {"gate": "scalar", "conv_on_v": True, "share_kv_features": True, "affine_window": True},
    "taps": {"rope": "linear", "conv_size": 3, "qk_activation": "silu"},
}


def layer_of(**options: Any) -> LawcatAttention:
    torch.manual_seed(0)
    layer = LawcatAttention(16, 4, 2, head_dim=WIDTH, window_size=WINDOW, **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return layer


def angles(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    turned = positions[..., None] * torch.tensor([1.0, 0.3, 0.1, 0.03]).repeat(2)
    return turned.cos(), turned.sin()


def check(size: int, kind: str, layer: LawcatAttention, padding: torch.Tensor | None = None) -> None:
    """One process is given bounds of sequences or a mask of padding, shards their layout."""
    batch, cu = batch_of(kind), bounds_of(kind, size)
    places = torch.arange(TOKENS)
    if cu is not None:
        places = places - cu[torch.searchsorted(cu, places, right=True) - 1]

    def called(x: torch.Tensor, at: torch.Tensor, parameters: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
        options["position_embeddings"] = tuple(p.to(x.dtype) for p in angles(at[None]))
        found: torch.Tensor = functional_call(copy.deepcopy(layer), parameters, (x,), options)[0]
        return found

    def one(x: torch.Tensor, **parameters: torch.Tensor) -> torch.Tensor:
        return called(x, places, parameters, cu_seqlens=cu, attention_mask=padding)

    def many(x: torch.Tensor, layout: sd.SequenceLayout, **parameters: torch.Tensor) -> torch.Tensor:
        mask = ShardedMask.over(layout, -1, padding)
        return called(x, layout.positions(restart=True), parameters, attention_mask=mask)

    whole = {name: p.detach() for name, p in layer.named_parameters()}
    x = normal(batch, TOKENS, 16, seed=1, dtype=layer.o_proj.weight.dtype)
    compare(size, LAYOUTS[kind], {"x": x}, whole, one, many)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("covers", [True, False])
def test_layouts(kind: str, covers: bool) -> None:
    check(5, kind, layer_of(linear_covers_window=covers, **SHIPPED))


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kind", ["uneven", "packed"])
def test_options(kind: str, name: str) -> None:
    check(3, kind, layer_of(linear_covers_window=False, **OTHERS[name]))


@pytest.mark.parametrize("options", [SHIPPED, OTHERS["lolcats"]], ids=["shipped", "lolcats"])
def test_padding(options: dict[str, Any]) -> None:
    """Before one row and behind the other, over the borders of ranks."""
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[0, :25], mask[1, -30:] = False, False
    check(5, "uneven", layer_of(linear_covers_window=False, **options), mask)


@pytest.mark.parametrize("kind", ["gaps", "packed-zigzag"])
def test_half_precision(kind: str) -> None:
    """Gates are a message of their own, which ranks without tokens take part in, backward too."""
    check(4, kind, layer_of(linear_covers_window=False, **SHIPPED).bfloat16())
