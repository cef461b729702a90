"""A passkey sixteen times as far away as in training, by LAWCAT layers and by softmax with rotary positions, on a CPU.

    python examples/passkey.py             # some minutes on one core
    python examples/passkey.py --quick     # seconds: that it runs, not what it shows

A text of everyday sentences says in one place "the passkey is 3 1 4 1 5", and asks for it at its end. Two small Llamas are
trained from scratch on texts of at most 256 tokens: one as transformers has it, one converted to LAWCAT. They see the same texts
in the same order, take the same steps, and begin with the same weights where they have the same weights. Then both read longer
texts. An answer counts if all five digits are right; guessing is, once in 100,000.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from subquad.integrations.transformers import LawcatConfig, convert, register
from subquad.nn import GateProjection, ShortConvolution

SENTENCES = (
    "the grass is green .",
    "the sky is blue .",
    "the sun is yellow .",
    "here we go again .",
    "back to the start .",
)
NEEDLE, QUESTION, DIGITS = "the passkey is", "what is the passkey ? the passkey is", 5
WORDS = (*"0123456789", *sorted({word for text in (*SENTENCES, NEEDLE, QUESTION) for word in text.split()}))
SHORTEST, TRAINED = 32, 256  # tokens of the first texts of the training, and of those of its second half
MODELS = {"lawcat": "LAWCAT", "softmax": "softmax + RoPE"}
LENGTHS = {"lawcat": (256, 512, 1024, 2048, 4096, 16384), "softmax": (256, 512, 1024, 2048, 4096)}
STEPS, TOKENS, LR, WIDTH, KEPT = 2000, 2048, 1e-2, 64, 6.0
FOUND, LOST = 0.9, 0.5  # both must find as much in 256 tokens; in 4096 LAWCAT as much, and softmax no more than LOST


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps: it runs, and learns nothing yet")
    parser.add_argument("--steps", type=int, help=f"batches of {TOKENS} tokens (default: {STEPS}, quick 30)")
    parser.add_argument("--texts", type=int, help="texts of every length in the evaluation (default: 64, quick 4)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and texts (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("demo/passkey"), help="folder for passkey.svg and report.json"
    )
    args = parser.parse_args()
    for name, quick, full in (("steps", 30, STEPS), ("texts", 4, 64)):
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else full)
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    return args


def encoded(text: str) -> torch.Tensor:
    return torch.tensor([WORDS.index(word) for word in text.split()])


def texts(count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Texts [count, length], of 32 tokens or more; the last five tokens are the key."""
    keys = torch.randint(10, (count, DIGITS), generator=generator)
    needle, end, question = encoded(NEEDLE), encoded("."), encoded(QUESTION)
    free = length - len(needle) - len(end) - len(question) - 2 * DIGITS
    sentences = torch.stack([encoded(text) for text in SENTENCES])
    drawn = torch.randint(len(sentences), (count, free // sentences.shape[1] + 1), generator=generator)
    filler = sentences[drawn].flatten(1)[:, :free]
    places = torch.randint(free + 1, (count,), generator=generator).tolist()
    rows = zip(filler, keys, places, strict=True)
    return torch.stack([torch.cat([row[:at], needle, key, end, row[at:], question, key]) for row, key, at in rows])


def made(kind: str, seed: int) -> LlamaForCausalLM:
    """A Llama of two layers. A conversion begins as what a pretrained model needs; this one has to learn everything."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, initializer_range=WIDTH**-0.5, attn_implementation="subquad",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if kind == "lawcat":
        convert(model, attention=LawcatConfig(feature_dim=16))
        for module in model.modules():
            if isinstance(module, ShortConvolution):  # random taps: those of a conversion see the current token alone
                module.init = "default"
                module.reset_parameters()
            elif isinstance(module, GateProjection):  # open: those of a conversion forget half within 16 tokens
                nn.init.constant_(module[-1].bias, KEPT)
    return model


def answers(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, DIGITS, V] of the key, each digit after those before it."""
    logits: torch.Tensor = model(ids[:, :-1], use_cache=False, logits_to_keep=DIGITS).logits
    return logits


def length_of(step: int, steps: int) -> int:
    """Tokens of the texts of a step: they grow evenly in the logarithm, and are as long as they get from four fifths on."""
    return round(SHORTEST * (TRAINED / SHORTEST) ** min(1.0, step / (0.8 * steps)))


def train(model: nn.Module, name: str, steps: int, seed: int) -> list[float]:
    """The loss of every step, on the digits of the answer alone."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.1)
    losses = []
    for step in range(steps):
        length = length_of(step, steps)
        ids = texts(TOKENS // length, length, generator)
        loss = F.cross_entropy(answers(model, ids).flatten(0, 1), ids[:, -DIGITS:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % max(steps // 5, 1) == 0:
            print(f"{name}: step {step + 1} of {steps}, {length} tokens, loss {losses[-1]:.3f}", flush=True)
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, length: int, count: int) -> float:
    """Share of new texts whose key is found whole. All digits right one by one is what greedy decoding would say right."""
    generator, found = torch.Generator().manual_seed(length), 0
    for _ in range(count):
        ids = texts(1, length, generator)
        found += int((answers(model, ids).argmax(-1) == ids[:, -DIGITS:]).all())
    return found / count


def experiment(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """One model, from its first step to its longest text."""
    start = time.perf_counter()
    model = made(kind, args.seed)
    losses = train(model, MODELS[kind], args.steps, args.seed)
    trained = time.perf_counter()
    lengths = LENGTHS[kind][: 2 if args.quick else None]
    found = {length: accuracy(model, length, args.texts) for length in lengths}
    seconds = {"training_seconds": trained - start, "evaluation_seconds": time.perf_counter() - trained}
    return {"accuracy": found, "losses": losses, **seconds}


def plot(results: Mapping[str, Mapping[int, float]]) -> str:
    """Accuracy by length as SVG, lengths at even distances."""
    lengths = sorted({length for found in results.values() for length in found})
    x = {length: 70 + 480 * place / (len(lengths) - 1) for place, length in enumerate(lengths)}
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 620 330" font-family="sans-serif" font-size="13">',
        '<rect width="620" height="330" fill="white"/>',
        '<text x="310" y="22" text-anchor="middle">keys found whole, by tokens of the text</text>',
    ]
    for percent in range(0, 101, 25):
        y = 280 - 2.3 * percent
        parts.append(f'<path d="M70 {y:.1f}H550" stroke="#ddd"/>')
        parts.append(f'<text x="62" y="{y + 4:.1f}" text-anchor="end">{percent} %</text>')
    parts += [f'<text x="{at:.1f}" y="300" text-anchor="middle">{length}</text>' for length, at in x.items()]
    parts.append(f'<text x="{x[TRAINED]:.1f}" y="318" text-anchor="middle" fill="#666">trained</text>')
    for place, (colour, (kind, found)) in enumerate(zip(("#1f6feb", "#d1550b"), results.items(), strict=True)):
        points = [(x[length], 280 - 230 * share) for length, share in found.items()]
        line = " ".join(f"{across:.1f},{y:.1f}" for across, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        parts += [f'<circle cx="{across:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for across, y in points]
        parts.append(f'<text x="90" y="{230 + 20 * place}" fill="{colour}">{MODELS[kind]}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # sums in one order: the same numbers however many cores there are
    register()
    start = time.perf_counter()
    results = {kind: experiment(kind, args) for kind in MODELS}
    report = {"steps": args.steps, "tokens_per_step": TOKENS, "texts": args.texts, "seed": args.seed, "models": results}
    (args.output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    found = {kind: result["accuracy"] for kind, result in results.items()}
    (args.output / "passkey.svg").write_text(plot(found), encoding="utf-8")
    table = Table("tokens", *MODELS.values(), title=f"keys found whole, of {args.texts}")
    for length in found["lawcat"]:
        table.add_row(str(length), *(f"{row[length]:.1%}" if length in row else "" for row in found.values()))
    Console().print(table)
    print(f"{args.output}: passkey.svg and report.json, after {time.perf_counter() - start:.0f} s")
    fair = all(row[TRAINED] >= FOUND for row in found.values())
    if not args.quick and not (fair and found["lawcat"][4096] >= FOUND and found["softmax"][4096] <= LOST):
        raise SystemExit(
            f"expected at least {FOUND:.0%} of both at {TRAINED} tokens and of LAWCAT at 4096, of softmax at most {LOST:.0%}"
        )


if __name__ == "__main__":
    main()
