"""Give a pretrained model linear attention: LAWCAT's distillation on SmolLM2-135M, on a CPU, from packages alone.

    python examples/distill_lawcat.py --quick     # two or three minutes on two cores: a demonstration of the machinery
    python examples/distill_lawcat.py             # an hour: the distillation in examples/distill, checkpoints and all
    torchrun --nproc-per-node 2 examples/distill_lawcat.py    # the same with a thread for each of two texts at a time

In short: every softmax layer gets a LAWCAT layer that shares its projections. The new parameters (convolutions, feature maps,
gates: 2 % of the model) learn to say what the softmax layer says, layer by layer, and then, for a few steps, to predict the next
token together. Two models come out: all layers linear, and a hybrid that keeps some softmax layers. Both are saved, loaded again,
judged by perplexity on held-out text, and generate; where all layers are linear, with a memory that does not grow.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import subquad
from subquad.demo.model import DemoError, cache_name, load, texts, windows
from subquad.integrations.transformers import LawcatConfig, convert, revert

CONFIG = LawcatConfig()
PROMPT = "The Python interpreter"
FALL = 3.0  # what the loss of the median layer must fall by, held-out text
console = Console()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small demonstration; the options below it are for it")
    quick = parser.add_argument_group("with --quick")
    quick.add_argument("--steps", type=int, default=40, help="of attention transfer (default: 40)")
    quick.add_argument("--finetune", type=int, default=8, help="steps on the next token (default: 8)")
    quick.add_argument("--length", type=int, default=256, help="tokens of a step (default: 256)")
    quick.add_argument(
        "--keep", type=int, default=5, help="every how many layers the hybrid keeps softmax (default: 5)"
    )
    whole = parser.add_argument_group("without")
    whole.add_argument("--minutes", type=float, default=60, help="wall time of the training (default: 60)")
    whole.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    whole.add_argument("--texts", type=Path, default=Path("demo/texts"), help="folder of the books' archives")
    whole.add_argument("--seed", type=int, default=0)
    whole.add_argument(
        "--export",
        action="store_true",
        help="write examples/weights from the last checkpoint, measure, and train nothing",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo/lawcat"), help="folder for checkpoints and report.json"
    )
    return parser.parse_args()


def batches(ids: Sequence[torch.Tensor], count: int, label: str) -> Iterator[torch.Tensor]:
    """`count` windows, in a fixed random order, again and again, with a progress bar."""
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).tolist()
    for step in track(range(count), description=label, console=console, disable=not console.is_terminal):
        yield ids[order[step % len(ids)]]


def layer_losses(model: nn.Module, heldout: Sequence[torch.Tensor]) -> dict[str, float]:
    """Transfer loss of every layer, mean over held-out windows."""
    sums: dict[str, float] = {}
    with torch.no_grad(), subquad.attention_transfer(model) as transfer:
        for ids in heldout:
            model.model(ids, use_cache=False)
            for name, loss in transfer.losses.items():
                sums[name] = sums.get(name, 0.0) + loss.item() / len(heldout)
            transfer.loss()
    return sums


@torch.no_grad()
def perplexity(model: nn.Module, heldout: Sequence[torch.Tensor]) -> float:
    losses = [F.cross_entropy(model(ids, use_cache=False).logits[0, :-1].float(), ids[0, 1:]) for ids in heldout]
    return math.exp(torch.stack(losses).mean())


def transfer(model: nn.Module, ids: Sequence[torch.Tensor], steps: int) -> None:
    """Stage one: every layer against the softmax it replaces, at the learning rate of LoLCATs, falling to zero."""
    parameters = list(subquad.trainable_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=max(steps, 1), pct_start=0.1)
    with subquad.attention_transfer(model, layer_local=True) as at:
        for batch in batches(ids, steps, "attention transfer"):
            model.model(batch, use_cache=False)
            at.loss()
            for parameter in parameters:  # layers are independent, and so is what bounds their steps
                nn.utils.clip_grad_norm_([parameter], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def finetune(model: nn.Module, ids: Sequence[torch.Tensor], steps: int, label: str) -> None:
    """Stage two, small: the new parameters together, on the next token."""
    parameters = list(subquad.trainable_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 1), pct_start=0.1)
    for batch in batches(ids, steps, f"next token, {label}"):
        logits = model(batch, use_cache=False).logits
        F.cross_entropy(logits[0, :-1].float(), batch[0, 1:]).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def new_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters that conversion added: all that a checkpoint needs beside the pretrained model."""
    return {name: p.detach().clone() for name, p in subquad.trainable_parameters(model).items()}


def memory(cache: Any) -> int:
    """Bytes that a cache holds, keys and values of softmax layers included."""
    tensors: list[torch.Tensor] = []
    for layer in cache.layers:
        state = getattr(layer, "state", None)
        tensors += [layer.keys, layer.values] if state is None else state.tensors().values()
    return sum(x.numel() * x.element_size() for x in tensors)


