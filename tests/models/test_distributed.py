"""Converted models in two processes: what DDP and FSDP2 average, shard and must not lose. Each case is a program of its own."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.heavy
RANKS = 2
CASES: dict[str, Callable[[int], None]] = {}


def case(function: Callable[[int], None]) -> Callable[[int], None]:
    CASES[function.__name__] = function
    return function


def build(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    from subquad.integrations.transformers import convert

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=60, initializer_range=0.2))
    convert(model, **options)
    return model


def tokens(rank: int) -> torch.Tensor:
    return torch.randint(60, (2, 11), generator=torch.Generator().manual_seed(rank))


def transferred(model: nn.Module, module: nn.Module, ids: torch.Tensor, layer_local: bool) -> list[torch.Tensor]:
    """Gradients of what stage one trains, after one step through `module`."""
    import subquad

    with subquad.attention_transfer(module, layer_local=layer_local) as transfer:
        module(input_ids=ids, use_cache=False)
        loss = transfer.loss()
        if not layer_local:
            loss.backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


def alone(model: nn.Module, ranks: range, layer_local: bool = False) -> list[torch.Tensor]:
    """The mean of the gradients of these ranks, in one process."""
    grads = []
    for rank in ranks:
        copied = copy.deepcopy(model)
        grads.append(transferred(copied, copied, tokens(rank), layer_local))
    return [torch.stack(parts).mean(0) for parts in zip(*grads, strict=True)]


def refused(match: str, function: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=match):
        function()


@case
def ddp(rank: int) -> None:
    from torch.nn.parallel import DistributedDataParallel

    import subquad

    model = build(attention="lawcat")
    subquad.trainable_parameters(model, stage=1)
    want, own = alone(model, range(RANKS)), alone(model, range(rank, rank + 1), layer_local=True)
    unused = DistributedDataParallel(model, find_unused_parameters=True)
    refused("find_unused_parameters: expected False", lambda: transferred(model, unused, tokens(rank), False))
    model.zero_grad()
    wrapped = DistributedDataParallel(model)
    for module in (wrapped, model):  # the transfer may be told of either
        refused("layer_local: expected False under DDP", lambda m=module: run(m, wrapped, rank, True))
    torch.testing.assert_close(run(model, wrapped, rank, False), want)
    model.zero_grad()
    with wrapped.no_sync():
        torch.testing.assert_close(run(model, wrapped, rank, True), own)


def run(told: nn.Module, wrapped: nn.Module, rank: int, layer_local: bool) -> list[torch.Tensor]:
    import subquad

    with subquad.attention_transfer(told, layer_local=layer_local) as transfer:
        wrapped(input_ids=tokens(rank), use_cache=False)
        loss = transfer.loss()
        if not layer_local:
            loss.backward()
    return [p.grad for p in wrapped.parameters() if p.requires_grad]


@case
def fsdp_transfer(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    import subquad

    model = build(attention="lawcat")
    new = subquad.trainable_parameters(model, stage=1)
    want = alone(model, range(rank, rank + 1))
    for whole in (False, True):  # the layers, or the model as one unit, which stays gathered after a forward
        inside, outside = copy.deepcopy(model), copy.deepcopy(model)
        for other, ignored in ((inside, set()), (outside, {p for n, p in outside.named_parameters() if n in new})):
            for layer in [] if whole else other.model.layers:
                fully_shard(layer, ignored_params=ignored)
            fully_shard(other, ignored_params=ignored)
            other(tokens(rank), use_cache=False)
        for layer_local in (False, True):
            message = "outside FSDP .* inside, first 'model.layers.0.self_attn"
            refused(message, lambda m=inside, y=layer_local: transferred(m, m, tokens(rank), y))
            outside.zero_grad()
            torch.testing.assert_close(transferred(outside, outside, tokens(rank), layer_local), want)


@case
def fsdp_cats(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    from subquad.integrations.transformers import CatsConfig, convert

    one = build(mlp=CatsConfig(threshold=0.05, down_layout="keep"))
    sharded = copy.deepcopy(one)
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    refused(
        "model.layers.0.mlp: .*: expected a whole parameter, got a DTensor", lambda: convert(shard_dense(), mlp="cats")
    )
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (one, sharded)]
    for _ in range(3):
        for model, optimizer in zip((one, sharded), optimizers, strict=True):
            optimizer.zero_grad()
            ranks = range(RANKS) if model is one else [rank]
            sum(model(tokens(r), labels=tokens(r)).loss for r in ranks).div(len(ranks)).backward()
            optimizer.step()
        with torch.no_grad():  # few tokens, through the sparse kernels, of weights that have just been stepped
            few = tokens(7)[:1, :6]
            torch.testing.assert_close(sharded(few).logits, one(few).logits, rtol=1e-3, atol=1e-3)


def shard_dense() -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    from subquad.integrations.transformers import revert

    model = build(mlp="cats")
    revert(model)
    for layer in model.model.layers:
        fully_shard(layer)
    return model


@pytest.mark.parametrize("name", ["ddp", "fsdp_transfer", "fsdp_cats"])
def test_in_two_processes(name: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    command = [sys.executable, __file__, name]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0 and result.stdout.count("passed") == RANKS, result.stdout + result.stderr


def _process(rank: int, name: str, store: str) -> None:
    import os

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    with contextlib.suppress(ImportError):
        import transformers

        transformers.logging.set_verbosity_error()
    CASES[name](rank)
    torch.distributed.barrier()
    print("passed", flush=True)
    torch.distributed.destroy_process_group()
    os._exit(0)  # a device mesh may abort when the interpreter ends


if __name__ == "__main__":
    folder = tempfile.mkdtemp()
    torch.multiprocessing.spawn(_process, (sys.argv[1], str(Path(folder) / "store")), nprocs=RANKS)
