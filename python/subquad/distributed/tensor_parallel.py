"""Tensor parallelism of converted layers: heads and neurons are split, and each layer sums once (Megatron-LM, arXiv 1909.08053).

The layers know themselves how they are split (`subquad.nn`); what is here places their parameters, after all checks, on all ranks
or on none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from .. import _checks
from ..nn._children import plain
from ..nn._sharded import check_heads, sharded
from ..nn.cats_mlp import CATSMLP
from ..nn.causal_conv1d import ShortConvolution
from ..nn.feature_map import LearnedFeatureMap
from ..nn.lawcat import GateProjection, LawcatAttention
from ..nn.quantised_cats_mlp import QuantisedCATSMLP
from ..nn.sink_attention import SinkAttention
from ..nn.superlinear_attention import SuperlinearAttention
from . import _collectives, stock
from .agreement import agree

# Children that hold what is split, by name; a part of a model that is exchanged for another may compute anything.
_KINDS: dict[str, type[nn.Module]] = {
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "down_proj"), nn.Linear),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "q_search_proj", "output_gate"), nn.Linear),
    **dict.fromkeys(("conv_q", "conv_k", "conv_v"), ShortConvolution),
    **dict.fromkeys(("feature_map", "feature_map_k"), LearnedFeatureMap),
    "gate": GateProjection,
}


class _Style(ParallelStyle):
    """Checks on all ranks, then the layer's own split."""

    layer: type[nn.Module]

    def check(self, module: Any, mesh: DeviceMesh) -> None:
        """ValueError for a module that cannot be split over a mesh; nothing has changed then."""
        _check_mesh(mesh)
        if not isinstance(module, self.layer) or isinstance(module, QuantisedCATSMLP):
            raise ValueError(f"module: expected a {self.layer.__name__}, got a {type(module).__name__}")
        for name, parameter in module.named_parameters():
            if sharded(parameter):
                raise ValueError(f"{name}: expected a whole parameter, got a DTensor; split a layer once, before FSDP")
        for name, child in module.named_children():
            kind = _KINDS.get(name)
            if kind is not None and not plain(child, kind):
                raise ValueError(
                    f"{name}: expected a {kind.__name__} with weights that can be read and no hooks, got {type(child).__name__}"
                )

    def facts(self, module: Any) -> dict[str, Any]:
        """What ranks must have in common."""
        return {
            "parameters": [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in module.named_parameters()]
        }

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _agreed([("module", module, self)], device_mesh)
        module._split(device_mesh, self.src_data_rank)  # type: ignore[operator]
        return module


class CATSParallel(_Style):
    """A `CATSMLP` split by its neurons, for `torch.distributed.tensor.parallel.parallelize_module`.

    Gate and up are split by rows, with their biases and a threshold for every neuron; down by columns. A process finds out which
    of its neurons are active, by the threshold that one process would use, and reads these; one all-reduce [..., H] sums, forward
    and backward. Neurons that the ranks do not divide are split as `torch.chunk` does, but for a fused gate_up_proj.

    Parameters become DTensors, so that optimizers, FSDP2 and checkpoints see whole shapes; forward and backward run the kernels
    of this package on this rank's part. With FSDP2 on top, convert with `down_layout="keep"`.

    Raises:
        ValueError: on all ranks, before anything has changed: a mesh of more than one dimension, weights in few bits, with
            adapters or hooks, parameters that are DTensors already, ranks whose layers differ.

    Example:
        >>> plan = {"model.layers.*.mlp": CATSParallel()}  # doctest: +SKIP
        >>> parallelize_module(model, mesh["tp"], plan)  # doctest: +SKIP
    """

    layer = CATSMLP

    def check(self, module: Any, mesh: DeviceMesh) -> None:
        super().check(module, mesh)
        if module._fused and module.intermediate_size % mesh.size():
            raise ValueError(
                f"mesh: expected a size that divides the {module.intermediate_size} neurons of gate_up_proj, got {mesh.size()}"
            )

    def facts(self, module: Any) -> dict[str, Any]:
        threshold = module.threshold.tolist() if not _checks.traced(module.threshold) else None
        return super().facts(module) | {"options": module._options(), "threshold": threshold}


class _HeadsParallel(_Style):
    """By heads, whatever they compute."""

    layer: type[nn.Module] = SinkAttention

    def check(self, module: Any, mesh: DeviceMesh) -> None:
        super().check(module, mesh)
        check_heads(module, mesh.size())

    def facts(self, module: Any) -> dict[str, Any]:
        return super().facts(module) | {"options": module.config}


class _SuperlinearParallel(_HeadsParallel):
    layer = SuperlinearAttention


