"""Children that a layer shares with the module it was made from, seen as they are at the moment of a call.

What is plain may be read: its parameters say what a call computes. Anything else (adapters, quantised or sharded weights,
offloading, hooks, another `forward`, a wrapper) is called.
"""

from __future__ import annotations

from typing import Any, TypeGuard, TypeVar

import torch
from torch import nn
from torch.nn.modules import module as _globals

Module = TypeVar("Module", bound=nn.Module)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def plain(child: nn.Module | None, kind: type[Module]) -> TypeGuard[Module]:
    """Whether an operator may read the parameters of a child instead of calling it.

    Not where a user has put a module of another class or a tensor of another class, or changed what a call does: by a hook, of
    the module or of all modules, or by another `forward` of the object.
    """
    if type(child) is not kind or not _forward_is_its_own(child):
        return False
    if child._forward_pre_hooks or child._forward_hooks or child._backward_pre_hooks or child._backward_hooks:
        return False
    if _globals._has_any_global_hook():
        return False
    return all(p is None or type(p) is nn.Parameter or _ordinary(type(p)) for p in child._parameters.values())


def _ordinary(tensor: type) -> bool:
    """Also what stands for an ordinary tensor while a graph is traced."""
    return tensor in (nn.Parameter, torch.Tensor) or tensor.__module__.startswith("torch._subclasses.")


def _forward_is_its_own(child: nn.Module) -> bool:
    """Also where accelerate has wrapped it to move inputs to the device of the weights and nothing else."""
    if "forward" not in child.__dict__:
        return True
    forward, hooks = child.__dict__["forward"], _accelerate_hooks(child)
    if hooks:
        if any(type(hook).__name__ != "AlignDevicesHook" or hook.offload for hook in hooks):
            return False
        forward = child.__dict__.get("_old_forward")
    return getattr(forward, "__func__", None) is type(child).forward and forward.__self__ is child


def _accelerate_hooks(module: nn.Module) -> tuple[Any, ...]:
    hook = module.__dict__.get("_hf_hook")
    return () if hook is None else getattr(hook, "hooks", (hook,))  # those of a SequentialHook


def features(child: Any) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear map, also of an adapter or of quantised weights; None of anything else."""
    sizes = getattr(child, "in_features", None), getattr(child, "out_features", None)
    return sizes if isinstance(child, nn.Module) and all(isinstance(n, int) for n in sizes) else None  # type: ignore


def placement(child: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of new parameters beside a child: where it computes, if its own are offloaded, quantised or adapted."""
    tensors = [*child.parameters(), *child.buffers()]
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    if device.type == "meta":
        hooks = [hook for part in child.modules() for hook in _accelerate_hooks(part)]
        device = next(
            (torch.device(hook.execution_device) for hook in hooks if getattr(hook, "offload", False)), device
        )
    return device, next((tensor.dtype for tensor in tensors if tensor.dtype in FLOATS), torch.get_default_dtype())


def places_children(module: nn.Module) -> bool:
    """Whether accelerate offloads all parameters inside a module together, by the names they had then."""
    hooks = _accelerate_hooks(module)
    return any(getattr(hook, "offload", False) and getattr(hook, "place_submodules", False) for hook in hooks)


def check_whole(module: nn.Module) -> None:
    """ValueError for parameters of which a process has a part."""
    for name, parameter in module.named_parameters():
        if type(parameter).__name__ == "DTensor":
            raise ValueError(f"{name}: expected a whole parameter, got a DTensor; convert before the model is sharded")


def set_mode(module: nn.Module, training: bool, besides: nn.Module) -> None:
    """Training mode or not, for all of a module but what it shares with another, which stays in the mode it is in."""
    shared = {id(part) for part in besides.modules()}
    for part in module.modules():
        if id(part) not in shared:
            part.training = training
