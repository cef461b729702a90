"""The demo from loading to plot, with its progress shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .. import _backends
from . import lengths, measure, model, report, stream
from .variants import Variant, families, passes

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}  # of the largest logit
LIKELIHOOD_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-3}  # nats per token
_STEPS = 3  # timed at each length of context
_PROMPT = 64  # tokens of held-out text before decoding starts


@dataclass(frozen=True)
class Settings:
    """Sizes of the measurements."""

    calibration_tokens: int
    heldout_tokens: int
    window: int
    decode_steps: int
    mlp_repeats: int
    answer_tokens: int
    stream_tokens: int
    stream_window: int  # tokens that the streaming cache holds, sinks included
    stream_chunk: int
    contexts: tuple[int, ...]  # tokens after which decoding is timed


QUICK = Settings(2048, 2048, 512, 24, 20, 40, 4096, 512, 256, (4096, 16384))
FULL = Settings(8192, 8192, 512, 128, 100, 96, 20480, 1024, 256, (1024, 4096, 16384, 65536))


class _Stages:
    """One progress line per stage, kept when done."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> _Stages:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    @contextmanager
    def stage(self, description: str, steps: int = 1) -> Iterator[Callable[[], None]]:
        """Yields a function to call after each step; a stage ends full."""
        if not self._console.is_terminal:  # a log file gets one line a stage instead of bars
            self._console.print(f"{description} ...")
        task = self._progress.add_task(description, total=steps)
        yield lambda: self._progress.advance(task)
        self._progress.update(task, completed=steps)


def _prepare_native(device: str) -> str | None:
    """Make the native kernels ready, compiling them when they are not there yet. Returns why they cannot be used."""
    reasons = (
        _backends.unavailable(op, "native", device, build=True)
        for op in ("cats_mlp", "interval_attention", "gated_linear_attention", "sink_attention_step", "span_attention")
    )
    return next((reason for reason in reasons if reason is not None), None)


def run(
    loader: Callable[[], model.Subject],
    settings: Settings,
    output: Path,
    device: str,
    dtype: str,
    console: Console | None = None,
) -> int:
    """Run everything and write `report.json` and `plot.png` into `output`.

    Args:
        loader: gives the model and its tokenizer.
        settings: `QUICK`, `FULL` or others.
        output: folder, created if need be.
        device, dtype: what the loader put the model in; for the report.
        console: where to show progress and results; the terminal by default.

    Returns:
        0, or 1 when the converted model with thresholds off, or the model with our attention, disagrees with the stock one, or
        the streaming cache grows.
    """
    console = console or Console()
    with _Stages(console) as stages:
        with stages.stage("native kernels (compiled once if absent)"):
            missing = _prepare_native(device)
        backend = _backends.resolve("cats_mlp", device, None)
        with stages.stage("load the model"):
            subject = loader()
        with stages.stage("read and tokenise the text"):
            calibration_text, heldout_text = model.texts()
            batches, heldout = (
                model.windows(subject.tokenizer, text, tokens, settings.window, device, subject.first)
                for text, tokens in (
                    (calibration_text, settings.calibration_tokens),
                    (heldout_text, settings.heldout_tokens),
                )
            )
        builders = families(subject.gguf_file, subject.families, subject.distilled)
        with stages.stage("convert, calibrate, transfer", passes(builders, subject.distilled) * len(batches)) as tick:
            variants = [v for build in builders.values() for v in build(subject.model, batches, tick)]
        check, rows = _measure(stages, subject, variants, heldout, settings)
        found = _stream(stages, subject, variants[0], heldout_text, settings)
        contexts: list[dict[str, Any]] = []
        if "lawcat" in builders:
            timed = [variant for variant in variants if variant.family in lengths.FAMILIES]
            with stages.stage("decoding after long contexts", len(timed) * len(settings.contexts)) as tick:
                contexts = lengths.by_length(timed, heldout[0][:, :_PROMPT], settings.contexts, _STEPS, tick)
    largest = max(check["prefill_max_difference"], check["decode_max_difference"])
    check["tolerance"] = TOLERANCE[dtype] * check["max_logit"]
    check["attention"] = attention = _attention_check(rows, dtype)
    check["stream"] = streamed = stream.check(found)
    check["passed"] = largest <= check["tolerance"] and attention["passed"] and streamed["passed"]
    result: dict[str, Any] = {
        "schema": report.SCHEMA,
        "model": subject.name,
        "settings": asdict(settings),
        "device": device,
        "dtype": dtype,
        "backend": backend,
        "native_unavailable": missing,
        "question": model.QUESTION,
        "check": check,
        "variants": rows,
        "distilled": None if subject.distilled is None else subject.distilled.name,
        "contexts": contexts,
        "stream": stream.summary(found) | {"chunks": found},
    } | report.environment()
    report.show(console, result)
    for path in (report.write_json(result, output), report.write_plot(result, output)):
        console.print(f"written: {path}")
    return 0 if check["passed"] else 1


