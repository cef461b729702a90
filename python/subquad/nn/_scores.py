"""How a softmax attention scores its keys: taken over for the window of a layer that is made from it, or refused.

Libraries have many forms of rotation, norm and scaling. Rather than by names, the form is found by calling the attention with
projections of ours: numbers that tell every form from every other, whatever its weights are and wherever they lie.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

PROBED = 5  # tokens
_FAR = 1 << 20  # their position: a score that depends on it shows


@dataclass(frozen=True)
class Scores:
    """softcap tanh(scaling q k^T / softcap) of rotated q and k.

    Attributes:
        scaling: None for d ** -0.5.
        softcap: None for none.
        rotation: of q and k, one of `ROTATIONS`.
        positions_needed: False: an attention that is given no positions does not rotate.
    """

    scaling: float | None = None
    softcap: float | None = None
    rotation: str = "halves"
    positions_needed: bool = True

    def of(self, products: torch.Tensor, width: int) -> torch.Tensor:
        """Of q k^T of heads of this width."""
        scores = products * (width**-0.5 if self.scaling is None else self.scaling)
        return scores if self.softcap is None else (scores / self.softcap).tanh() * self.softcap

    def rotate(self, x: torch.Tensor, positions: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """x [B, T, H, d], whose first channels are rotated by cos and sin [B|1, T, <= d]."""
        if positions is None or self.rotation == "none":
            return x
        cos, sin = (p.unsqueeze(2) for p in _angles(positions, x))
        if self.rotation == "once":
            cos, sin = (torch.cat([p, p], -1) for p in (cos, sin))
        turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
        if self.rotation == "spread":
            cos, sin = (p[..., : p.shape[-1] // 2].repeat_interleave(2, -1) for p in (cos, sin))
        if self.rotation in ("halves", "once"):
            a, b = turned.chunk(2, -1)
            across = torch.cat([-b, a], -1)
        else:
            a, b = turned.unflatten(-1, (-1, 2)).unbind(-1)
            across = torch.stack([-b, a], -1).flatten(-2)
        return torch.cat([turned * cos + across * sin, rest], -1).to(x.dtype)


def _angles(given: object, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) as a model gives them, of tokens as x [B, T, H, d] has."""
    if not isinstance(given, tuple | list) or len(given) != 2 or not all(isinstance(p, torch.Tensor) for p in given):
        raise TypeError(f"position_embeddings: expected (cos, sin), two tensors, got {type(given).__name__}")
    batch, tokens, _, width = x.shape
    for p in given:
        if p.dim() != 3 or p.shape[0] not in (1, batch) or p.shape[1] != tokens or p.shape[2] > width:
            expected = f"cos and sin of shape [1 or {batch}, {tokens}, at most {width}]"
            raise ValueError(f"position_embeddings: expected {expected}, got {list(p.shape)}")
    cos, sin = given
    return cos, sin


LLAMA = Scores()
# Channels i and i + d/2 are a pair, with an angle for every channel (Llama) or one for both (gpt-oss); 2i and 2i + 1 are, with an
# angle for every channel (Cohere), or with those of the first half, each for a pair (GLM); or nothing is rotated.
ROTATIONS = ("halves", "once", "interleaved", "spread", "none")


