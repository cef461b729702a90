"""What the demo compares. A family of variants is one function here; the rest of the demo does not know families."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..calibration import CatsCalibrator
from ..convert import find_attentions, find_mlps, restore
from ..distillation import attention_transfer, trainable_parameters
from ..integrations.transformers import convert, register
from ..nn.cats_mlp import CATSMLP
from ..superlinear import SuperlinearConfig
from .distilled import load_distilled

CATS_TARGETS = (0.3, 0.5, 0.7)
CODES_TARGET = 0.5  # of the model with weights in few bits
LAWCAT_KEEP = 4  # one layer of so many stays softmax in the hybrid
LAWCAT_PASSES = 4  # over the calibration text
SUPERLINEAR = SuperlinearConfig(sw_index=19, search_scale=0.125)  # a window of 399 tokens, gates scaled as attention is


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Variant:
    """One row of the comparison.

    Attributes:
        name: heading of the row.
        family: function that built it.
        model: may be shared with other variants.
        target: target sparsity of the MLPs, None where that means nothing.
        activate: puts the model into this variant's state; called before every use.
        answers: whether to ask it a question. Linear attention that was trained for a moment speaks no sentences yet, and in a
            window that holds question and answer Superlinear attention is the model's own.
    """

    name: str
    family: str
    model: nn.Module
    target: float | None = None
    activate: Callable[[], None] = _nothing
    answers: bool = True

    def mlps(self) -> list[nn.Module]:
        """The model's MLPs, in order."""
        return list(find_mlps(self.model).values())


Tick = Callable[[], None]
Builder = Callable[[nn.Module, Sequence[torch.Tensor], Tick], list[Variant]]


def dense(model: nn.Module, batches: Sequence[torch.Tensor], tick: Tick) -> list[Variant]:
    """The model as it is."""
    return [Variant("dense", "dense", model, activate=_switch(model, model.config._attn_implementation))]  # type: ignore


def _calibrated(model: nn.Module, batches: Sequence[torch.Tensor], tick: Tick) -> CatsCalibrator:
    with CatsCalibrator(model) as calibrator, torch.no_grad():
        for batch in batches:
            model(input_ids=batch, logits_to_keep=1)
            tick()
    return calibrator


def cats(model: nn.Module, batches: Sequence[torch.Tensor], tick: Tick) -> list[Variant]:
    """A copy of the model with CATS MLPs, at several thresholds from one calibration."""
    converted = copy.deepcopy(model)
    convert(converted, mlp="cats")
    calibrator = _calibrated(converted, batches, tick)

    def variant(target: float) -> Variant:
        calibrator.apply(target)
        modules = [m for m in find_mlps(converted).values() if isinstance(m, CATSMLP)]
        thresholds = [module.threshold.clone() for module in modules]

        def activate() -> None:
            for module, threshold in zip(modules, thresholds, strict=True):
                module.set_threshold(threshold, target_sparsity=target)

        return Variant(f"CATS {target:.0%}", "cats", converted, target, activate)

    return [variant(target) for target in CATS_TARGETS]


def quantised(
    model: nn.Module, batches: Sequence[torch.Tensor], tick: Tick, gguf_file: Path | None = None
) -> list[Variant]:
    """A copy with weights in few bits: those of the file, or 8 bits where there is none; and CATS, calibrated on them."""
    small = copy.deepcopy(model)
    if gguf_file is None:
        convert(small, mlp="cats", weights="int8")
    else:
        convert(small, mlp="cats", weights="gguf", gguf_file=gguf_file)
    _calibrated(small, batches, tick).apply(CODES_TARGET)
    name = "int8" if gguf_file is None else "file"
    return [Variant(f"{name}, CATS {CODES_TARGET:.0%}", "quantised", small, CODES_TARGET)]


def _switch(model: nn.Module, implementation: str) -> Callable[[], None]:
    return lambda: model.set_attn_implementation(implementation)  # type: ignore[operator]


def attention(model: nn.Module, batches: Sequence[torch.Tensor], tick: Tick) -> list[Variant]:
    """The very model, its attention computed by `subquad.interval_attention`."""
    register()
    return [Variant("our attention", "attention", model, activate=_switch(model, "subquad"))]


def lawcat(
    model: nn.Module, batches: Sequence[torch.Tensor], tick: Tick, distilled: Path | None = None
) -> list[Variant]:
    """The model with linear attention in all layers, and in most of them: distilled, or shown the calibration text."""
    if distilled is not None:
        return _distilled(model, distilled)
    linear = _sharing(model)
    convert(linear, attention="lawcat")
    parameters = list(trainable_parameters(linear).values())
    steps = LAWCAT_PASSES * len(batches)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=max(steps, 1), pct_start=0.1)
    with torch.enable_grad(), attention_transfer(linear, layer_local=True) as transfer:
        for step in range(steps):
            linear(input_ids=batches[step % len(batches)], use_cache=False, logits_to_keep=1)
            transfer.loss()
            for parameter in parameters:
                nn.utils.clip_grad_norm_([parameter], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            tick()
    linear.requires_grad_(False)
    hybrid = _sharing(linear)
    restore(hybrid, "attention", layers=list(find_attentions(hybrid))[LAWCAT_KEEP // 2 :: LAWCAT_KEEP])
    return [Variant(n, "lawcat", m, answers=False) for n, m in (("LAWCAT", linear), ("LAWCAT hybrid", hybrid))]


def _distilled(model: nn.Module, path: Path) -> list[Variant]:
    found = []
    for name, kept in (("LAWCAT", []), ("LAWCAT hybrid", _kept(model))):
        linear = _sharing(model)
        load_distilled(linear, path, [i for i in range(len(find_attentions(model))) if i not in kept])
        found.append(Variant(name, "lawcat", linear.requires_grad_(False)))
    return found


def _kept(model: nn.Module) -> list[int]:
    """Numbers of the hybrid's softmax layers."""
    return list(range(LAWCAT_KEEP // 2, len(find_attentions(model)), LAWCAT_KEEP))


def superlinear(model: nn.Module, batches: Sequence[torch.Tensor], tick: Tick) -> list[Variant]:
    """The very weights, with spans that nothing has trained behind a window."""
    spans = _sharing(model)
    convert(spans, attention=SUPERLINEAR)
    return [Variant("Superlinear", "superlinear", spans, answers=False)]


def _sharing(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same parameters."""
    shared = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def families(
    gguf_file: Path | None = None, wanted: Sequence[str] | None = None, distilled: Path | None = None
) -> dict[str, Builder]:
    """What is built, by name, in the order of the rows.

    Args:
        gguf_file: whose blocks the quantised model takes, if there is one.
        wanted: names; None for all.
        distilled: weights of linear attention for this model; None has it trained for a moment.
    """
    found: dict[str, Builder] = {
        "dense": dense, "cats": cats, "quantised": functools.partial(quantised, gguf_file=gguf_file),
        "lawcat": functools.partial(lawcat, distilled=distilled), "superlinear": superlinear, "attention": attention,
    }  # fmt: skip
    return {name: build for name, build in found.items() if wanted is None or name in wanted}


def passes(builders: Iterable[str], distilled: Path | None = None) -> int:
    """How often these families together run every calibration batch."""
    runs = {"cats": 1, "quantised": 1, "lawcat": LAWCAT_PASSES if distilled is None else 0}
    return sum(runs.get(family, 0) for family in builders)
