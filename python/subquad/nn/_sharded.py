"""Layers that are split over processes: their parameters are DTensors, their forward runs on this process's part of them.

Inside such a forward every gradient is one process's part of a sum. So what is whole on all of them enters through a function
whose gradient is summed: the input, and parameters that are not split. What leaves is summed once, and its gradient is whole
(Megatron-LM, arXiv 1909.08053): one all-reduce forward; one backward, and one for each whole parameter that is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

COUNTS = ("num_heads", "num_kv_heads")  # attributes of layers, of all processes together
WHOLE = ("q_norm.", "k_norm.")  # parameters that may also be plain tensors, equal on all of them
# Dimensions of heads and neurons in projections.
HEADS = {f"{name}_proj.{part}": 0 for name in "qkv" for part in ("weight", "bias")} | {"o_proj.weight": 1}
NEURONS = {f"{name}_proj.{part}": 0 for name in ("gate", "up", "gate_up") for part in ("weight", "bias")}
NEURONS |= {"down_proj.weight": 1}
_STYLES = "transformers.distributed.tensor_parallel"  # wraps the forward of the Linears that it splits


def sharded(tensor: Any) -> bool:
    return type(tensor).__name__ == "DTensor"


def mesh_of(last: nn.Module) -> Any:
    """The mesh of one dimension that splits a layer by the inputs of its last projection; None: it is whole, or FSDP's alone."""
    weight: Any = getattr(last, "weight", None)
    if not sharded(weight):
        return None
    mesh = weight.device_mesh
    dim = next((i for i, placement in enumerate(weight.placements) if placement.is_shard(1)), None)
    return None if dim is None else mesh if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[dim]]


def in_parts(
    layer: nn.Module, last: nn.Module, body: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """body(x) of a layer, whole or split over the mesh of `last`, a Linear whose call is the end of body.

    Raises:
        ValueError: a parameter that is whole, or split by FSDP, too.
    """
    mesh = mesh_of(last)
    if mesh is None:
        return body(x)
    group = mesh.get_group()
    bias: Any = last._parameters.get("bias")
    with localised(layer, mesh, last):
        y = body(_copied(x, group))
    y = _summed(y, group)
    return y if bias is None else y + bias.to_local()


@contextmanager
def localised(layer: nn.Module, mesh: Any, last: nn.Module) -> Iterator[None]:
    """For the block: parameters and counts of heads are this process's, the bias behind the sum is gone, Linears are called as
    they are."""
    kept: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, child in layer.named_modules():
            for key, value in child._parameters.items():
                if value is not None:
                    kept.append((child._parameters, key, value))
                    gone = child is last and key == "bias"
                    own = _part(f"{name}.{key}".lstrip("."), value, mesh)
                    child._parameters[key] = None if gone else own  # type: ignore[assignment]
            for key, buffer in child._buffers.items():
                if sharded(buffer):
                    kept.append((child._buffers, key, buffer))
                    child._buffers[key] = buffer.to_local()  # type: ignore[union-attr]
            for key in COUNTS:
                count = child.__dict__.get(key)
                if isinstance(count, int):
                    kept.append((child.__dict__, key, count))
                    child.__dict__[key] = count // mesh.size()
            if wrapped(child):
                kept.append((child.__dict__, "forward", child.__dict__.pop("forward")))
        yield
    finally:
        for table, key, value in kept:
            table[key] = value


def _part(name: str, parameter: Any, mesh: Any) -> torch.Tensor:
    if not sharded(parameter) and name.startswith(WHOLE):
        return _copied(parameter, mesh.get_group())
    if not sharded(parameter) or parameter.device_mesh.ndim != 1:
        got = f"one over {parameter.device_mesh.mesh_dim_names}" if sharded(parameter) else "a whole one"
        raise ValueError(f"{name}: expected a parameter that is split over {mesh.size()} processes, got {got}")
    local: torch.Tensor = parameter.to_local()
    return _copied(local, mesh.get_group()) if parameter.placements[0].is_replicate() else local


def wrapped(child: nn.Module) -> bool:
    """Whether transformers has wrapped the forward of a Linear whose weights it split."""
    return getattr(child.__dict__.get("forward"), "__module__", None) == _STYLES


def check_restored(last: nn.Module) -> None:
    """ValueError where the original of a layer could not call a last projection that it shares."""
    if mesh_of(last) is not None and not wrapped(last):
        raise ValueError(
            "layer: expected whole weights, got those that parallelize has split; save, and load them elsewhere"
        )


# --- messages ----------------------------------------


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def _copied(x: torch.Tensor, group: Any) -> torch.Tensor:
    """x, which all processes have; its gradient is the sum of theirs."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    copied: torch.Tensor = _Copied.apply(x, group)
    return copied


def _summed(x: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum of what the processes have, on all of them."""
    total: torch.Tensor = _Summed.apply(x, group)
    return total


# --- splitting ----------------------------------------


def split(
    layer: nn.Module, mesh: Any, dims: Mapping[str, int | None], halves: str = "", source: int | None = 0
) -> None:
    """Make the whole parameters of a layer DTensors on a mesh of one dimension; those that are split already stay.

    Args:
        dims: by name, the dimension that is split, or None.
        halves: names with this prefix are two parts behind each other, each of which is split.
        source: the process whose values all get; None: they are equal, and nothing is sent.
    """
    from torch.distributed.tensor import Replicate, Shard

    made: dict[int, nn.Parameter] = {}
    for name, dim in dims.items():
        owner, _, key = name.rpartition(".")
        table = layer.get_submodule(owner)._parameters
        whole: Any = table[key]
        if sharded(whole):
            continue
        if id(whole) not in made:
            values = whole.detach()
            if halves and name.startswith(halves):
                placed = _halved(values, mesh, source)
            else:
                placed = _placed(values, mesh, Replicate() if dim is None else Shard(dim), source)
            made[id(whole)] = nn.Parameter(placed, requires_grad=whole.requires_grad)
        table[key] = made[id(whole)]


def _placed(values: torch.Tensor, mesh: Any, placement: Any, source: int | None) -> Any:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values, mesh, [placement], src_data_rank=source)


