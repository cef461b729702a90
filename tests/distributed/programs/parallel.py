"""torchrun --nproc-per-node 4 parallel.py FOLDER: FSDP2, DDP and a mesh of sequence, heads and FSDP2; a checkpoint in FOLDER."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import LIMIT, begin, claim, end, error, holds
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import built, furthest, optimizer_of, tokens

import subquad.distributed as sd

STEPS = 2


def sharded(model: Any, mesh: DeviceMesh) -> Any:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> torch.Tensor:
    """Losses of the steps."""
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def data_parallel(one: Any) -> None:
    """A batch over four ranks, beside one process with all of it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    ids = tokens(size, 16)
    mine, whole = ids[rank : rank + 1], copy.deepcopy(one)
    expected = trained(whole, optimizer_of(whole), ids)
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("fsdp",))
    recomputed = copy.deepcopy(one).train()
    recomputed.gradient_checkpointing_enable({"use_reentrant": False})
    for name, model in (
        ("FSDP2", sharded(copy.deepcopy(one), mesh)),
        ("FSDP2, activation checkpointing", sharded(recomputed, mesh)),
        ("DDP", DistributedDataParallel(copy.deepcopy(one))),
    ):
        losses = trained(model, optimizer_of(model), mine)  # the optimizer is made before the first forward
        dist.all_reduce(losses)
        claim(f"{name}: losses", error(losses / size, expected), LIMIT)
        claim(f"{name}: parameters", furthest(getattr(model, "module", model), whole), LIMIT)
        with torch.no_grad():
            claim(f"{name}: few tokens", error(model(ids[:1, :2]).logits, whole(ids[:1, :2]).logits), LIMIT)


def three_dimensions(one: Any, folder: str) -> None:
    """The sequence over cp, heads and neurons over tp, parameters over cp by FSDP2, activations checkpointed."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    ids = tokens(2, 32)
    layout = sd.SequenceLayout.zigzag(ids.shape[1], group=mesh["cp"])
    whole, model = copy.deepcopy(one), copy.deepcopy(one)
    optimizer = optimizer_of(whole)
    expected = trained(whole, optimizer, ids)
    sd.parallelize(model, mesh["tp"])
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    sharded(model, mesh["cp"])
    for module in model.modules():
        if isinstance(module, FSDPModule):  # ranks of cp hold parts of a sum, not samples of a mean
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    own = optimizer_of(model)
    losses = []
    for _ in range(STEPS):
        with sd.context_parallel(layout):
            out = model(
                layout.shard(ids),
                position_ids=layout.positions(restart=True)[None].expand(2, -1),
                labels=layout.shard(ids),
                shift_labels=layout.labels(ids),
                num_items_in_batch=torch.tensor(2 * (ids.shape[1] - 1)),
                use_cache=False,
            )
        out.loss.backward()
        own.step()
        own.zero_grad()
        losses.append(out.loss.detach())
    total = torch.stack(losses)
    dist.all_reduce(total, group=mesh["cp"].get_group())
    claim("sequence x heads x FSDP2: losses", error(total, expected), LIMIT)
    claim("sequence x heads x FSDP2: parameters", furthest(model, whole), LIMIT)
    weight = model.model.layers[0].mlp.down_proj.weight
    holds("sequence x heads x FSDP2: a weight lies over both", weight.to_local().numel() * 4 == weight.numel())
    state, momenta = get_state_dict(model, own)
    extra = {"number": torch.tensor(0.1), "count": torch.tensor(2**40 + 1), "half": torch.full((5,), 0.3).bfloat16()}
    dcp.save({"model": state, "optim": momenta, "extra": extra}, checkpoint_id=folder)
    if dist.get_rank() == 0:
        with torch.no_grad():
            answers = {"logits": whole(ids, use_cache=False).logits, "few": whole(ids[:1, :2], use_cache=False).logits}
        named = {name: optimizer.state[p]["exp_avg_sq"] for name, p in whole.named_parameters()}
        torch.save({"ids": ids, "momenta": named} | answers, f"{folder}/answers.pt")


def main() -> None:
    begin()
    one = built()
    data_parallel(one)
    three_dimensions(one, sys.argv[1])
    end()


if __name__ == "__main__":
    main()
