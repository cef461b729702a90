"""Children that a layer shares with the module it was made from, and what it may do with them."""

from __future__ import annotations

from typing import TypeGuard, TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def plain(child: nn.Module | None, kind: type[Module]) -> TypeGuard[Module]:
    """Whether an operator may read the parameters of a child instead of calling it.

    Not where a user has put a module of another class, or changed what a call does: by a hook, or by another `forward` of the
    object (as accelerate does when it offloads).
    """
    if type(child) is not kind:
        return False
    hooks = (child._forward_pre_hooks, child._forward_hooks, child._backward_pre_hooks, child._backward_hooks)
    return not any(hooks) and "forward" not in child.__dict__


def set_mode(module: nn.Module, training: bool, besides: nn.Module) -> None:
    """Training mode or not, for all of a module but what it shares with another, which stays in the mode it is in."""
    shared = {id(part) for part in besides.modules()}
    for part in module.modules():
        if id(part) not in shared:
            part.training = training
