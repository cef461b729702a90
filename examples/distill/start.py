r"""Feature maps to start from: keys in groups, queries with what they would give to each group.

Softmax gives a key the weight exp(l - m) relative to the largest score m of the query's window. Linear attention can say
about that if the features of a key tell its group j, and those of a query are exp(l_j - m') for the scores l_j of the groups'
centres and a linear guess m' of m. A softmax over features does it where one more feature has the score m' + DELTA: the others
then are exp(l_j - m' - DELTA), as long as that is small, and the factor of the window is exp(-DELTA). No key has that feature:
its channel decays at once.

The first token of a text, which takes half of the attention of most heads, is a group of its own. So a model has most of its
attention before any training; what training adds is what groups and guesses do not catch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from subquad.nn import LawcatAttention

DELTA = 3.0
GATES = (6.0, -20.0, -2.0)  # biases of the groups' gates, of the channel that no key has, and of the softmax of -y
MARGIN = 10.0  # of the scores that a key's own group has over the others, at first
ROUNDS, STEPS = 6, 60  # of the grouping, and of learning to tell the groups
HEAVIEST, LIGHTEST = 50.0, 0.2  # weight of a key, as attention that it gets, relative to the mean
SINK = 0.05  # weight of first tokens among all keys


@torch.no_grad()
def start(student: nn.Module, teacher: nn.Module, ids: Sequence[torch.Tensor], seed: int) -> None:
    """Set feature maps, gates and window factors of every LAWCAT layer, from what the teacher does on some texts [1, T]."""
    layers = {name: m for name, m in student.named_modules() if isinstance(m, LawcatAttention)}
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    hooks = [
        teacher.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, into=into: into.append((kwargs["hidden_states"], kwargs["position_embeddings"])),
            with_kwargs=True,
        )
        for name, into in inputs.items()
    ]
    try:
        for text in ids:
            teacher.model(text, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for name, layer in layers.items():
        _start(layer, inputs.pop(name), torch.Generator().manual_seed(seed))


def _start(layer: LawcatAttention, inputs: Sequence[Any], generator: torch.Generator) -> None:
    group, features = layer.num_heads // layer.num_kv_heads, layer.feature_dim
    seen = [_attention(layer, x, positions) for x, positions in inputs]
    queries, keys, weights, peaks, sinks = (torch.cat(parts, 1) for parts in zip(*seen, strict=True))
    texts = [x.shape[1] for x, _ in inputs]
    first = torch.zeros(keys.shape[1], dtype=torch.bool)
    first[torch.tensor([0, *texts[:-1]]).cumsum(0)] = True
    reach = _reach(layer, inputs[0][1])
    for head in range(layer.num_kv_heads):
        k, w = keys[head], weights[head]
        centres = _centres(k[~first] * reach.sqrt(), w[~first], features - 2, generator)
        own = torch.cdist(k * reach.sqrt(), centres).argmin(1) + 1
        own[first] = 0
        w = torch.where(first, SINK * w[~first].sum() / first.sum(), w)
        layer.feature_map_k.layer[head * group : (head + 1) * group] = _tell(k, own, w, features)
        for i in range(head * group, (head + 1) * group):
            q = queries[i]
            fits = _least_squares(q, torch.stack([sinks[i], peaks[i] + DELTA], 1))
            towards = centres.T * reach.sqrt()[:, None] * layer.head_dim**-0.5
            layer.feature_map.layer[i] = torch.cat([fits[:, :1], towards, fits[:, 1:]], 1)
    bias = layer.gate[-1].bias.view(layer.num_kv_heads, -1)
    bias[:, : features - 1], bias[:, features - 1], bias[:, features:] = GATES
    layer.window_factor.fill_(-math.log(math.expm1(DELTA)))  # whose sigmoid is exp(-DELTA)


def _attention(layer: LawcatAttention, x: torch.Tensor, positions: Any) -> tuple[torch.Tensor, ...]:
    """Of one text: q [H, T', d] and k [HKV, T, d] before rotation, the weight of each key, and the largest score in the window
    and the score of the first token [H, T'], for the T' queries that see more than a window."""
    window, heads, group = layer.window_size, layer.num_kv_heads, layer.num_heads // layer.num_kv_heads
    q, k, _ = layer._heads(x, positions)
    rotated = (layer.scores.rotate(y, positions)[0].transpose(0, 1) for y in (q, k))
    scores = torch.einsum("hgqd,hkd->hgqk", next(rotated).unflatten(0, (heads, group)), next(rotated)).flatten(0, 1)
    scores = scores * layer.head_dim**-0.5
    row, column = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])
    far = column <= row - window
    weights = scores.masked_fill(column > row, -torch.inf).softmax(-1)
    received = (weights * far).sum(1) / far.sum(0).clamp_min(1)
    received = received.unflatten(0, (heads, group)).mean(1)
    received = (received / received.mean(1, keepdim=True)).clamp_max(HEAVIEST) + LIGHTEST
    peaks = scores.masked_fill((column > row) | far, -torch.inf).amax(-1)
    q, k = (y[0].transpose(0, 1) for y in (q, k))
    return q[:, window:], k, received, peaks[:, window:], scores[:, window:, 0]


def _reach(layer: LawcatAttention, positions: Any) -> torch.Tensor:
    """What is left of each channel's part in a score on average over far distances: the cosine of its angle, or nothing."""
    cos = positions[0][0].float()
    return cos[layer.window_size :].mean(0).clamp_min(0)


def _centres(x: torch.Tensor, weights: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Weighted k-means: centres [count, d] of x [N, d]."""
    centres = x[torch.multinomial(weights, count, generator=generator)]
    for _ in range(ROUNDS):
        belongs = F.one_hot(torch.cdist(x, centres).argmin(1), count) * weights[:, None]
        total = belongs.sum(0)[:, None]
        centres = torch.where(total > 0, belongs.T @ x / total.clamp_min(1e-9), centres)
    return centres


def _least_squares(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """W [d, n] with x W near y, slightly damped."""
    weighted = x if weights is None else x * weights[:, None]
    moments = weighted.T @ x
    damping = 0.01 * moments.diagonal().mean() * torch.eye(len(moments))
    return torch.linalg.solve(moments + damping, weighted.T @ y)


def _tell(k: torch.Tensor, own: torch.Tensor, weights: torch.Tensor, features: int) -> torch.Tensor:
    """W [d, features] with which softmax(k W) is the group of each key, by weighted cross-entropy."""
    guess = MARGIN * _least_squares(k, F.one_hot(own, features).float(), weights)
    rate = 0.3 * k.square().mean().rsqrt().item()
    with torch.enable_grad():
        w = guess.requires_grad_()
        optimizer = torch.optim.Adam([w])
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / STEPS)
            loss = F.cross_entropy(k @ w, own, reduction="none") @ weights / weights.sum() + 1e-5 * w.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return w.detach()
