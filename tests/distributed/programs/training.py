"""What programs that train have in common: the model, its tokens, the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from common import error
from transformers import LlamaConfig, LlamaForCausalLM

from subquad.integrations.transformers import CatsConfig, LawcatConfig, convert, register

SIZES: dict[str, Any] = {
    "hidden_size": 96, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 12, "num_key_value_heads": 12,
    "head_dim": 8, "vocab_size": 96, "pad_token_id": 0, "attn_implementation": "subquad",
}  # fmt: skip


def furthest(model: torch.nn.Module, one: torch.nn.Module) -> float:
    """The largest error of a parameter."""
    expected = dict(one.named_parameters())
    return max(error(p, expected[name]) for name, p in model.named_parameters())


def built(seed: int = 0) -> Any:
    """LAWCAT, softmax, LAWCAT with a window, and CATS; one of the thresholds is one for every neuron."""
    register()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    convert(model, attention=LawcatConfig(), layers=[0])
    convert(model, attention=LawcatConfig(window_size=9), layers=[2])
    convert(model, mlp=CatsConfig(threshold=0.01, down_layout="keep"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    thresholds = 0.05 * torch.rand(100, generator=torch.Generator().manual_seed(7))
    model.model.layers[1].mlp.set_threshold(thresholds, target_sparsity=0.5, calibration_tokens=2**24 + 2)
    return model


def tokens(batch: int, count: int) -> torch.Tensor:
    return torch.randint(1, 96, (batch, count), generator=torch.Generator().manual_seed(1))


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(), lr=1e-2, eps=1e-2
    )  # a large eps: tiny gradients are not divided by themselves
