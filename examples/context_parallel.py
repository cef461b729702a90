"""One long document on several processes: a small model with LAWCAT and sliding-window layers, trained as if it were in one.

    torchrun --nproc-per-node 2 examples/context_parallel.py             # half a minute, on a CPU
    torchrun --nproc-per-node 2 examples/context_parallel.py --quick     # seconds: fewer tokens and steps

Every process holds its part of the document alone: tokens, activations, loss. Layers send what their mathematics needs:
a window fetches the keys before its first row, a LAWCAT layer a few tokens for its convolutions and one state. The first process
then trains the same model on the whole document by itself; the two loss curves are the same.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

import subquad.distributed as sd
from subquad.integrations.transformers import convert, register

CLOSE = 1e-4  # of the losses of the two curves, which rounding drives apart step by step


def made() -> PreTrainedModel:
    """The same on every process: LAWCAT, window, LAWCAT, window."""
    register()
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=64, attn_implementation="subquad",
    )  # fmt: skip
    model = MistralForCausalLM(config)
    convert(model, attention="lawcat", layers=[0, 2])
    return model.train()


def document(tokens: int) -> torch.Tensor:
    """Bytes [1, tokens] of the Python reference manual."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    return torch.tensor(list(text[:tokens]), dtype=torch.long)[None]


def sharded(ids: torch.Tensor, steps: int) -> list[float]:
    """Losses of the whole document; every process has its part of it."""
    layout = sd.SequenceLayout.zigzag(ids.shape[1])
    model = made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    mine, labels = layout.shard(ids), layout.labels(ids)
    positions, count = layout.positions(restart=True)[None], torch.tensor(ids.shape[1] - 1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with sd.context_parallel(layout):
            out = model(
                mine,
                position_ids=positions,
                labels=mine,
                shift_labels=labels,
                num_items_in_batch=count,
                use_cache=False,
            )
        out.loss.backward()
        for parameter in model.parameters():  # as DDP or FSDP2 would, but summed: the loss is a sum over processes
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
        optimizer.step()
        total = out.loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total))
    return losses


def alone(ids: torch.Tensor, steps: int) -> list[float]:
    """The same in one process."""
    model = made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer tokens and steps")
    parser.add_argument("--tokens", type=int, help="of the document (default: 2048, quick 512)")
    parser.add_argument("--steps", type=int, help="of the training (default: 12, quick 4)")
    given = parser.parse_args()
    for name, quick, full in (("tokens", 512, 2048), ("steps", 4, 12)):
        if getattr(given, name) is None:
            setattr(given, name, quick if given.quick else full)
        if getattr(given, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(given, name)}")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    ids = document(given.tokens)
    many = sharded(ids, given.steps)
    worst = 0.0
    if dist.get_rank() == 0:
        one = alone(ids, given.steps)
        print(f"{given.tokens} tokens, {dist.get_world_size()} processes\n step   sharded     alone")
        for i, (a, b) in enumerate(zip(many, one, strict=True)):
            print(f"{i:5d}  {a:8.5f}  {b:8.5f}")
        worst = max(abs(a - b) for a, b in zip(many, one, strict=True))
        print(f"largest difference {worst:.1e}; the curves are {'the same' if worst < CLOSE else 'NOT the same'}")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(worst >= CLOSE)  # gloo's threads end some processes with an abort while Python unwinds


if __name__ == "__main__":
    main()
