"""Twelve small decoders of transformers, each with something that the others have not, and low-rank adapters for any of them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER = 61, 32, 4, 2, 8, 40
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "max_position_embeddings": 64, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
PROJECTIONS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj", "c_fc", "c_proj",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A model of transformers, as its classes are called there.

    Attributes:
        name, family: "qwen2" and "Qwen2".
        windows: keys that each layer's softmax sees, None for all; as many as there are layers.
        more: further fields of its config.
        gated: whether its MLPs are gated ones that CATS can replace.
    """

    name: str
    family: str
    windows: tuple[int | None, ...] = (None, None)
    more: dict[str, Any] = field(default_factory=dict)

    def model(self) -> Any:
        """The same weights at every call, with nothing left at the value that its initialisation gave it."""
        import transformers

        torch.manual_seed(zlib.crc32(self.name.encode()))
        names = (f"{self.family}{suffix}" for suffix in ("TextConfig", "Config"))
        make = next(found for name in names if (found := getattr(transformers, name, None)) is not None)
        more = dict(self.more)
        if transformers.__version__.startswith("4.") and "rope_parameters" in more:
            more["rope_scaling"] = more.pop("rope_parameters")
        config = make(**(SIZES | {"num_hidden_layers": len(self.windows)} | more))
        config._attn_implementation, config._experts_implementation = "eager", "batched_mm"
        model = getattr(transformers, f"{self.family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms, biases and sinks start as ones and zeros
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model.requires_grad_(False)


def _mixed(*windows: int | None) -> dict[str, Any]:
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return {"layer_types": kinds, "sliding_window": next(w for w in windows if w is not None)}


KINDS = {
    kind.name: kind
    for kind in (
        Kind("llama", "Llama"),
        Kind("mistral", "Mistral", (5, 5), {"sliding_window": 5}),
        Kind("qwen2", "Qwen2", (4, None, 4), _mixed(4, None, 4) | {"use_sliding_window": True}),
        Kind("qwen3", "Qwen3"),
        Kind("gemma2", "Gemma2", (4, None), _mixed(4, None) | {"attn_logit_softcapping": 2.0}),
        Kind("gemma3", "Gemma3", (4, 4, None), _mixed(4, 4, None) | {"query_pre_attn_scalar": 20}),
        Kind("phi3", "Phi3", more={"partial_rotary_factor": 0.5}),
        Kind("olmo2", "Olmo2"),
        Kind("smollm3", "SmolLM3", (None, None), {"no_rope_layers": [1, 0]}),
        Kind("granite", "Granite", more={"attention_multiplier": 0.2, "residual_multiplier": 0.7, "logits_scaling": 3.0}),
        Kind("starcoder2", "Starcoder2", (6, 6), {"sliding_window": 6}),
        Kind("gpt-oss", "GptOss", (6, None), _mixed(6, None) | {"num_local_experts": 2, "num_experts_per_tok": 1}),
    )
}  # fmt: skip


class Lora(nn.Module):
    """A linear layer with a low-rank adapter, shaped as peft's are: it has the layer's `weight`, but computes more."""

    rank, scaling = 2, 2.0

    def __init__(self, name: str, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        for adapter, value in low_rank(name, base_layer).items():
            self.register_parameter(adapter, nn.Parameter(value))

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)


def low_rank(name: str, linear: nn.Linear) -> dict[str, torch.Tensor]:
    """The two matrices of the adapter of a projection with this name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    shapes = {"lora_A": (Lora.rank, linear.in_features), "lora_B": (linear.out_features, Lora.rank)}
    return {n: 0.3 * torch.randn(shape, generator=generator, dtype=linear.weight.dtype) for n, shape in shapes.items()}


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of attention and MLPs, by qualified name, which a conversion leaves alone."""
    modules = dict(model.named_modules())
    return {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in PROJECTIONS
    }


def adapt(model: nn.Module) -> None:
    """Put an adapter on every projection."""
    for name, linear in projections(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Lora(name, linear))


def adapt_by_peft(model: nn.Module) -> None:
    """`adapt`, with the library's own layers."""
    import peft

    linears = projections(model)
    values = {name: low_rank(name, linear) for name, linear in linears.items()}
    config = peft.LoraConfig(r=Lora.rank, lora_alpha=Lora.rank * Lora.scaling, target_modules=list(linears))
    peft.inject_adapter_in_model(config, model)
    with torch.no_grad():
        for name, parameter in adapters(model).items():
            layer, _, adapter = name.rpartition(".")
            parameter.copy_(values[layer][adapter])


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the adapters, by name; peft's are named as those of `Lora`."""
    named = ((name.removesuffix(".default.weight"), parameter) for name, parameter in model.named_parameters())
    return {name: parameter for name, parameter in named if name.endswith((".lora_A", ".lora_B"))}
