"""Attention transfer: teaching linear attention layers what the softmax layers they replaced would have said."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import _checks
from .nn._sharded import mesh_of
from .nn.lawcat import LawcatAttention, sliding_window, tokens_of

STAGES = (1, 2)
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def attention_transfer_loss(
    pred: Sequence[torch.Tensor] | torch.Tensor,
    true: Sequence[torch.Tensor] | torch.Tensor,
    *,
    mse_factor: float = 1000.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """mse_factor times the mean squared error, averaged over layers, in float32 (LoLCATs, arXiv 2410.10254).

    Args:
        pred, true: outputs of students and teachers, a [B, T, C] for each layer.
        mse_factor: 1000 in LoLCATs and LAWCAT.
        mask: [B, T], 0 at tokens that do not count; None counts all.

    Returns:
        A scalar. Tokens that do not count have no gradient, whatever they hold.

    Raises:
        ValueError: different numbers of layers, or shapes.
    """
    if len(pred) != len(true) or not len(pred):
        raise ValueError(f"true: expected {len(pred)} layers as pred has (at least 1), got {len(true)}")
    for i, outputs in enumerate(zip(pred, true, strict=True)):
        for name, x in zip((f"pred[{i}]", f"true[{i}]"), outputs, strict=True):
            _checks.tensor(name, x)
    total = torch.zeros((), device=pred[0].device)
    for p, t in zip(pred, true, strict=True):
        if p.shape != t.shape:
            raise ValueError(f"true: expected shape {list(p.shape)} as pred has, got {list(t.shape)}")
        if mask is None:
            error = (p.float() - t.float()).square().mean()
        else:
            if mask.shape != p.shape[:2]:
                raise ValueError(f"mask: expected shape {list(p.shape[:2])}, got {list(mask.shape)}")
            keep = mask.bool()[..., None]
            difference = torch.where(keep, p.float(), 0) - torch.where(keep, t.float(), 0)
            error = difference.square().sum() / (keep.sum() * p.shape[2]).clamp_min(1)
        total = total + error
    return total * (mse_factor / len(pred))


class AttentionTransfer:
    """What `attention_transfer` yields: the losses of the last forward pass, by layer."""

    def __init__(self, layers: dict[str, LawcatAttention], mse_factor: float, layer_local: bool) -> None:
        self.layers, self.mse_factor, self.layer_local = layers, mse_factor, layer_local
        self.losses: dict[str, torch.Tensor] = {}
        self._names = {id(layer): name for name, layer in layers.items()}

    def loss(self) -> torch.Tensor:
        """The mean of the layers' losses; empties the record. Without a graph if backward was layer by layer.

        Raises:
            RuntimeError: no forward pass since the last call.
        """
        if not self.losses:
            raise RuntimeError("loss: run the model first, inside attention_transfer")
        total = torch.stack([x / len(self.losses) for x in self.losses.values()]).sum()
        self.losses = {}
        return total

    def __call__(self, layer: LawcatAttention, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """A layer's forward while the transfer is on: learn from the teacher, and return what it says."""
        _check_ddp(self.layer_local)
        if kwargs.pop("past_key_values", None) is not None:
            raise ValueError("past_key_values: expected None during attention transfer; pass use_cache=False")
        teacher = layer.to_attention()  # with the children that the student has by now, such as adapters
        heard: list[torch.Tensor] = []
        hook = layer.o_proj.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
        try:
            with torch.no_grad():
                output = teacher(hidden_states=hidden_states, **kwargs)
        finally:
            hook.remove()
        true = heard[0]
        with torch.enable_grad():
            pred = layer.mix(hidden_states.detach(), **kwargs)
            tokens = tokens_of(kwargs.get("attention_mask"), pred.shape[0], pred.shape[1], sliding_window(teacher))
            loss = attention_transfer_loss([pred], [true], mse_factor=self.mse_factor, mask=tokens)
            if self.layer_local:
                (loss / len(self.layers)).backward()
                loss = loss.detach()
        self.losses[self._names[id(layer)]] = loss
        return output


