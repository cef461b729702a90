"""`context_parallel` in threads: masks that come and go, and what it refuses. Whole models are in `programs/models.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import subquad.distributed as sd
from subquad.integrations.transformers import convert, register

from .programs.common import LIMIT, error
from .threads import on_ranks

transformers = pytest.importorskip("transformers", minversion="5")
pytestmark = pytest.mark.filterwarnings("ignore:.*native kernels are not in use")
TOKENS = 16


def model() -> Any:
    register()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=40, initializer_range=0.2,
        attn_implementation="subquad",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_is_not_taken_for_one_that_is_gone(mode: Any) -> None:
    """New masks, which may stand where freed ones stood, and one that is written to, in one block."""
    net, ids = model(), torch.randint(40, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    paddings = (0, 3, 9, 5, 0, 7)

    def logits(mask: torch.Tensor) -> torch.Tensor:
        places = (mask.cumsum(1) - 1).clamp_min(0)
        found: torch.Tensor = net(ids, attention_mask=mask, position_ids=places, use_cache=False).logits
        return found

    def padded(mask: torch.Tensor, padding: int) -> torch.Tensor:
        mask[0] = torch.arange(TOKENS) >= padding
        return mask

    def body(rank: int) -> None:
        with mode():
            kept = torch.ones(2, TOKENS, dtype=torch.long)
            whole = [logits(padded(torch.ones_like(kept), padding)) for padding in paddings]
            with sd.context_parallel(sd.SequenceLayout.contiguous(TOKENS)):
                for padding, want in zip(paddings, whole, strict=True):
                    for mask in (padded(torch.ones_like(kept), padding), padded(kept, padding)):
                        torch.testing.assert_close(logits(mask)[mask.bool()], want[mask.bool()])
                    del mask

    on_ranks(1, body)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window_size": 5},
        {"window_size": 5, "affine_window": True, "rope": "linear"},
        {"window_size": 5, "linear_covers_window": False},
    ],
)
@pytest.mark.parametrize("padding", [0, 6])
def test_lawcat_layers_on_one_rank_are_those_without_any(options: dict[str, Any], padding: int) -> None:
    net, ids = model(), torch.randint(40, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    convert(net, attention="lawcat", **options)
    for name, parameter in net.named_parameters():
        if "window_factor" in name:
            parameter.copy_(torch.tensor([0.3, -0.8]))
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[0, :padding] = 0
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0), "use_cache": False}
    want = net(ids, **given).logits[mask.bool()]

    def body(rank: int) -> None:
        with torch.no_grad(), sd.context_parallel(sd.SequenceLayout.contiguous(TOKENS)):
            assert error(net(ids, **given).logits[mask.bool()], want) <= LIMIT

    on_ranks(1, body)