def normed(norm: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    """x [B, T, H, d] with every head normalised, or as in OLMo 2 all heads together: the width of the norm's weight tells."""
    if norm is None:
        return x
    weight, width = getattr(norm, "weight", None), x.shape[-1]
    together = isinstance(weight, torch.Tensor) and weight.shape[-1] != width
    out: torch.Tensor = norm(x.flatten(2)).unflatten(-1, (-1, width)) if together else norm(x)
    return out


@torch.no_grad()
def scores_of(attention: nn.Module, heads: int, kv_heads: int, width: int) -> Scores:
    """How an attention of transformers scores its keys.

    Args:
        attention: with q_proj, k_proj, v_proj and o_proj; q_norm, k_norm and sinks if it has them. It is neither called nor
            changed.
        heads, kv_heads, width: HQ, HKV and d.

    Raises:
        ValueError: none of the forms that `Scores` has.
    """
    scaling, softcap = (_number(getattr(attention, name, None)) for name in ("scaling", "attn_logit_softcapping"))
    if type(attention).forward is nn.Module.forward:  # parts alone
        return Scores(scaling, softcap)
    probe = _Probe(attention, heads, kv_heads, width, (scaling or width**-0.5) * width**0.5)
    kind, failure = type(attention).__name__, None
    for rotated in range(width - width % 2, 0, -2):  # some take no other number of channels than theirs
        positions = probe.positions(rotated)
        try:
            got = probe.called(positions)
        except Exception as error:  # whatever it needs that it has not been given
            failure = failure or error
            continue
        for cap in {softcap, None}:
            for rotation in ROTATIONS if 2 * rotated <= width else [r for r in ROTATIONS if r != "once"]:
                scores = Scores(scaling, cap, rotation)
                if _same(got, probe.computed(scores, positions)):
                    return Scores(scaling, cap, rotation, not probe.goes_without(scores))
        raise ValueError(
            f"attention: expected softmax of q and k that are normalised, then rotated; a {kind} computes something else"
        )
    raise ValueError(
        f"attention: expected one that can be called with position_embeddings (cos, sin); a {kind} cannot: {failure}"
    ) from failure


class _Probe:
    """An attention whose projections give numbers of ours, and what it should make of them."""

    attention: Any

    def __init__(self, attention: Any, heads: int, kv_heads: int, width: int, scale: float) -> None:
        self.generator = torch.Generator("cpu").manual_seed(0)
        self.width, self.hidden_size = width, attention.q_proj.in_features
        self.q = (
            self._random(heads, width) * 4 / scale
        )  # scores that a softmax does not flatten, nor a softcap leave alone
        self.k = self._random(kv_heads, width)
        self.v = self._random(kv_heads, width) * 1000  # which a bound would cut
        self.norms = [_standing(getattr(attention, name, None)) for name in ("q_norm", "k_norm")]
        parts: dict[str, nn.Module | None] = dict(zip(("q_norm", "k_norm"), self.norms, strict=True))
        parts |= {"q_proj": _Given(self.q), "k_proj": _Given(self.k), "v_proj": _Given(self.v), "o_proj": nn.Identity()}
        self.attention = copy.copy(attention)
        modules = {name: part for name, part in parts.items() if name in attention._modules}
        self.attention.__dict__ |= {"_modules": attention._modules | modules, "training": False}
        self.sinks = None
        if attention._parameters.get("sinks") is not None:
            self.sinks = nn.Parameter(self._random(heads)[0, 0])
            self.attention.__dict__["_parameters"] = attention._parameters | {"sinks": self.sinks}
        if hasattr(attention, "config"):
            self.attention.__dict__["config"] = _Eager(attention.config)

    def _random(self, *size: int) -> torch.Tensor:
        size = (1, PROBED, *size)
        return torch.randn(size, generator=self.generator, device="cpu", dtype=torch.float32)

    def positions(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Every channel has an angle of its own, so that it shows which are used for which."""
        angles = self._random(width)
        return angles.cos(), angles.sin()

    def called(self, positions: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """By the class, since hooks and whatever wraps the forward of the object belong to its weights."""
        options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        mask = torch.full((PROBED, PROBED), torch.finfo(torch.float32).min, **options).triu(1)[None, None]
        out = type(self.attention).forward(
            self.attention,
            hidden_states=torch.ones(1, PROBED, self.hidden_size, **options),
            position_embeddings=positions,
            attention_mask=mask,
            position_ids=torch.arange(_FAR, _FAR + PROBED, device="cpu")[None],
        )
        return out[0] if isinstance(out, tuple) else out

    def computed(self, scores: Scores, positions: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        q, k = (scores.rotate(normed(n, x), positions) for n, x in zip(self.norms, (self.q, self.k), strict=True))
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, self.v))
        products = scores.of(torch.einsum("bqhd,bkhd->bhqk", q, k), self.width)
        hidden = torch.ones_like(products, dtype=torch.bool).triu(1)
        products = products.masked_fill(hidden, -torch.inf)
        if self.sinks is not None:
            products = torch.cat([products, self.sinks[:, None, None].expand(*products.shape[:3], 1)], -1)
        weights = products.softmax(-1)[..., :PROBED]
        return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)

    def goes_without(self, scores: Scores) -> bool:
        """Whether it takes None for positions and rotates nothing then."""
        try:
            got = self.called(None)
        except Exception:
            return False
        return _same(got, self.computed(scores, None))


class _Given(nn.Module):
    """A projection to given numbers [1, T, H, d], times what it is called with, so that a factor shows."""

    def __init__(self, out: torch.Tensor) -> None:
        super().__init__()
        self.out = out.flatten(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out * x[..., :1]


class _Ramp(nn.Module):
    """In the place of a norm: a factor for every channel, which shows what it comes before, and over which width it goes."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.weight = torch.linspace(0.5, 1.5, shape.numel(), device="cpu", dtype=torch.float32).view(shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def _standing(norm: nn.Module | None) -> nn.Module | None:
    """What a probe has for a norm: one without a weight is itself."""
    weight = getattr(norm, "weight", None)
    return _Ramp(weight.shape) if isinstance(weight, torch.Tensor) else norm


class _Eager:
    """A config, but for the implementation: the only one that every attention has, and that takes any mask anywhere."""

    _attn_implementation = "eager"

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) else None


def _same(got: Any, expected: torch.Tensor) -> bool:
    if not isinstance(got, torch.Tensor) or got.shape != expected.shape:
        return False
    return bool((got - expected).norm() <= 1e-5 * expected.norm())
