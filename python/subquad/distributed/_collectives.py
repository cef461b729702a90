"""The only file of the package `distributed` that names a collective: names changed in torch 2.13."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

Group = Any  # a ProcessGroup, a one-dimensional DeviceMesh, or None for the default group

_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def group_of(group: Group) -> Any:
    """The process group meant.

    Raises:
        RuntimeError: torch has no distributed package, or no group was made yet.
        ValueError: a mesh of several dimensions, or a group without this rank.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("group: expected a process group, got none; call torch.distributed.init_process_group first")
    if hasattr(group, "mesh_dim_names") or hasattr(group, "get_group"):  # a DeviceMesh, which is not imported here
        check_mesh("group", group)
        group = group.get_group()
    if dist.get_rank(group) < 0:
        raise ValueError(f"group: expected a group that has this rank ({dist.get_rank()})")
    return group


def check_mesh(argument: str, mesh: Any, which: int = 0) -> None:
    """ValueError for a mesh of several dimensions, or without this rank; `which` of them the message proposes."""
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        got = f"{mesh.ndim} without names; give it mesh_dim_names, of which one is passed"
        got = got if names is None else f"{names}; pass mesh[{names[which]!r}]"
        raise ValueError(f"{argument}: expected a mesh of one dimension, got {got}")
    if mesh.get_coordinate() is None:
        ranks = mesh.mesh.tolist()
        raise ValueError(f"{argument}: expected a mesh that has this rank ({dist.get_rank()}), got one of {ranks}")


def rank_and_size(group: Group) -> tuple[int, int]:
    return dist.get_rank(group), dist.get_world_size(group)


def all_to_all(given: torch.Tensor, receive: list[int], send: list[int], group: Group) -> torch.Tensor:
    """Rows [sum(receive), ...] of all ranks, in their order, for rows [sum(send), ...] by destination."""
    got = given.new_empty((sum(receive), *given.shape[1:]))
    dist.all_to_all_single(got, given.contiguous(), receive, send, group=group)
    return got


def all_gather(given: torch.Tensor, group: Group) -> torch.Tensor:
    """[R * rows, ...] of [rows, ...] of every rank; all have the same shape."""
    _, size = rank_and_size(group)
    every = given.new_empty((size * given.shape[0], *given.shape[1:]))
    assert _gather is not None
    _gather(every, given.contiguous(), group=group)  # gloo wants the shape of a concatenation
    return every


def all_reduce(x: torch.Tensor, group: Group) -> None:
    """Make x, in place, the sum of what it is on all ranks."""
    dist.all_reduce(x, group=group)


def broadcast(x: torch.Tensor, source: int, group: Group) -> None:
    """Give x, in place, the values that it has on one rank of the group."""
    whole = x if x.is_contiguous() else x.contiguous()
    dist.broadcast(whole, group_src=source, group=group)
    if whole is not x:
        x.copy_(whole)


def send(x: torch.Tensor, to: int, tag: int, group: Group) -> None:
    dist.send(x.contiguous(), group_dst=to, group=group, tag=tag)


def receive(x: torch.Tensor, source: int, tag: int, group: Group) -> None:
    dist.recv(x, group_src=source, group=group, tag=tag)


def swap(
    given: Sequence[tuple[int, torch.Tensor]], coming: Sequence[tuple[int, torch.Tensor]], group: Group
) -> Callable[[], None]:
    """Start to send contiguous tensors to ranks and to receive others from ranks, in the same order on both sides.

    Returns:
        Waits until what comes has come and what goes is gone.
    """
    ops = [dist.P2POp(dist.irecv, x, group=group, group_peer=rank) for rank, x in coming]
    ops += [dist.P2POp(dist.isend, x, group=group, group_peer=rank) for rank, x in given]
    works = dist.batch_isend_irecv(ops) if ops else []

    def wait() -> None:
        for work in works:
            work.wait()
        ops.clear()  # which kept what was on its way

    return wait


def gather_objects(value: Any, group: Group) -> list[Any]:
    """What every rank gave, by rank."""
    _, size = rank_and_size(group)
    found: list[Any] = [None] * size
    dist.all_gather_object(found, value, group=group)
    return found
