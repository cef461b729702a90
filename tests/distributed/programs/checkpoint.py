"""torchrun --nproc-per-node 3 checkpoint.py FOLDER: what parallel.py saved on four ranks, loaded in three other ways."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import LIMIT, begin, claim, end, error, holds
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training import built, optimizer_of

import subquad.distributed as sd


def spread(model: Any, how: str) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("all",))
    if how == "FSDP2":
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif how == "heads and neurons":
        sd.parallelize(model, mesh)
    return model


def main() -> None:
    begin()
    folder = sys.argv[1]
    answers = torch.load(f"{folder}/answers.pt")
    for how in ("FSDP2", "heads and neurons", "whole"):
        model = built(seed=1)
        for layer in model.model.layers:
            layer.mlp.set_threshold(torch.zeros_like(layer.mlp.threshold))  # the shapes are known, the values come
        spread(model, how)
        optimizer = optimizer_of(model)
        state, momenta = get_state_dict(model, optimizer)
        extra = {
            "number": torch.zeros(()),
            "count": torch.zeros((), dtype=torch.int64),
            "half": torch.zeros(5).bfloat16(),
        }
        dcp.load({"model": state, "optim": momenta, "extra": extra}, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=momenta)
        exact = float(extra["number"]) == float(torch.tensor(0.1)) and int(extra["count"]) == 2**40 + 1
        exact &= torch.equal(extra["half"], torch.full((5,), 0.3).bfloat16())
        mlps = [layer.mlp for layer in model.model.layers]
        exact &= [m.threshold.dtype for m in mlps] == [torch.float32] * 3 and int(mlps[1].cats_meta[2]) == 2**24 + 2
        holds(f"{how}: dtypes and values are exact", exact)
        found = {name: optimizer.state[p]["exp_avg_sq"] for name, p in model.named_parameters()}
        worst = max(error(found[name], momentum) for name, momentum in answers["momenta"].items())
        claim(f"{how}: the optimizer's state", worst, 2 * LIMIT)  # squares
        with torch.no_grad():  # after which FSDP leaves some parameters whole
            claim(f"{how}: logits", error(model(answers["ids"], use_cache=False).logits, answers["logits"]), LIMIT)
            few = model(answers["ids"][:1, :2], use_cache=False).logits
            claim(f"{how}: few tokens", error(few, answers["few"]), LIMIT)
    end()


if __name__ == "__main__":
    main()