class LawcatParallel(_HeadsParallel):
    """A `LawcatAttention` split by its heads, for `torch.distributed.tensor.parallel.parallelize_module`.

    q, k and v, convolutions, feature maps, the gates' last map and the window's factors are split by heads, o_proj by columns;
    norms and the gates' first map stay whole. States and caches are then those of this rank's heads, without a message; one
    all-reduce [B, T, hidden_size] sums forward, and backward one for the input and one for each whole parameter that is trained.

    Raises:
        ValueError: as `CATSParallel`; key heads that the ranks do not divide; a norm of q or k over all heads.

    Example:
        >>> plan = {"model.layers.*.self_attn": LawcatParallel()}  # doctest: +SKIP
        >>> parallelize_module(model, mesh["tp"], plan)  # doctest: +SKIP
    """

    layer = LawcatAttention


def parallelize(model: nn.Module, mesh: DeviceMesh, *, src_data_rank: int | None = 0) -> list[str]:
    """Split every `CATSMLP` of a model by neurons, every `LawcatAttention`, `SinkAttention` and `SuperlinearAttention` by heads,
    in place.

    Softmax attention and dense MLPs beside them are split by torch's styles where the model's config has a plan for that
    (`base_model_tp_plan`) that knows no other parameters in them, and the ranks divide their heads and neurons. Everything else
    stays whole on every rank, where it computes the same. All or nothing: errors change nothing, on no rank. Convert, calibrate
    and transfer attention before.

    Args:
        model: with converted layers.
        mesh: of one dimension: mesh["tp"] of a larger one.
        src_data_rank: the rank of the mesh whose parameters and buffers all get, those that stay whole, too; None: they are
            equal, and nothing is sent.

    Returns:
        Qualified names of the layers that were split.

    Raises:
        TypeError: no DeviceMesh.
        ValueError: on all ranks: no converted layers; see `CATSParallel` and `LawcatParallel`; the message names the layer;
            a mesh of several dimensions, or without this rank.

    Example:
        >>> mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))  # doctest: +SKIP
        >>> subquad.distributed.parallelize(model, mesh)  # doctest: +SKIP
        ['model.layers.0.self_attn', 'model.layers.0.mlp']
    """
    _checks.module("model", model)
    _check_mesh(mesh)
    styles: list[_Style] = [CATSParallel(), LawcatParallel(), _HeadsParallel(), _SuperlinearParallel()]
    found: list[tuple[str, Any, _Style]] = [
        (name, module, style)
        for name, module in model.named_modules()
        for style in styles
        if isinstance(module, style.layer)
    ]
    others = stock.plans(model, mesh.size())
    tensors = [*model.named_parameters(), *model.named_buffers()]
    _agreed(found, mesh, others=list(others), **{name: (tuple(x.shape), x.dtype) for name, x in tensors})
    for _, module, _ in found:
        module._split(mesh, src_data_rank)
    for name, plan in others.items():
        parallelize_module(model.get_submodule(name), mesh, plan, src_data_rank=src_data_rank)
    if src_data_rank is not None:
        _copy_whole(model, mesh, src_data_rank)
    split = {name for name, _, _ in found} | others.keys()
    return [name for name, _ in model.named_modules() if name in split]


def _check_mesh(mesh: Any) -> None:
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh: expected a DeviceMesh, got {type(mesh).__name__}")
    _collectives.check_mesh("mesh", mesh, which=-1)


def _agreed(found: list[tuple[str, Any, _Style]], mesh: DeviceMesh, **more: Any) -> None:
    """The checks of all layers on all ranks, which raise if one does or if they differ, in facts of `more`, too."""
    _check_mesh(mesh)
    problem: Exception | None = None
    facts: dict[str, Any] = more
    try:
        if not found:
            raise ValueError(
                "model: expected layers made by convert (mlp='cats', attention='lawcat', 'sink' or 'superlinear'), got none"
            )
        for name, module, style in found:
            try:
                style.check(module, mesh)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            facts |= {f"{name}: {fact}": value for fact, value in style.facts(module).items()}
    except ValueError as error:
        problem = error
    try:
        agree(mesh, problem=None if problem is None else str(problem), **facts)
    except ValueError:
        if problem is None:
            raise
    if problem is not None:
        raise problem


@torch.no_grad()
def _copy_whole(model: nn.Module, mesh: DeviceMesh, source: int) -> None:
    """What stays whole is the same on all ranks, as of DDP."""
    for tensor in dict.fromkeys([*model.parameters(), *model.buffers()]):
        if not sharded(tensor) and not tensor.is_meta:
            _collectives.broadcast(tensor.data, source, mesh.get_group())