def _halved(values: torch.Tensor, mesh: Any, source: int | None) -> Any:
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    own = torch.cat([_placed(half, mesh, Shard(0), source).to_local() for half in values.chunk(2)])
    placement = _StridedShard(0, split_factor=2)
    return DTensor.from_local(own, mesh, [placement], run_check=False, shape=values.shape, stride=values.stride())


def check_heads(layer: Any, size: int) -> None:
    """ValueError for key heads that `size` processes do not divide, or a norm of q or k over all heads, or whose gradient
    transformers sums already, from the first training step of a model that it has split."""
    if layer.num_kv_heads % size:
        raise ValueError(f"mesh: expected a size that divides the {layer.num_kv_heads} key heads, got {size}")
    for name in WHOLE:
        weight = getattr(getattr(layer, name[:-1], None), "weight", None)
        if isinstance(weight, torch.Tensor) and weight.shape[-1] != layer.head_dim:
            raise ValueError(f"{name}weight: expected one for every head of {layer.head_dim}, got {list(weight.shape)}")
        if getattr(weight, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"{name}weight: expected no hook of its gradient, got some; convert before the first training step"
            )


def split_like(values: torch.Tensor, mesh: Any) -> Any:
    """Values that all processes have, a number for each row of a weight split over `mesh`, as a DTensor; nothing is sent."""
    from torch.distributed.tensor import Shard

    return _placed(values, mesh, Shard(0), None)


def relaid(weight: Any, local: torch.Tensor) -> nn.Parameter:
    """A split parameter whose part is in memory as `local` is."""
    from torch.distributed.tensor import DTensor

    like = {"shape": weight.shape, "stride": weight.stride()}
    placed = DTensor.from_local(local, weight.device_mesh, weight.placements, run_check=False, **like)
    return nn.Parameter(placed, requires_grad=weight.requires_grad)


def check_placed(module: nn.Module, dims: Mapping[str, int | None], halves: str = "") -> None:
    """ValueError for parameters of which a process has a part, but for a part that a layer can use.

    Args:
        module: with q_proj, or gate_proj and so on.
        dims: as in `split`; of the names that it has not, none may be a part.
        halves: as in `split`.
    """
    for name, parameter in module.named_parameters():
        if not sharded(parameter):
            continue
        placements: Any = parameter.placements  # type: ignore[attr-defined]
        dim = dims.get(name, None)
        if len(placements) == 1 and halves and name.startswith(halves):
            fits = getattr(placements[0], "split_factor", None) == 2
        elif len(placements) == 1:
            fits = placements[0].is_replicate() if dim is None else placements[0].is_shard(dim)
        else:
            fits = False
        if not fits:
            raise ValueError(
                f"{name}: expected a whole parameter, got a DTensor; convert before the model is sharded, unless over heads and "
                f"neurons, which has {'no split' if dim is None else f'Shard({dim})'} here, not {placements}"
            )
