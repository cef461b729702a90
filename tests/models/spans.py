"""Superlinear attention by hand, in plain PyTorch, with a dense mask for every slot: what converted models are judged by."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import nn

Options = dict[
    str, Any
]  # sw_index, num_spans, backward_factor, forward_factor, span_power, exponent, search_scale, group


def mixed(
    search: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    places: torch.Tensor,
    scale: float,
    options: Options,
) -> torch.Tensor:
    """[T, H, D] of one sequence: q and queries of the search [T, H, D], keys and values [T, Hkv, D], in columns `places` [T]."""
    exponent, index = options.get("exponent", 2), options.get("sw_index", 0)
    window = math.floor((index + 1) ** exponent) - 1
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    age = places[:, None] - places
    offsets = [math.floor(i**exponent) for i in range(index + 1, int(places[-1]) + 2)]
    anchors = torch.isin(age + 1, torch.tensor(offsets))
    near = (age >= 0) & (age < window)
    seen = (places - places[0] + 1).tolist()
    power = options.get("span_power", 0.5)
    back, ahead = (
        torch.tensor([math.ceil(round(factor * t**power, 7)) for t in seen])
        for factor in (options.get("backward_factor", 2.0), options.get("forward_factor", 0.0))
    )
    products = torch.einsum("thd,ihd->thi", search, k) * options.get("search_scale", 1.0)
    rank = products.unflatten(1, (-1, group)).sum(2).repeat_interleave(group, 1) if options.get("group") else products
    rank = rank.masked_fill(~anchors[:, None], -torch.inf)
    logits = torch.einsum("thd,ihd->thi", q, k) * scale
    best, chosen = torch.sort(rank.detach(), dim=-1, descending=True, stable=True)  # the farther of two that are equal
    slots = min(options.get("num_spans", 3), len(seen))
    real = best[..., :slots] > -torch.inf
    scores = products.gather(-1, chosen)[..., :slots].masked_fill(~real, -torch.inf)
    gates = torch.where(real[..., :1], scores, 0.0).softmax(-1)
    out = torch.zeros_like(q)
    for slot in range(slots):
        anchor = places[chosen[..., slot]]
        low, high = anchor - back[:, None], torch.minimum(anchor + ahead[:, None], places[:, None] - window)
        inside = (places >= low[..., None]) & (places <= high[..., None]) & real[..., slot, None]
        visible = near[:, None] | inside
        hidden = ~visible & visible.any(-1, keepdim=True)  # a row that sees nothing has finite gradients, too
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(~visible, 0.0)
        out = out + gates[..., slot, None] * torch.einsum("thi,ihd->thd", weights, v)
    return out


class ByHand(nn.Module):
    """In the place of an attention of transformers, with its projections and norms; one row at a time, without padding.

    Args:
        attention: is called for nothing but its parts.
        search: weight of the projection of the search, and its bias or None.
        options: see `mixed`.
        columns: whose "columns" are where the tokens of the row stand; without it they stand side by side.
    """

    def __init__(
        self,
        attention: nn.Module,
        search: tuple[torch.Tensor, Any],
        options: Options,
        columns: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.attention, self.search, self.options = attention, search, options
        self.columns = {} if columns is None else columns

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        of, x = self.attention, hidden_states[0]
        width = of.head_dim
        q, k, v = (getattr(of, f"{n}_proj")(x) for n in "qkv")
        search = nn.functional.linear(x, *self.search)
        q, search = (self._normed("q_norm", y) for y in (q, search))
        q, k, v, search = (y.unflatten(-1, (-1, width)) for y in (q, self._normed("k_norm", k), v, search))
        if getattr(of, "use_rope", True):
            rotate = sys.modules[type(of).__module__].apply_rotary_pos_emb
            cos, sin = (p.to(x.dtype) for p in position_embeddings)
            q, k, search = (y.transpose(0, 1)[None] for y in (q, k, search))
            (q, k), (search, _) = rotate(q, k, cos, sin), rotate(search, k, cos, sin)
            q, k, search = (y[0].transpose(0, 1) for y in (q, k, search))
        places = self.columns.get("columns", torch.arange(x.shape[0]))
        return of.o_proj(mixed(search, q, k, v, places, of.scaling, self.options).flatten(1))[None], None

    def _normed(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The norm, where there is one, is of each head, or in OLMo 2 of all of them together."""
        norm = getattr(self.attention, name, None)
        return x if norm is None else norm(x.view(x.shape[0], -1, norm.weight.shape[0])).flatten(1)
