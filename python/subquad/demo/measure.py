"""Measurements on variants: agreement, perplexity, sparsity, decoding speed, MLP time, an answer."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..calibration import track_sparsity
from ..nn.cats_mlp import CATSMLP
from .model import cache_name
from .variants import Variant

Tick = Callable[[], None]


@dataclass(frozen=True)
class Timing:
    """Seconds per repetition: median, and the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(statistics.median(samples), deciles[0], deciles[-1])


class Decoder:
    """Greedy decoding of one sequence, one token a step, with the model's own cache."""

    def __init__(self, variant: Variant, prompt: torch.Tensor) -> None:
        """prompt `[1, T]`, run as one call."""
        self.variant = variant
        variant.activate()
        out = variant.model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        self._name = cache_name(variant.model)
        self._cache = out[self._name]
        self.token = out.logits[:, -1].argmax(-1, keepdim=True)

    def step(self, token: torch.Tensor | None = None) -> torch.Tensor:
        """Feed `token` `[1, 1]` (default: the model's own last one). Returns logits `[1, V]`."""
        fed = self.token if token is None else token
        out = self.variant.model(input_ids=fed, use_cache=True, **{self._name: self._cache})
        self._cache = out[self._name]
        self.token = out.logits[:, -1].argmax(-1, keepdim=True)
        return out.logits[:, -1]


def _tracking(model: nn.Module) -> Any:
    return track_sparsity(model) if any(isinstance(m, CATSMLP) for m in model.modules()) else nullcontext()


@torch.no_grad()
def disagreement(reference: nn.Module, converted: nn.Module, ids: torch.Tensor) -> dict[str, float]:
    """Largest logit difference between a model and its converted copy with thresholds off, and the largest logit.

    Measured on one call with all of `ids` `[1, T]` but the last token, and on that last token alone: the two ways
    through an MLP.
    """
    modules = [m for m in converted.modules() if isinstance(m, CATSMLP)]
    for module in modules:
        module.set_threshold(-1.0)
    logits = []
    for model in (reference, converted):
        prefill = model(input_ids=ids[:, :-1], use_cache=True)
        name = cache_name(model)
        last = model(input_ids=ids[:, -1:], use_cache=True, **{name: prefill[name]})
        logits.append((prefill.logits.float(), last.logits.float()))
    (a, b), (c, d) = logits
    return {
        "prefill_max_difference": (a - c).abs().max().item(),
        "decode_max_difference": (b - d).abs().max().item(),
        "max_logit": max(a.abs().max().item(), b.abs().max().item()),
    }


@torch.no_grad()
def perplexity(variant: Variant, batches: Sequence[torch.Tensor], tick: Tick) -> tuple[float, float | None]:
    """Perplexity over windows `[1, T]`, every token from its window's beginning; and the MLPs' mean sparsity there."""
    variant.activate()
    total, count = 0.0, 0
    with _tracking(variant.model) as tracker:
        for ids in batches:
            logits = variant.model(input_ids=ids).logits[0, :-1].float()
            total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
            tick()
    return math.exp(total / count), None if tracker is None else tracker.sparsity


@torch.no_grad()
def decode_sparsity(variant: Variant, ids: torch.Tensor, prompt: int) -> tuple[float, float] | None:
    """Mean sparsity, and MLP bytes read over dense bytes, for the tokens of `ids` `[1, T]` behind the prompt, one a
    call."""
    decoder = Decoder(variant, ids[:, :prompt])
    with _tracking(variant.model) as tracker:
        if tracker is None:
            return None
        for i in range(prompt, ids.shape[1]):
            decoder.step(ids[:, i : i + 1])
        ratios = [row.bytes_ratio for row in tracker.report() if row.bytes_ratio is not None]
        return tracker.sparsity, statistics.fmean(ratios)


@torch.no_grad()
def cache_bytes(variant: Variant, prompt: torch.Tensor) -> int:
    """Memory of the cache after a prompt `[1, T]`: keys and values, or the states of linear attention without what is kept
    for taking tokens back."""
    variant.activate()
    out = variant.model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    total = 0
    for layer in out[cache_name(variant.model)].layers:
        state = getattr(layer, "state", None)
        held = (layer.keys, layer.values) if state is None else state.current().values()
        total += sum(x.numel() * x.element_size() for x in held if x is not None)
    return total


def weight_bytes(model: nn.Module) -> int:
    """Memory of all parameters and buffers; what is tied counts once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum({x.data_ptr(): x.numel() * x.element_size() for x in tensors}.values())


def mlp_bytes(variant: Variant) -> int:
    """Memory of the weights of all MLPs, without biases and thresholds."""
    tensors = (x for mlp in variant.mlps() for x in (*mlp.parameters(), *mlp.buffers()) if x.dim() > 1)
    return sum(x.numel() * x.element_size() for x in tensors)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _interleaved(
    actions: Sequence[Callable[[], object]], before: Sequence[Tick], repeats: int, device: torch.device, tick: Tick
) -> list[Timing]:
    """Time actions in turn, each round starting with another one, so that drift of the machine hits all alike."""
    samples: list[list[float]] = [[] for _ in actions]
    warm_up = 3
    for round_number in range(warm_up + repeats):
        for k in range(len(actions)):
            i = (k + round_number) % len(actions)
            before[i]()
            _synchronize(device)
            start = time.perf_counter()
            actions[i]()
            _synchronize(device)
            if round_number >= warm_up:
                samples[i].append(time.perf_counter() - start)
        tick()
    return [Timing.of(values) for values in samples]


@torch.no_grad()
def decode_times(variants: Sequence[Variant], prompt: torch.Tensor, steps: int, tick: Tick) -> list[Timing]:
    """Time of one greedy step for every variant, interleaved step by step."""
    decoders = [Decoder(variant, prompt) for variant in variants]
    actions = [decoder.step for decoder in decoders]
    return _interleaved(actions, [variant.activate for variant in variants], steps, prompt.device, tick)


@torch.no_grad()
def mlp_times(variants: Sequence[Variant], prompt: torch.Tensor, repeats: int, tick: Tick) -> list[Timing]:
    """Time of all layers' MLPs on one token, with the inputs they get when the first variant decodes after the
    prompt."""
    inputs: list[torch.Tensor] = []
    decoder = Decoder(variants[0], prompt)
    handles = [m.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone())) for m in variants[0].mlps()]
    decoder.step()
    for handle in handles:
        handle.remove()

    def action(mlps: list[nn.Module]) -> Callable[[], None]:
        def call() -> None:
            for mlp, x in zip(mlps, inputs, strict=True):
                mlp(x)

        return call

    actions = [action(variant.mlps()) for variant in variants]
    return _interleaved(actions, [variant.activate for variant in variants], repeats, prompt.device, tick)


@torch.no_grad()
def answer(variant: Variant, prompt: torch.Tensor, tokenizer: Any, tokens: int, tick: Tick) -> str:
    """Greedy answer to a chat prompt, up to the end-of-sequence token."""
    decoder = Decoder(variant, prompt)
    out: list[int] = []
    while len(out) < tokens and int(decoder.token) != tokenizer.eos_token_id:
        out.append(int(decoder.token))
        decoder.step()
        tick()
    return tokenizer.decode(out, skip_special_tokens=True).strip()
