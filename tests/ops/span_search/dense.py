"""Choosing spans, one query and head after the other, in Python's integers and float64: what every backend must find."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import torch

from subquad import SuperlinearConfig
from subquad.testing import backend_params

README = SuperlinearConfig(sw_index=3, backward_factor=3.0, forward_factor=1.0)
RELEASED = SuperlinearConfig(
    sw_index=65, backward_factor=3.0, forward_factor=1.0, span_power=0.55, search_power=0.55, inv_search_power_int=None
)


def power_of(config: SuperlinearConfig) -> int | float:
    """1 / power."""
    return config.inv_search_power_int if config.inv_search_power_int is not None else 1.0 / config.search_power  # type: ignore[operator]


def offset(i: int, config: SuperlinearConfig) -> int:
    """o_i."""
    exponent = power_of(config)
    return i**exponent if isinstance(exponent, int) else int(float(i) ** exponent)


def length(tokens: int, factor: float, config: SuperlinearConfig) -> int:
    """ceil(factor * tokens ** span_power), exactly, of the decimal numbers that factor and power were written as."""
    if config.span_power == 0.5:
        square = Fraction(str(factor)) ** 2 * tokens
        root = math.isqrt(math.ceil(square))
        return root + (root * root < square)
    with localcontext() as context:
        context.prec = 60
        return math.ceil(Decimal(str(factor)) * Decimal(tokens) ** Decimal(str(config.span_power))) if tokens else 0


def window(config: SuperlinearConfig) -> int:
    """W."""
    return offset(config.sw_index + 1, config) - 1


@dataclass
class Slot:
    """One span; start, end and anchor are -1 and the score -inf where there is none."""

    score: float = -math.inf
    anchor: int = -1
    start: int = -1
    end: int = -1


def slots(
    config: SuperlinearConfig, position: int, first: int, keep: list[bool], scores: list[float], rank: list[float]
) -> list[Slot]:
    """What one head of one query chooses by `rank`, given its scores of all keys."""
    anchors, i = [], config.sw_index + 1
    while (anchor := position + 1 - offset(i, config)) >= first:
        if anchor < len(keep) and keep[anchor] and rank[anchor] > -math.inf:  # no NaN
            anchors.append(anchor)
        i += 1
    anchors.sort(key=lambda a: (-rank[a], a))
    back, ahead = (
        length(max(0, position + 1 - first), f, config) for f in (config.backward_factor, config.forward_factor)
    )
    last = min(position - window(config), len(keep) - 1)
    found = [Slot(scores[a], a, max(a - back, first), min(a + ahead, last)) for a in anchors[: config.num_spans]]
    return found + [Slot()] * (config.num_spans - len(found))


def search(
    q: torch.Tensor,
    k: torch.Tensor,
    config: SuperlinearConfig,
    positions: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
    firsts: list[int] | None = None,
) -> list[list[list[list[Slot]]]]:
    """By [row][query][head], of q [B, T, H, D] and k [B, N, Hkv, D]; positions [B, T], keep [B, N], firsts of packed queries."""
    batch, tokens, heads = q.shape[:3]
    keys = k.shape[1]
    if positions is None:
        positions = torch.arange(keys - tokens, keys).expand(batch, tokens)
    group = heads // k.shape[2]
    scores = torch.einsum("bthd,bnhd->bthn", q.double(), k.double().repeat_interleave(group, 2)) * config.search_scale
    rank = scores
    if config.route_per == "group":
        rank = scores.unflatten(2, (-1, group)).sum(3).repeat_interleave(group, 2)
    found = []
    for b in range(batch):
        kept = [True] * keys if keep is None else keep[b, :keys].tolist()
        first = kept.index(True) if True in kept else 0
        rows = []
        for t in range(tokens):
            begin = first if firsts is None else firsts[t]
            both = zip(scores[b, t].tolist(), rank[b, t].tolist(), strict=True)
            rows.append([slots(config, int(positions[b, t]), begin, kept, *pair) for pair in both])
        found.append(rows)
    return found


def stacked(found: Any, name: str) -> torch.Tensor:
    """[B, T, H, num_spans] of one of the fields."""
    return torch.tensor([[[[getattr(slot, name) for slot in head] for head in row] for row in rows] for rows in found])


def exact(*shape: int) -> torch.Tensor:
    """Multiples of 1/4 that 16 bits hold and whose products float32 sums exactly: all backends choose the same, ties included."""
    return (torch.randn(shape) * 4).round().clamp(-16, 16) / 4


every_backend = backend_params("span_search")
