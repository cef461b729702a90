"""StreamingLLM by hand, in plain PyTorch, one token after the other: what models with sinks and a window are judged by."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import nn

Span = tuple[int, int]  # sinks and window of a layer


class Stream:
    """A model of transformers whose layers keep raw keys in lists, and rotate all of them anew for every token.

    Projections, norms and all that is not attention are the model's own.

    Args:
        model: not converted, and not changed; computed in its dtype.
        spans: of every layer.
        positions: "cache" or "absolute".
    """

    def __init__(self, model: Any, spans: list[Span], positions: str = "cache") -> None:
        self.model, self.absolute, self.seen = copy.deepcopy(model), positions == "absolute", 0
        self.apply = sys.modules[type(model).__module__].apply_rotary_pos_emb
        for layer, span in zip(self.model.model.layers, spans, strict=True):
            attention, held = layer.self_attn, ([], [], [])
            attention.forward = lambda hidden_states, _of=(attention, held, span), **_: (
                self._attend(*_of, hidden_states),
                None,
            )

    def __call__(self, token: int) -> torch.Tensor:
        """Logits [V] after one more token."""
        logits: torch.Tensor = self.model(torch.tensor([[token]]), use_cache=False).logits[0, -1]
        self.seen += 1
        return logits

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Those after each of the tokens, [T, V]."""
        return torch.stack([self(token) for token in tokens])

    def greedy(self, prompt: list[int], new: int) -> list[int]:
        """The prompt's continuation; the last token of it is not fed."""
        last = self.logits(prompt)[-1]
        found = []
        for _ in range(new):
            found.append(int(last.argmax()))
            last = self(found[-1]) if len(found) < new else last
        return found

    def _attend(self, attention: Any, held: tuple[list[Any], list[Any], list[int]], span: Span, x: Any) -> torch.Tensor:
        (sinks, window), width = span, attention.head_dim
        q, k, v = (p(x) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = (_normed(getattr(attention, name, None), y, width) for name, y in (("q_norm", q), ("k_norm", k)))
        keys, values, places = held
        for kept, new in ((keys, k), (values, v.view(1, -1, width).transpose(0, 1)), (places, self.seen)):
            kept.append(new)
            if len(kept) > sinks + window:
                del kept[sinks]
        here = torch.tensor(places) if self.absolute else torch.arange(len(keys))
        q = self._rotated(attention, q, here[-1:])
        k = self._rotated(attention, torch.cat(keys, 1), here)
        groups = q.shape[0] // k.shape[0]
        k, value = (y.repeat_interleave(groups, 0) for y in (k, torch.cat(values, 1)))
        scores = q @ k.mT * getattr(attention, "scaling", width**-0.5)
        if getattr(attention, "sinks", None) is not None:
            scores = torch.cat([scores, attention.sinks.view(-1, 1, 1)], -1)
        weights = scores.softmax(-1)[..., : k.shape[1]]
        return attention.o_proj((weights @ value).transpose(0, 1).reshape(1, 1, -1))

    def _rotated(self, attention: Any, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """x [H, N, D] at places [N], by the model's own function and frequencies, with angles in float64."""
        if not getattr(attention, "use_rope", True):
            return x
        rotary: Any = self.model.model.rotary_emb
        if getattr(attention, "is_sliding", False):  # Gemma 3 in transformers 4.57
            rotary = getattr(self.model.model, "rotary_emb_local", rotary)
        kind = f"{getattr(attention, 'layer_type', None)}_"
        prefix = kind if hasattr(rotary, f"{kind}inv_freq") else ""
        angle = places.double()[:, None] * getattr(rotary, f"{prefix}inv_freq").double()
        if "Cohere" in type(attention).__name__:
            angle = angle.repeat_interleave(2, -1)
        elif "GptOss" not in type(attention).__name__:
            angle = torch.cat([angle, angle], -1)
        scaling = getattr(rotary, f"{prefix}attention_scaling", 1.0)
        cos, sin = ((f(angle) * scaling).to(x.dtype)[None] for f in (torch.cos, torch.sin))
        turned = getattr(attention, "rotary_ndims", x.shape[-1])
        y = self.apply(x[None, ..., :turned], x[None, ..., :turned], cos, sin)[0][0]
        return torch.cat([y, x[..., turned:]], -1)


def _normed(norm: nn.Module | None, x: torch.Tensor, width: int) -> torch.Tensor:
    """[H, 1, D] of x [1, 1, H D], normalised by head, or as in OLMo 2 together."""
    heads = x.view(1, -1, width)
    if norm is not None:
        together = norm.weight.shape[-1] != width
        heads = norm(x).view(1, -1, width) if together else norm(heads)
    return heads.transpose(0, 1)
