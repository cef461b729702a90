"""The whole distillation: a budget of minutes, checkpoints to go on from, a curve to look at."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn

import subquad
from subquad.demo.model import DemoError, Subject, load

from . import recipe
from .export import export
from .start import start
from .texts import SHARES, Corpus, read

STATE = "state.pt"
STARTING = 2  # windows that the feature maps start from
LENGTHS = (1024, 512)  # of the windows, in turn
POSITIONS = 0.25  # share of the positions whose logits stage two compares
EVERY = 180.0  # seconds between checkpoints


@dataclass
class Progress:
    """Where a run is; all but the budget is saved.

    Attributes:
        minutes: wall time for both stages.
        transfer: share of it for the first.
        seconds: used by each stage so far.
        steps, tokens: of each stage so far.
        curve: (stage, seconds of the stage, loss of a step).
    """

    minutes: float
    transfer: float = 0.25
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])
    steps: list[int] = field(default_factory=lambda: [0, 0])
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    curve: list[tuple[int, float, float]] = field(default_factory=list)

    def share(self, stage: int) -> float:
        """How much of a stage is done, 1 when its time is over."""
        part = self.transfer if stage == 1 else 1 - self.transfer
        return self.seconds[stage - 1] / (60 * self.minutes * part)


def run(args: Any, console: Console) -> None:
    """What `examples/distill_lawcat.py` does without --quick.

    Raises:
        DemoError: books or packages that are missing, or a folder with another run's checkpoint.
    """
    if (args.output / STATE).is_file() != (args.resume or args.export):
        found = "has no checkpoint" if args.resume or args.export else "has a checkpoint: --resume goes on from it"
        raise DemoError(f"{args.output} {found}")
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    subject = load("cpu", "float32")
    corpus = read(args.texts)
    if args.export:
        export(subject, corpus, args.output / STATE, console, args.seed)
        return
    ids = tokens_of(subject, corpus, args.output)
    progress = Progress(args.minutes)
    train(subject, recipe.student_of(subject.model), Windows(ids, LENGTHS, args.seed), progress, args.output, console)
    console.print(f"{args.output / STATE} is complete; --export writes the weights and their numbers")


class Windows:
    """Windows of the training texts in a random order that a seed and the number of a step determine."""

    def __init__(self, ids: dict[str, torch.Tensor], lengths: Sequence[int], seed: int) -> None:
        """`ids`: tokens [T] by source. `lengths`: of the windows, in turn."""
        self.ids, self.lengths, self.seed = ids, lengths, seed
        self._names, self._shares = list(ids), torch.tensor([float(SHARES[name]) for name in ids])

    def __getitem__(self, step: int) -> torch.Tensor:
        """Tokens [1, T]."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        name = self._names[int(torch.multinomial(self._shares, 1, generator=generator))]
        ids, length = self.ids[name], self.lengths[step % len(self.lengths)]
        start = int(torch.randint(len(ids) - length + 1, (), generator=generator))
        return ids[None, start : start + length]


def tokens_of(subject: Subject, corpus: Corpus, folder: Path) -> dict[str, torch.Tensor]:
    """Training tokens by source; kept in `folder`, for they take a minute to make."""
    path = folder / "tokens.pt"
    if not path.is_file():
        tokenize = partial(subject.tokenizer, add_special_tokens=False)
        _save({name: torch.tensor(tokenize(text)["input_ids"]) for name, text in corpus.train.items()}, path)
    return torch.load(path, weights_only=True)


def train(
    subject: Subject,
    student: nn.Module,
    windows: Windows,
    progress: Progress,
    folder: Path,
    console: Console,
) -> None:
    """Both stages, from where `folder` says or from the beginning.

    Args:
        student: `recipe.student_of(subject.model)`.
    """
    state = torch.load(folder / STATE, weights_only=True) if (folder / STATE).is_file() else None
    if state is not None:
        for name in ("seconds", "steps", "tokens", "curve"):
            setattr(progress, name, state[name])
    else:
        recipe.set_window(student, 1)
        start(student, subject.model, [windows[step] for step in range(STARTING)], windows.seed)
    for stage in (1, 2):
        recipe.set_window(student, stage)
        if stage == 2:
            recipe.add_lora(student, windows.seed)
        if state is not None and state["stage"] > stage:
            continue
        optimizer = recipe.optimizer_of(student, stage)
        if state is not None and state["stage"] == stage:
            student.load_state_dict(state["parameters"], strict=False)
            optimizer.load_state_dict(state["optimizer"])
        _stage(stage, subject.model, student, windows, optimizer, progress, folder, console)


def _stage(
    stage: int,
    teacher: nn.Module,
    student: nn.Module,
    windows: Windows,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    folder: Path,
    console: Console,
) -> None:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    begun, saved, i = time.monotonic() - progress.seconds[stage - 1], -EVERY, stage - 1
    while progress.share(stage) < 1:
        step = sum(progress.steps) * world + rank
        ids = windows[step]
        recipe.set_rates(optimizer, progress.share(stage))
        if stage == 1:
            loss = recipe.transfer_step(student, ids)
        else:
            chosen = torch.Generator().manual_seed(windows.seed * 1_000_003 + step)
            loss = recipe.logits_step(student, teacher, ids, POSITIONS, chosen)
        seconds, loss, tokens = _mean(optimizer, (time.monotonic() - begun, loss, ids.shape[1]))
        recipe.clip(optimizer, together=stage == 2)
        optimizer.step()
        optimizer.zero_grad()
        progress.seconds[i] = seconds
        progress.steps[i] += 1
        progress.tokens[i] += round(tokens * world)
        progress.curve.append((stage, seconds, loss))
        over = progress.share(stage) >= 1
        if rank == 0 and (over or time.monotonic() - saved > EVERY):
            _save(_state(stage, student, optimizer, progress), folder / STATE)
            saved = time.monotonic()
        if rank == 0 and (over or progress.steps[i] % 10 == 0):
            recent = [row[2] for row in progress.curve[-10:]]
            console.print(
                f"stage {stage}, {100 * progress.share(stage):.0f} %: step {progress.steps[i]}, {progress.tokens[i]} tokens, "
                f"loss {sum(recent) / len(recent):.4f}, {progress.tokens[i] / progress.seconds[i]:.0f} tokens/s",
                highlight=False,
            )


def _mean(optimizer: torch.optim.Optimizer, numbers: Sequence[float]) -> list[float]:
    """Means of the gradients, in place, and of some numbers over all processes; all of them then take the same step."""
    if not dist.is_initialized():
        return list(numbers)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), torch.tensor(numbers)])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    *means, told = flat.split([*(gradient.numel() for gradient in gradients), len(numbers)])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))
    return told.tolist()


def _state(stage: int, student: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> dict[str, Any]:
    parameters = {name: p.detach() for name, p in subquad.trainable_parameters(student, stage).items()}
    told = {name: getattr(progress, name) for name in ("seconds", "steps", "tokens", "curve", "minutes")}
    return told | {"stage": stage, "parameters": parameters, "optimizer": optimizer.state_dict()}


def _save(value: Any, path: Path) -> None:
    """All of it or nothing: a run that is stopped while it writes leaves the last checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(value, partial)
    os.replace(partial, path)
