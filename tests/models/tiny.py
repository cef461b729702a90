"""Tiny models of transformers, with random weights; their token ids are those of the fixture `ids`."""

from __future__ import annotations

from typing import Any

import torch

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 160, "initializer_range": 0.1, "pad_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip


def build(family: str = "Llama", **sizes: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()
