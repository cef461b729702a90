"""States of runs folded over the whole sequence: every run gets what the runs before it, or behind it, leave.

With S_j the state that run j makes from nothing and D_j the exponential of its summed gates, X_j = D_j X_(j-1) + S_j. A message
is [B, HS, K, C + 1] float32 for every run, its last column log D_j. Three ways with the same operations in the same order, and so
with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from . import _collectives
from .layout import Run, SequenceLayout

METHODS = ("auto", "all_gather", "ring", "scan")
_SLICES = 4  # of the state in a ring: one rank folds one while the rank before it sends the next
_GATHERED = 4  # ranks up to which all states are gathered


def method_of(method: str, layout: SequenceLayout) -> str:
    """ "auto" by the number of ranks alone, so that all choose alike.

    Raises:
        ValueError: no such method, or a ring over several runs of a rank.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if method == "ring" and layout.most_runs > 1:
        raise ValueError("method: expected 'all_gather' or 'scan' for a layout with several runs per rank, got 'ring'")
    return ("all_gather" if layout.size <= _GATHERED else "scan") if method == "auto" else method


def exclusive_scan(
    messages: Sequence[torch.Tensor], layout: SequenceLayout, method: str, reverse: bool = False
) -> list[torch.Tensor]:
    """What enters each of this rank's runs, [B, HS, K, C]; messages of one shape, also for a run without tokens.

    `reverse`: from the last run to the first. If no sequence crosses a border nobody communicates: all ranks know that.
    """
    if not any(run.continues for run in layout.runs):
        return [torch.zeros_like(m[..., :-1]) for m in messages]
    runs = layout.runs[::-1] if reverse else layout.runs
    if method == "ring":
        return [_ring(messages[0], runs, layout)]
    own = sum(run.owner == layout.rank for run in runs)
    shape = messages[0].shape
    padded = messages[0].new_zeros((layout.most_runs, *shape))
    for i in range(own):
        padded[i] = messages[i]
    entered = (_all_gather if method == "all_gather" else _scan)(padded, runs, layout)
    return list(entered[: max(1, own)])


def _fold(below: torch.Tensor, message: torch.Tensor, run: Run) -> torch.Tensor:
    """D below + S; a state of zeros stays zeros whatever the decay. A sequence that begins in the run forgets what entered it."""
    own = message[..., :-1]
    if not run.passes:
        return own
    return torch.where(below == 0, 0.0, message[..., -1:].exp() * below) + own


def _all_gather(padded: torch.Tensor, runs: Sequence[Run], layout: SequenceLayout) -> torch.Tensor:
    every = _collectives.all_gather(padded, layout.group)
    found = torch.zeros_like(padded[..., :-1])
    x = torch.zeros_like(found[0])
    for run in runs:
        if run.owner == layout.rank:
            found[run.index] = x
        x = _fold(x, every[run.owner * layout.most_runs + run.index], run)
    return found


def _scan(padded: torch.Tensor, runs: Sequence[Run], layout: SequenceLayout) -> torch.Tensor:
    """Every rank folds a slice of the state for all runs: two all-to-alls of one state each, whatever the number of ranks."""
    most, size = layout.most_runs, layout.size
    rows = padded.flatten(1, -2)  # [runs, B HS K, C + 1]
    count = rows.shape[1]
    rows = F.pad(rows, (0, 0, 0, -count % size)).unflatten(1, (size, -1)).transpose(0, 1)
    ones = [most] * size
    slices = _collectives.all_to_all(rows.flatten(0, 1), ones, ones, layout.group).unflatten(0, (size, most))
    entered = torch.zeros_like(slices[..., :-1])
    x = torch.zeros_like(entered[0, 0])
    for run in runs:
        entered[run.owner, run.index] = x
        x = _fold(x, slices[run.owner, run.index], run)
    back = _collectives.all_to_all(entered.flatten(0, 1), ones, ones, layout.group).unflatten(0, (size, most))
    return back.transpose(0, 1).flatten(1, 2)[:, :count].reshape(padded[..., :-1].shape)


def _ring(message: torch.Tensor, runs: Sequence[Run], layout: SequenceLayout) -> torch.Tensor:
    """From run to run, in slices of K; one run a rank."""
    place = next((i for i, run in enumerate(runs) if run.owner == layout.rank), -1)
    parts = []
    for tag, m in enumerate(message.chunk(_SLICES, 2)):
        x = torch.zeros_like(m[..., :-1])
        if place > 0:
            _collectives.receive(x, runs[place - 1].owner, tag, layout.group)
        if 0 <= place < len(runs) - 1:
            _collectives.send(_fold(x, m, runs[place]), runs[place + 1].owner, tag, layout.group)
        parts.append(x)
    return torch.cat(parts, 2)
