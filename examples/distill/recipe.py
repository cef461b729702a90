"""The two stages: layer by layer against softmax attention, then all together against the logits of the softmax model."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import subquad
from subquad.integrations.transformers import LawcatConfig, convert
from subquad.nn import LawcatAttention

WINDOWS = {
    1: 64,
    2: 128,
}  # tokens: with a narrow one at first, linear attention learns what it need not know in the end
CONFIG = LawcatConfig(window_size=WINDOWS[2], linear_covers_window=False, linear_scale=1.0, tie_qk_feature_map=False)
RANK, ALPHA = 16, 32
RATES = {1: {"new": 5e-3}, 2: {"new": 2e-3, "lora": 1e-3}}  # learning rates at their highest


def student_of(model: nn.Module) -> nn.Module:
    """A copy of the model's modules around its parameters, with LAWCAT in every layer; the model stays the teacher."""
    shared = (*model.parameters(), *model.buffers())
    student = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    convert(student, attention=CONFIG)
    return student


def set_window(student: nn.Module, stage: int) -> None:
    """The window of every layer in a stage."""
    for module in student.modules():
        if isinstance(module, LawcatAttention):
            module.window_size = WINDOWS[stage]


def add_lora(model: nn.Module, seed: int) -> None:
    """LoRA on the attention projections, by peft."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(seed)
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, lora_dropout=0.0), model)


def optimizer_of(model: nn.Module, stage: int) -> torch.optim.AdamW:
    """AdamW without weight decay; the highest rate of each group is kept as `highest`."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in subquad.trainable_parameters(model, stage).items():
        groups.setdefault("lora" if "lora_" in name else "new", []).append(parameter)
    rates = RATES[stage]
    return torch.optim.AdamW(
        [{"params": group, "lr": 0.0, "highest": rates[kind]} for kind, group in groups.items()],
        betas=(0.9, 0.95),
        weight_decay=0,
    )


def set_rates(optimizer: torch.optim.Optimizer, progress: float, warm_up: float = 0.05) -> None:
    """Rates at a share `progress` of a stage: a linear start, then half a cosine to a fiftieth."""
    rising = min(1.0, (progress + 1e-3) / warm_up)
    falling = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    for group in optimizer.param_groups:
        group["lr"] = group["highest"] * rising * falling


def transfer_step(student: nn.Module, ids: torch.Tensor) -> float:
    """Gradients of stage one: every layer's squared error relative to its softmax attention's output. Returns the loss."""
    with subquad.attention_transfer(student, layer_local=True) as transfer:
        student.model(ids, use_cache=False)
        return transfer.loss().item()


def logits_step(
    student: nn.Module, teacher: nn.Module, ids: torch.Tensor, share: float, generator: torch.Generator
) -> float:
    """Gradients of stage two: the divergence from the teacher's distribution, at a random share of the positions.

    Every layer sees all positions; the projection to the vocabulary, which takes long, is made for some. Returns nats per token.
    """
    kept = torch.randperm(ids.shape[1], generator=generator)[: max(1, int(share * ids.shape[1]))].sort().values
    with torch.no_grad():
        wanted = teacher.lm_head(teacher.model(ids, use_cache=False).last_hidden_state[0, kept]).log_softmax(-1)
    found = student.lm_head(student.model(ids, use_cache=False).last_hidden_state[0, kept]).log_softmax(-1)
    loss = F.kl_div(found, wanted, reduction="batchmean", log_target=True)
    loss.backward()
    return loss.item()


def clip(optimizer: torch.optim.Optimizer, together: bool) -> None:
    """Bound gradients to a norm of 1: of all, or of each parameter, where layers learn independently."""
    parameters: list[Any] = [p for group in optimizer.param_groups for p in group["params"]]
    parts: Iterable[Any] = [parameters] if together else parameters
    for part in parts:
        nn.utils.clip_grad_norm_(part, 1.0)