@contextmanager
def attention_transfer(
    model: nn.Module, *, mse_factor: float = 1000.0, layer_local: bool = False
) -> Iterator[AttentionTransfer]:
    """Stage one of LoLCATs and LAWCAT: inside the block every converted layer is compared with its teacher.

    A forward pass returns the teacher's outputs, so that layers learn independently of each other; the student sees the teacher's
    input. What is compared is the output before `o_proj`.

    Args:
        model: with layers from `convert(model, attention="lawcat")`.
        mse_factor: of the loss, see `attention_transfer_loss`.
        layer_local: run every layer's backward at once and free its graph: the memory of one layer instead of all. Gradients are
            then there after the forward pass, those of `loss()`.

    Yields:
        An `AttentionTransfer`: call `loss()` after each forward pass; `losses` has them by layer before that.

    Raises:
        ValueError: a model without converted layers; or whose trainable parameters in them FSDP shards, which would lose their
            gradients. In a forward pass under DDP: `layer_local`, whose gradients DDP would not average (`no_sync()` says that
            they are averaged elsewhere), or `find_unused_parameters`, for the loss is no part of the model's output.

    Example:
        >>> with attention_transfer(model) as transfer:  # doctest: +SKIP
        ...     model(input_ids, use_cache=False)
        ...     transfer.loss().backward()
    """
    _checks.module("model", model)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LawcatAttention) and module.original is not None
    }
    if not layers:
        raise ValueError('model: expected layers made by convert(model, attention="lawcat"), got none')
    transfer = AttentionTransfer(layers, mse_factor, layer_local)
    _check_whole(model, layers)
    try:
        for layer in layers.values():
            layer._transfer = transfer
        yield transfer
    finally:
        for layer in layers.values():
            layer._transfer = None


def _check_ddp(layer_local: bool) -> None:
    """Inside a forward pass of DDP, which must see every backward that it is to average."""
    ddp: Any = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if ddp is None or not ddp.require_backward_grad_sync or not torch.is_grad_enabled():
        return
    if layer_local:
        raise ValueError("layer_local: expected False under DDP, which does not average these gradients, got True")
    if ddp.find_unused_parameters:
        raise ValueError(
            "find_unused_parameters: expected False, for DDP looks for unused parameters in the model's output, of which the "
            "loss is no part; wrap the model after trainable_parameters(model, stage=1)"
        )


def _check_whole(model: nn.Module, layers: dict[str, LawcatAttention]) -> None:
    """FSDP reduces gradients, and keeps weights until then, only where the loss comes from its modules' outputs; and the heads of
    other processes are no part of it."""
    split = next((name for name, layer in layers.items() if mesh_of(layer.o_proj) is not None), None)
    if split is not None:
        raise ValueError(
            f"{split}: expected all heads, got those of this process; transfer attention before parallelize"
        )
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    sharded = False
    for module in model.modules():
        if isinstance(module, fsdp.FullyShardedDataParallel):
            raise ValueError("model: expected no FullyShardedDataParallel, got one; use fully_shard")
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()  # parameters that are whole for the moment show what they are
            sharded = True
    inside = [
        f"{name}.{own}"
        for name, layer in layers.items()
        for own, parameter in layer.named_parameters()
        if sharded and parameter.requires_grad and type(parameter).__name__ == "DTensor"
    ]
    if inside:
        raise ValueError(
            "model: expected the trainable parameters of converted layers outside FSDP (fully_shard(..., "
            f"ignored_params=...)), got {len(inside)} inside, first {inside[0]!r}"
        )


def trainable_parameters(model: nn.Module, stage: int = 1) -> dict[str, nn.Parameter]:
    """What a stage of the recipe trains, by name; `requires_grad` is set for these and cleared for all others.

    Args:
        model: with converted layers.
        stage: 1 for what LAWCAT adds (convolutions, feature maps, gates), 2 for the projections too: of one with LoRA
            (parameters named lora_...), as LAWCAT has it, or with another adapter of peft, the adapter alone.

    Raises:
        ValueError: another stage, or a model without converted layers.
    """
    if stage not in STAGES:
        raise ValueError(f"stage: expected 1 or 2, got {stage!r}")
    _checks.module("model", model)
    chosen: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, LawcatAttention):
            chosen |= {id(p): f"{name}.{own}".lstrip(".") for own, p in module.new_parameters().items()}
            if stage == 2:
                for own in _PROJECTIONS:
                    parts = _adapters(dict(getattr(module, own).named_parameters()))
                    chosen |= {id(p): f"{name}.{own}.{part}".lstrip(".") for part, p in parts.items()}
    if not chosen:
        raise ValueError('model: expected layers made by convert(model, attention="lawcat"), got none')
    found = {}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
        if id(parameter) in chosen:
            found[chosen[id(parameter)]] = parameter
    return found


def _adapters(parts: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The parameters of a projection that adapters brought, by name; all of them where there is none."""
    lora = {name: p for name, p in parts.items() if "lora_" in name}
    beside = {name: p for name, p in parts.items() if not name.startswith(("base_layer.", "original_module."))}
    return lora or beside or parts