@torch.no_grad()
def generate(model: nn.Module, tokenizer: Any, new: int) -> dict[str, Any]:
    """Greedy text, and the bytes of its cache after a quarter of it and at the end."""
    token = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    name = cache_name(model)
    cache, ids, sizes = None, [], []
    start = time.perf_counter()
    for step in range(new):
        out = model(token, use_cache=True, logits_to_keep=1, **{name: cache})
        cache, token = out[name], out.logits[:, -1:].argmax(-1)
        ids.append(int(token))
        if step in (new // 4, new - 1):
            sizes.append(memory(cache))
    seconds = time.perf_counter() - start
    return {"text": tokenizer.decode(ids), "cache_bytes": sizes, "tokens_per_second": new / seconds}


def reloaded(softmax_layers: Sequence[int], path: Path) -> nn.Module:
    """The model from its pretrained weights and a checkpoint."""
    model = load("cpu", "float32").model
    layers = [i for i in range(model.config.num_hidden_layers) if i not in softmax_layers]
    convert(model, attention=CONFIG, layers=layers)
    result = model.load_state_dict(torch.load(path, weights_only=True), strict=False)
    if result.unexpected_keys:
        raise RuntimeError(f"{path}: unexpected {result.unexpected_keys[:3]}")
    return model.eval()


def main() -> int:
    args = arguments()
    if not args.quick:
        from distill.run import run  # beside this file

        run(args, console)
        return 0
    torch.manual_seed(0)
    args.output.mkdir(parents=True, exist_ok=True)
    subject = load("cpu", "float32")
    model, tokenizer = subject.model, subject.tokenizer
    backend = subquad.backends()["gated_linear_attention"]["cpu"]["native"]
    if backend != "available":
        subquad.gated_linear_attention(*torch.zeros(3, 1, 1, 1, 8), backend="native")  # compiles the kernels once
    train_text, heldout_text = texts()
    ids = windows(tokenizer, train_text, 64 * args.length, args.length, "cpu")
    heldout = windows(tokenizer, heldout_text, 4 * args.length, args.length, "cpu")
    count = model.config.num_hidden_layers
    kept = [i for i in range(count) if i % args.keep == args.keep // 2]
    report: dict[str, Any] = {
        "model": subject.name,
        "steps": args.steps,
        "finetune": args.finetune,
        "length": args.length,
    }
    rows: list[tuple[str, float, dict[str, Any]]] = [
        ("softmax", perplexity(model, heldout), generate(model, tokenizer, 64))
    ]

    converted = convert(model, attention=CONFIG)
    console.print(
        f"{len(converted)} layers converted, {converted.new_parameters:,} new parameters beside "
        f"{converted.shared_parameters:,} shared ones; the hybrid keeps softmax in layers {kept}"
    )
    before = layer_losses(model, heldout)
    rows.append(("all linear, untrained", perplexity(model, heldout), {}))
    start = time.perf_counter()
    transfer(model, ids, args.steps)
    report["transfer_seconds"] = time.perf_counter() - start
    after = layer_losses(model, heldout)
    falls = [before[name] / after[name] for name in before]
    report["layers"] = {name: {"before": before[name], "after": after[name]} for name in before}
    middle = sorted(falls)[count // 2]
    console.print(
        f"loss per layer falls by {min(falls):.1f} to {max(falls):.1f}, median {middle:.1f} (at least {FALL} expected), "
        f"in {args.steps} steps of {args.length} tokens, {report['transfer_seconds']:.0f} s"
    )
    transferred = new_state(model)
    rows.append(("all linear, transferred", perplexity(model, heldout), {}))
    passed = middle >= FALL
    for label, softmax_layers in (("all linear", []), ("hybrid", kept)):
        model.load_state_dict(transferred, strict=False)
        if softmax_layers:
            revert(model)
            convert(model, attention=CONFIG, layers=[i for i in range(count) if i not in softmax_layers])
            model.load_state_dict(transferred, strict=False)
            rows.append(("hybrid, transferred", perplexity(model, heldout), {}))
        finetune(model, ids, args.finetune, label)
        path = args.output / f"{label.replace(' ', '_')}.pt"
        torch.save(new_state(model), path)
        again = reloaded(softmax_layers, path)
        with torch.no_grad():
            same = torch.equal(again(heldout[0]).logits, model(heldout[0]).logits)
        console.print(f"{path}: {'the same logits after loading' if same else 'DIFFERENT logits after loading'}")
        rows.append((f"{label}, next token", perplexity(again, heldout), generate(again, tokenizer, 64)))
        constant = softmax_layers or len(set(rows[-1][2]["cache_bytes"])) == 1
        passed = passed and same and bool(constant)
    table = Table("model", "perplexity", "cache at 16 / 64 tokens", "tokens/s")
    for label, value, text in rows:
        sizes = " / ".join(f"{size / 1024:.0f} KiB" for size in text.get("cache_bytes", ()))
        table.add_row(label, f"{value:.2f}", sizes, f"{text['tokens_per_second']:.1f}" if text else "")
    console.print(table)
    for label, _, text in rows:
        if text:
            console.print(f"[bold]{label}:[/bold] {PROMPT}{text['text']}", highlight=False)
    report["models"] = [{"name": label, "perplexity": value} | text for label, value, text in rows]
    report["passed"] = passed
    (args.output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if passed else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DemoError as error:
        sys.exit(f"distill_lawcat: {error}")