def _attention_check(rows: list[dict[str, Any]], dtype: str) -> dict[str, Any]:
    """Whether the model with our attention is the stock model: its likelihood per token, and in float32 its greedy text."""
    stock, ours = rows[0], next(row for row in rows if row["family"] == "attention")
    difference = abs(math.log(ours["perplexity"] / stock["perplexity"]))
    same_text = ours["answer"] == stock["answer"]
    return {
        "log_likelihood_difference": difference,
        "tolerance": LIKELIHOOD_TOLERANCE[dtype],
        "same_text": same_text,
        "passed": difference <= LIKELIHOOD_TOLERANCE[dtype] and (same_text or dtype != "float32"),
    }


def _stream(stages: _Stages, subject: model.Subject, stock: Variant, text: str, settings: Settings) -> dict[str, Any]:
    stock.activate()
    device = next(subject.model.parameters()).device
    ids = torch.cat(model.windows(subject.tokenizer, text, settings.stream_tokens, settings.stream_chunk, device), 1)
    if subject.first is not None:
        ids = torch.cat([torch.full_like(ids[:, :1], subject.first), ids[:, :-1]], 1)
    with stages.stage("a long text through three caches", stream.steps(ids.shape[1], settings.stream_chunk)) as tick:
        return stream.streams(subject.model, ids, settings.stream_window, settings.stream_chunk, tick, subject.first)


def _measure(
    stages: _Stages, subject: model.Subject, variants: list[Variant], heldout: list[torch.Tensor], settings: Settings
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    prompt = heldout[0][:, :_PROMPT]
    question = model.prompt(subject, model.QUESTION, prompt.device)
    rows: list[dict[str, Any]] = [{"name": v.name, "family": v.family, "target_sparsity": v.target} for v in variants]
    with stages.stage("check: thresholds off equals dense"):
        converted = next(v.model for v in variants if v.model is not subject.model)
        check: dict[str, Any] = dict(measure.disagreement(subject.model, converted, heldout[0]))
    with stages.stage("perplexity on held-out text", len(variants) * len(heldout)) as tick:
        for row, variant in zip(rows, variants, strict=True):
            row["perplexity"], row["sparsity"] = measure.perplexity(variant, heldout, tick)
    with stages.stage("sparsity when decoding held-out text", len(variants)) as tick:
        for row, variant in zip(rows, variants, strict=True):
            found = measure.decode_sparsity(variant, heldout[-1][:, : _PROMPT + settings.decode_steps], _PROMPT)
            row["decode_sparsity"], share = found or (None, 1.0)
            row["mlp_bytes_ratio"] = share * measure.mlp_bytes(variant) / measure.mlp_bytes(variants[0])
            tick()
    lengths = sorted({min(_PROMPT, settings.window), settings.window})
    with stages.stage("memory of weights and cache", len(variants)) as tick:
        for row, variant in zip(rows, variants, strict=True):
            row["cache_bytes"] = {n: measure.cache_bytes(variant, heldout[0][:, :n]) for n in lengths}
            row["weight_bytes"] = measure.weight_bytes(variant.model)
            tick()
    with stages.stage("decoding speed, interleaved", settings.decode_steps) as tick:
        for row, timing in zip(rows, measure.decode_times(variants, prompt, settings.decode_steps, tick), strict=True):
            row["decode_step_seconds"] = asdict(timing)
            row["tokens_per_second"] = 1 / timing.median
    with stages.stage("MLP time, interleaved", settings.mlp_repeats) as tick:
        for row, timing in zip(rows, measure.mlp_times(variants, prompt, settings.mlp_repeats, tick), strict=True):
            row["mlp_seconds"] = asdict(timing)
    asked = [(row, variant) for row, variant in zip(rows, variants, strict=True) if variant.answers]
    with stages.stage("one answer each", len(asked) * settings.answer_tokens) as tick:
        for row, variant in asked:
            row["answer"] = measure.answer(variant, question, subject.tokenizer, settings.answer_tokens, tick)
    return check, rows
