"""Watching what sparsity a converted model really has: `track_sparsity` and `sparsity_report`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .. import _checks
from ..nn.cats_mlp import CATSMLP
from ..ops.cats_mlp import MAX_SPARSE_TOKENS
from ..reference.cats_activation import activate, active_mask


@dataclass(frozen=True)
class LayerSparsity:
    """One layer of a report. Fractions are of the layer's neurons; None where no token was seen.

    Attributes:
        name: qualified module name.
        threshold: its mean, over channels where it has one per channel.
        target: sparsity the calibration aimed at, None when set by hand.
        tokens: tokens seen.
        active_mean, active_min, active_p5, active_p95: active fraction per token.
        union: mean fraction that at least one token of a sparse call woke: the rows that are read.
        union_by_tokens: the same by number of tokens in the call.
        dead: neurons that no token woke.
        bytes_ratio: weight bytes read over those of the dense MLP, mean over calls: (1 + 2 union) / 3 for a sparse
            call, 1 for a dense one. With weights in few bits, over all bytes of the layer, whose shares may differ.
        calls, dense_calls: calls seen, and how many of them took the dense path: too many tokens, gradients,
            projections that must be called, or disabled.
    """

    name: str
    threshold: float
    target: float | None
    tokens: int = 0
    active_mean: float | None = None
    active_min: float | None = None
    active_p5: float | None = None
    active_p95: float | None = None
    union: float | None = None
    union_by_tokens: dict[int, float] | None = None
    dead: int | None = None
    bytes_ratio: float | None = None
    calls: int = 0
    dense_calls: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


class _Layer:
    """Running statistics of one module."""

    def __init__(self, name: str, module: CATSMLP) -> None:
        self.name, self.module = name, module
        self.active: list[torch.Tensor] = []
        self.union: dict[int, list[float]] = {}
        self.ever = torch.zeros(module.intermediate_size, dtype=torch.bool, device=module.threshold.device)
        self.calls = self.dense_calls = 0
        self.read = 0.0  # shares of the weights, summed over calls

    def observe(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        mlp, x = self.module, args[0].reshape(-1, self.module.hidden_size)
        tokens = x.shape[0]
        if tokens == 0:
            return
        limit = MAX_SPARSE_TOKENS if mlp.max_sparse_tokens is None else mlp.max_sparse_tokens
        wants_grad = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in mlp.parameters()))
        dense_call = tokens > limit or not mlp.enabled or wants_grad or not mlp.reads(x)
        with torch.no_grad():
            if mlp.enabled and not (tokens > limit and mlp.prefill == "dense"):
                s = activate(mlp.gate(x).float(), mlp.activation)
                mask = active_mask(s, mlp.threshold, mlp.inclusive)
            else:
                mask = torch.ones(tokens, mlp.intermediate_size, dtype=torch.bool, device=x.device)
            woken = mask.any(0)
            self.ever |= woken
            self.active.append(mask.float().mean(1).cpu())
        self.calls += 1
        self.dense_calls += dense_call
        self.read += 1.0 if dense_call else mlp.share_read(woken)
        if not dense_call:
            self.union.setdefault(tokens, []).append(woken.float().mean().item())

    def summary(self) -> LayerSparsity:
        row = _static(self.name, self.module)
        if not self.active:
            return row
        active = torch.cat(self.active)
        p5, p95 = torch.quantile(active, torch.tensor([0.05, 0.95])).tolist()
        unions = [value for values in self.union.values() for value in values]
        return LayerSparsity(
            name=row.name,
            threshold=row.threshold,
            target=row.target,
            tokens=active.numel(),
            active_mean=active.mean().item(),
            active_min=active.min().item(),
            active_p5=p5,
            active_p95=p95,
            union=sum(unions) / len(unions) if unions else None,
            union_by_tokens={tokens: sum(values) / len(values) for tokens, values in sorted(self.union.items())},
            dead=int((~self.ever).sum()),
            bytes_ratio=self.read / self.calls,
            calls=self.calls,
            dense_calls=self.dense_calls,
        )


def _static(name: str, module: CATSMLP) -> LayerSparsity:
    target = module.cats_meta[1].item()
    return LayerSparsity(name, module.threshold.mean().item(), target if target >= 0 else None)


class SparsityTracker:
    """What `track_sparsity` collects; readable during and after the block."""

    def __init__(self, layers: list[_Layer]) -> None:
        self._layers = layers

    def report(self) -> list[LayerSparsity]:
        """One row per CATS layer."""
        return [layer.summary() for layer in self._layers]

    @property
    def sparsity(self) -> float:
        """Mean inactive fraction over layers that have seen tokens; NaN when none has."""
        means = [1.0 - row.active_mean for row in self.report() if row.active_mean is not None]
        return sum(means) / len(means) if means else float("nan")


@contextmanager
def track_sparsity(model: nn.Module) -> Iterator[SparsityTracker]:
    """Record the masks of every CATS layer during the block. Computes each gate a second time: not for timing.

    The masks are taken from a gate product in the weights' dtype, so in bfloat16 a neuron at the very threshold may be
    counted differently than the kernel saw it.

    Args:
        model: a model with `CATSMLP` modules.

    Raises:
        ValueError: if it has none.
    """
    _checks.module("model", model)
    layers = [_Layer(name, module) for name, module in model.named_modules() if isinstance(module, CATSMLP)]
    if not layers:
        raise ValueError(f"model: expected CATSMLP modules, found none in {type(model).__name__}; convert it first")
    handles = [layer.module.register_forward_pre_hook(layer.observe) for layer in layers]
    try:
        yield SparsityTracker(layers)
    finally:
        for handle in handles:
            handle.remove()


def sparsity_report(model: nn.Module, batches: Iterable[Any] = ()) -> list[LayerSparsity]:
    """Targets and thresholds of every CATS layer, and with data also what they give.

    Args:
        model: a model with `CATSMLP` modules.
        batches: inputs to run through the model without gradients: mappings (passed as keywords), tuples, or single
            tensors.

    Raises:
        ValueError: if the model has no `CATSMLP`.
    """
    with track_sparsity(model) as tracker, torch.no_grad():
        for batch in batches:
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, (tuple, list)):
                model(*batch)
            else:
                model(batch)
        return tracker.report()
