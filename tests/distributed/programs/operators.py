"""torchrun --nproc-per-node N operators.py: what the threaded group of the other tests does not have, on gloo processes.

Every rank draws the same tensors and computes the answer of one process by itself. A line for each claim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from common import LIMIT, begin, end, holds, same

import subquad
import subquad.distributed as sd
from subquad import IntervalMask


def close(found: torch.Tensor, whole: torch.Tensor, layout: sd.SequenceLayout, limit: float = LIMIT) -> bool:
    """Of this rank's part, to the largest of the whole."""
    return bool(((found - layout.shard(whole)).abs() <= limit * float(whole.detach().abs().max())).all())


def linear(layout: sd.SequenceLayout, tensors: list[torch.Tensor], method: str) -> list[torch.Tensor]:
    local = [layout.shard(x).requires_grad_() for x in tensors]
    o, state = sd.gated_linear_attention(*local, layout=layout, method=method, normalize=True, output_final_state=True)
    assert isinstance(state, tuple)
    return [o.detach(), *(x.detach() for x in state), *torch.autograd.grad(o.square().sum(), local)]


def alone(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients of one process."""
    given = [x.clone().requires_grad_() for x in tensors]
    o, _ = subquad.gated_linear_attention(*given, normalize=True)
    return [o.detach(), *torch.autograd.grad(o.square().sum(), given)]


def exchanges() -> None:
    """The ring, too, and the same bits in all of them and in repeated calls."""
    tokens = 61
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.rand(2, tokens, heads, 8, generator=generator) for heads in (4, 2, 2, 2)]
    tensors[3] = -0.2 * tensors[3]
    one = alone(tensors)
    with subquad.use_backend("reference"):
        exact = alone([x.double() for x in tensors])
    for name, lengths in {
        "equal": None,
        "uneven": [tokens - 7 * (dist.get_world_size() - 1), *[7] * (dist.get_world_size() - 1)],
    }.items():
        layout = sd.SequenceLayout.contiguous(tokens, lengths=lengths)
        found = {method: linear(layout, tensors, method) for method in ("all_gather", "scan", "ring")}
        again = linear(layout, tensors, "ring")
        for method in ("scan", "ring"):
            equal = all(torch.equal(a, b) for a, b in zip(found["all_gather"], found[method], strict=True))
            holds(f"{name}: {method} has the bits of all_gather", equal)
        holds(
            f"{name}: a ring repeats its bits",
            all(torch.equal(a, b) for a, b in zip(found["ring"], again, strict=True)),
        )
        ring = [layout.unshard(x) for i, x in enumerate(found["ring"]) if i not in (1, 2)]
        near = [same(x, one[i], lambda i=i: exact[i]) for i, x in enumerate(ring)]
        holds(f"{name}: a ring is one process", all(near))


def ring_of_keys() -> None:
    """Attention whose keys come by real messages between two ranks; one that is left out or out of order would hang."""
    size, generator = dist.get_world_size(), torch.Generator().manual_seed(2)
    tokens, limit = 61, 1.3e-6
    shapes = ((2, tokens, 4, 8), (2, tokens, 2, 8), (2, tokens, 2, 5), (2, tokens))
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    w = torch.randn(2, tokens, 4, 5, generator=generator)
    tensors.append(torch.tensor([10.0, -10.0, 3.0, 0.0]))
    packed = IntervalMask.packed(torch.tensor([0, 9, 40, 41, tokens]))
    for name, layout, mask in (
        ("zigzag, causal", sd.SequenceLayout.zigzag(tokens), IntervalMask.causal()),
        ("uneven, full", sd.SequenceLayout.contiguous(tokens, lengths=[30, *[1] * (size - 2), 33 - size]), IntervalMask.full()),
        ("even, a window", sd.SequenceLayout.contiguous(tokens), IntervalMask.sink(3, 9)),
        ("zigzag, packed", sd.SequenceLayout.zigzag(tokens), packed),
    ):  # fmt: skip
        whole = [x.clone().requires_grad_() for x in tensors]
        out: Any = subquad.interval_attention(*whole[:3], mask, key_bias=whole[3], sink_logits=whole[4])
        grads = torch.autograd.grad((out * w).sum(), whole)
        found = []
        for _ in range(2):
            local = [*(layout.shard(x) for x in tensors[:4]), tensors[4].clone()]
            local = [x.requires_grad_() for x in local]
            options: Any = {"key_bias": local[3], "sink_logits": local[4], "layout": layout, "method": "ring"}
            o: Any = sd.interval_attention(*local[:3], mask, **options)
            found.append([o.detach(), *torch.autograd.grad((o * layout.shard(w)).sum(), local)])
        same = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        dist.all_reduce(found[0][5])
        near = [close(a, b, layout, limit) for a, b in zip(found[0][:5], (out, *grads[:4]), strict=True)]
        near.append(bool((found[0][5] - grads[4]).abs().max() <= 2 * limit * grads[4].abs().max()))
        holds(f"keys around a ring: {name}", same and all(near))


def meshes() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    layout = sd.SequenceLayout.zigzag(40, group=mesh["cp"])
    q, k, v = (torch.randn(1, 40, 2, 8, generator=torch.Generator().manual_seed(s)) for s in range(3))
    mask = IntervalMask.sink(2, 7)
    found: Any = sd.interval_attention(*(layout.shard(x) for x in (q, k, v)), mask, layout=layout)
    whole: Any = subquad.interval_attention(q, k, v, mask)
    holds("a mesh of one dimension is a group", close(found, whole, layout))
    wide = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "cp"))
    try:
        sd.SequenceLayout.zigzag(40, group=wide)
        message = "nothing"
    except ValueError as error:
        message = str(error)
    holds("a mesh of two is refused", "pass mesh['dp']" in message)


def differ() -> None:
    rank = dist.get_rank()
    layout = sd.SequenceLayout.contiguous(8 * dist.get_world_size())
    x = torch.ones(1, 8 if rank else 5, 4)  # rank 0 is wrong
    try:
        sd.causal_conv1d(x, torch.ones(4, 3), layout=layout)
        message = "nothing"
    except ValueError as error:
        message = str(error)
    holds("one wrong rank raises on all", "x: expected 8 tokens as the layout gives rank 0, got 5" in message)
    y = sd.causal_conv1d(torch.ones(1, 8, 4), torch.ones(4, 3), layout=layout)
    holds("and the group works afterwards", bool((y[:, 2:] == 3).all()))


def decoding() -> None:
    """A sharded prompt, then steps."""
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 40, heads, 8, generator=generator) for heads in (4, 2, 2))
    layout, sinks = sd.SequenceLayout.zigzag(30), torch.tensor([8.0, -8.0, 0.0, 3.0])
    cache = sd.ShardedSinkKVCache(2, 2, 8, sink_tokens=3, window=9, sink_logits=sinks)
    sd.hand_over(cache, layout.shard(k[:, :30]), layout.shard(v[:, :30]), layout=layout)
    mask = IntervalMask.sink(3, 9)
    whole: Any = subquad.interval_attention(q, k, v, mask, sink_logits=sinks)
    steps = [cache.step(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1])[0] for t in range(30, 40)]
    holds("keys by tokens", bool((torch.cat(steps, 1) - whole[:, 30:]).abs().max() <= LIMIT * whole.abs().max()))
    width = 4 * size
    q, k = (torch.rand(2, 40, heads, width, generator=generator) for heads in (4, 1))
    v = v[:, :, :1].contiguous()
    o, _ = subquad.gated_linear_attention(q, k, v, normalize=True)
    shards = (layout.shard(x[:, :30]) for x in (q, k, v))
    _, pair = sd.gated_linear_attention(*shards, layout=layout, normalize=True, output_final_state=True)
    s, z = sd.final_state(pair, layout=layout)  # type: ignore[misc, arg-type]
    state = torch.cat([s, z[..., None]], -1)[:, :, 4 * rank : 4 * rank + 4].contiguous()
    steps = [
        sd.gated_linear_attention_step(q[:, t], k[:, t], v[:, t], None, state, normalize=True) for t in range(30, 40)
    ]
    holds("states by channels", bool((torch.stack(steps, 1) - o[:, 30:]).abs().max() <= LIMIT * o.abs().max()))


def main() -> None:
    begin()
    exchanges()
    ring_of_keys()
    differ()
    meshes()
    decoding()
    end()


if __name__ == "__main__":
    main()
