"""torchrun --nproc-per-node N models.py: tiny models on shards against one process: logits, loss, every gradient."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import LIMIT, begin, claim, end, error, holds, same
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

import subquad
import subquad.distributed as sd
from subquad.integrations.transformers import convert, register

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 96, "pad_token_id": 0, "attn_implementation": "subquad",
}  # fmt: skip


def case(name: str, model: PreTrainedModel, layout: sd.SequenceLayout, mask: torch.Tensor | None = None) -> None:
    model.train()
    batch = 1 if layout.packed else 2
    ids = torch.randint(1, 96, (batch, layout.tokens), generator=torch.Generator().manual_seed(1))
    cu = layout.cu_seqlens
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    shifted[:, [b - 1 for b in cu[1:]]] = -100
    if mask is not None:
        shifted = shifted.masked_fill(~mask.bool(), -100)
    count = (shifted != -100).sum()

    def alone(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Logits, loss and gradients of one process."""
        model.zero_grad()
        if layout.packed:  # every document alone
            logits = torch.cat([model(ids[:, a:b], use_cache=False).logits for a, b in itertools.pairwise(cu)], 1)
        else:
            logits = model(ids, attention_mask=mask, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), ignore_index=-100, reduction="sum") / count
        loss.backward()
        wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return logits, loss, wanted

    @functools.cache
    def exact() -> dict[str, torch.Tensor]:
        with subquad.use_backend("reference"):
            return alone(copy.deepcopy(model).double())[2]

    logits, loss, wanted = alone(model)
    positions = layout.positions(restart=True)[None].expand(batch, -1)
    if mask is not None:
        positions = layout.shard((mask.cumsum(1) - 1).clamp_min(0))
    with sd.context_parallel(layout):
        out = model(
            layout.shard(ids),
            attention_mask=mask,
            position_ids=positions,
            labels=layout.shard(ids),
            shift_labels=layout.shard(shifted) if mask is not None else layout.labels(ids),
            num_items_in_batch=count,
            use_cache=False,
        )
    out.loss.backward()  # outside: nothing of the backward looks for the layout
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
    total = out.loss.detach().clone()
    dist.all_reduce(total)
    there = slice(None) if mask is None else layout.shard(mask).bool()
    claim(f"{name}: logits", error(out.logits[there], layout.shard(logits)[there], logits), LIMIT)
    claim(f"{name}: loss", abs(float(total) / float(loss.detach()) - 1), 1e-6)
    found = {n: p.grad for n, p in model.named_parameters() if n in wanted}
    far = [n for n in found if not same(found[n], wanted[n], lambda n=n: exact()[n])]
    holds(f"{name}: gradients of {len(found)} parameters but {far}", not far)


def hybrid(**options: Any) -> PreTrainedModel:
    """LAWCAT, softmax, LAWCAT; away from where a conversion starts, so that taps and gates matter."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    convert(model, attention="lawcat", layers=[0, 2], **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def refused(name: str, message: str, run: Any) -> None:
    try:
        run()
        found = "nothing"
    except (RuntimeError, ValueError) as problem:
        found = str(problem)
    holds(f"refused: {name}", message in found)


def main() -> None:
    begin()
    register()
    size = dist.get_world_size()
    tokens, cu = 24 * size, [0, 11, 30, 31, 24 * size]
    lengths = [tokens - 10 * (size - 1), *[10] * (size - 1)]
    line, uneven = sd.SequenceLayout.contiguous(tokens), sd.SequenceLayout.contiguous(tokens, lengths=lengths)
    zigzag, packed = sd.SequenceLayout.zigzag(tokens), sd.SequenceLayout.zigzag(tokens, cu_seqlens=cu)
    torch.manual_seed(0)
    llama, mistral = (
        LlamaForCausalLM(LlamaConfig(**SIZES)),
        MistralForCausalLM(MistralConfig(**SIZES, sliding_window=12)),
    )
    case("Llama, uneven", llama, uneven)
    case("Llama, packed zigzag", llama, packed)
    case("Mistral, window, zigzag", mistral, zigzag)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    experts: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": kinds}
    oss = GptOssForCausalLM(GptOssConfig(**SIZES, sliding_window=12, **experts))
    with torch.no_grad():
        for layer in oss.model.layers:
            layer.self_attn.sinks.copy_(4 * torch.randn(4))  # sinks that matter
    case("gpt-oss, sink logits, zigzag", oss, zigzag)
    lawcat = hybrid()
    case("LAWCAT hybrid, contiguous", lawcat, line)
    case("LAWCAT hybrid, packed zigzag", lawcat, packed)
    left = torch.ones(2, tokens, dtype=torch.long)
    left[0, :17], left[1, -5:] = 0, 0
    case("Llama, padding", llama, uneven, left)
    case("LAWCAT hybrid, padding", lawcat, uneven, left)
    shipped = hybrid(window_size=9, linear_covers_window=False, linear_scale=1.0, tie_qk_feature_map=False)
    case("LAWCAT with a window and what is before it, packed zigzag", shipped, packed)
    case(
        "LAWCAT, conv on v, output gate",
        hybrid(conv_on_v=True, use_output_gate=True, gate="scalar", share_kv_features=True),
        line,
    )
    lawcat.gradient_checkpointing_enable({"use_reentrant": False})
    case("LAWCAT hybrid, activation checkpointing", lawcat, zigzag)
    ids = torch.ones(1, line.lengths[line.rank], dtype=torch.long)
    llama.eval()

    def inside(model: PreTrainedModel, **options: Any) -> Any:
        def run() -> None:
            with sd.context_parallel(line):
                model(ids, **({"use_cache": False} | options))

        return run

    sdpa = LlamaForCausalLM(LlamaConfig(**(SIZES | {"attn_implementation": "sdpa"})))
    refused("another attention", "context_parallel: no model asked for its mask", inside(sdpa))
    refused("a short mask", "attention_mask: expected shape [1,", inside(llama, attention_mask=torch.zeros_like(ids)))
    sinks = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    convert(sinks, attention="sink", sink_tokens=2, window=8)
    refused("a layer without", "cannot attend to tokens that lie on several ranks", inside(sinks))
    end()


if __name__ == "__main__":
    main()
