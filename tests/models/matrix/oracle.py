"""The truth: a float64 model that runs every row alone, without padding and without a cache.

Its softmax is transformers' eager one under masks made here; CATS and LAWCAT are written out again below, in the form of sums
over all earlier tokens. Nothing of the package is used.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..spans import ByHand
from . import kinds
from .kinds import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, Kind

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class Conversion:
    """What is converted, with the options that it has.

    Attributes:
        name: in the ids of tests.
        cats: whether the MLPs are.
        lawcat, superlinear: options of the attention layers that are; None where none is.
        layers: their numbers, from the end if negative; None for all.
    """

    name: str
    cats: bool = False
    lawcat: dict[str, Any] | None = None
    superlinear: dict[str, Any] | None = None
    layers: tuple[int, ...] | None = None

    def converts(self, layer: int, count: int) -> bool:
        """Whether the attention of this layer is converted in a model of `count` layers."""
        return self.attends and (self.layers is None or layer in {n % count for n in self.layers})

    @property
    def attends(self) -> bool:
        """Whether any attention layer is converted."""
        return self.lawcat is not None or self.superlinear is not None

    def new_parameters(self, layer: int) -> dict[str, torch.Tensor]:
        """What a converted attention layer adds, by name: random values of the shapes that docs imply."""
        shapes = (
            _of_lawcat(self.lawcat) if self.lawcat is not None else {"q_search_proj.weight": (HEADS * HEAD_DIM, HIDDEN)}
        )
        found = {}
        for name, shape in shapes.items():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{layer}.{name}".encode()))
            found[name] = 0.5 * torch.randn(shape, generator=generator)
        return found


def _of_lawcat(options: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    taps, rank, features = options.get("conv_size", 4), 16, HEAD_DIM // 2
    shapes: dict[str, tuple[int, ...]] = {f"conv_{name}.weight": (HEADS * HEAD_DIM, 1, taps) for name in "qk"}
    maps = ("feature_map",) if options.get("tie_qk_feature_map", True) else ("feature_map", "feature_map_k")
    shapes |= {f"{name}.layer": (HEADS, HEAD_DIM, features) for name in maps}
    if options.get("gate", "vector") == "vector":
        gates = KV_HEADS * 2 * features
        shapes |= {"gate.0.weight": (rank, HIDDEN), "gate.1.weight": (gates, rank), "gate.1.bias": (gates,)}
    if options.get("window_size"):
        shapes["window_factor"] = (HEADS,)
    return shapes


# --- layers ----------------------------------------


class Lawcat(nn.Module):
    """LAWCAT (arXiv 2509.18467) of one sequence at once: weights [T, T] of every head, and one denominator."""

    def __init__(self, attention: nn.Module, new: dict[str, torch.Tensor], options: dict[str, Any]) -> None:
        super().__init__()
        self.attention, self.options, self.new = attention, options, new

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        x, options, of = hidden_states[0], self.options, self.attention
        t = x.shape[0]
        q, k, v = (getattr(of, f"{n}_proj")(x) for n in "qkv")
        q, k = (self._normed(n, y) for n, y in (("q", q), ("k", k)))
        q, k, v = (y.unflatten(-1, (-1, HEAD_DIM)) for y in (q, k, v))
        k, v = (y.repeat_interleave(HEADS // KV_HEADS, 1) for y in (k, v))  # [T, HQ, d]
        cos, sin = (
            (p[0].double()[:, None] for p in position_embeddings) if getattr(of, "use_rope", True) else (1.0, 0.0)
        )
        rotated = [y * cos + torch.cat([-y[..., HEAD_DIM // 2 :], y[..., : HEAD_DIM // 2]], -1) * sin for y in (q, k)]
        if options.get("rope") == "linear":
            q, k = rotated
        phi_q, phi_k = self._features("q", q), self._features("k", k)
        total = self._gates(x).cumsum(0)  # [T, HQ, K], of all tokens up to this one
        decay = total[:, None] - total[None]
        age = torch.arange(t)[:, None] - torch.arange(t)  # of the key's token, seen from the query's
        far = torch.einsum("thk,ihk,tihk->hti", phi_q, phi_k, torch.where((age >= 0)[..., None, None], decay, 0).exp())
        window = options.get("window_size", 0)
        far = torch.where(age >= (window if not options.get("linear_covers_window", True) else 0), far, 0)
        scale = options.get("linear_scale") or phi_q.shape[-1] ** -0.5
        weights = scale * far
        if window:
            logits, cap = (
                torch.einsum("thd,ihd->hti", *rotated) * of.scaling,
                getattr(of, "attn_logit_softcapping", None),
            )
            logits = logits if cap is None else cap * (logits / cap).tanh()
            logits = torch.where((age >= 0) & (age < window), logits, -torch.inf)
            near = (logits - logits.amax(-1, keepdim=True)).exp()
            weights = weights + self.new["window_factor"].sigmoid()[:, None, None] * near
        o = torch.einsum("hti,ihd->thd", weights / (weights.sum(-1, keepdim=True) + 1e-10), v)
        return of.o_proj(o.flatten(1))[None], None

    def _normed(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """q or k [T, H d]; the norm, where there is one, is of each head, or in OLMo 2 of all of them together."""
        norm = getattr(self.attention, f"{name}_norm", None)
        return x if norm is None else norm(x.view(x.shape[0], -1, norm.weight.shape[0])).flatten(1)

    def _features(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Convolution over time, channel by channel, and the map: [T, HQ, 2 f]."""
        taps = self.new[f"conv_{name}.weight"].view(HEADS, HEAD_DIM, -1)
        size = taps.shape[-1]
        past = F.pad(x, (0, 0, 0, 0, size - 1, 0)).unfold(0, size, 1)
        own = "feature_map.layer" if name == "q" or "feature_map_k.layer" not in self.new else "feature_map_k.layer"
        y = torch.einsum("thdw,hdw,hdf->thf", past, taps, self.new[own])
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)

    def _gates(self, x: torch.Tensor) -> torch.Tensor:
        """Logarithms of the decays, [T, HQ, K]."""
        if "gate.1.bias" not in self.new:
            return x.new_zeros(1, 1, 1).expand(x.shape[0], HEADS, 1)
        logits = F.linear(F.linear(x, self.new["gate.0.weight"]), self.new["gate.1.weight"], self.new["gate.1.bias"])
        g = F.logsigmoid(logits) / 16
        return g.unflatten(-1, (KV_HEADS, -1)).repeat_interleave(HEADS // KV_HEADS, 1)


class Cats(nn.Module):
    """A gated MLP whose small gates are zero (CATS, arXiv 2404.08763); `magnitudes` are those of its last calls."""

    def __init__(self, mlp: nn.Module, activation: str) -> None:
        super().__init__()
        self.mlp, self.act, self.threshold = mlp, ACTIVATIONS[activation], -1.0
        self.magnitudes: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self.mlp, "gate_up_proj"):
            z, u = self.mlp.gate_up_proj(x).chunk(2, -1)
        else:
            z, u = self.mlp.gate_proj(x), self.mlp.up_proj(x)
        s = self.act(z)
        self.magnitudes.append(s.detach().abs().flatten())
        return self.mlp.down_proj(torch.where(s.abs() > self.threshold, s, 0) * u)

    def choose(self) -> None:
        """A threshold that about half of the gates fall below, in the widest gap there: no rounding moves one across."""
        values = torch.cat(self.magnitudes).sort()[0]
        middle = values[int(0.4 * len(values)) : int(0.6 * len(values))]
        widest = int(middle.diff().argmax())
        self.threshold = float((middle[widest] + middle[widest + 1]) / 2)


# --- models ----------------------------------------


@dataclass
class Truth:
    """What a model says about the rows, and with which thresholds; gradients of `probe * logits` for the adapters."""

    logits: list[torch.Tensor]
    thresholds: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


def truth(
    kind: Kind, conversion: Conversion, adapted: bool, rows: list[torch.Tensor], columns: list[torch.Tensor]
) -> Truth:
    """Of rows of token ids [T_r], which stand in these columns of a batch: softmax with a window, or by spans, counts those."""
    model = kind.model()
    if adapted:
        kinds.adapt(model)
    model.double()
    count = len(kind.windows)
    masks: dict[str, Any] = {}
    for number, layer in enumerate(model.model.layers):
        if conversion.converts(number, count):
            new = {name: value.double() for name, value in conversion.new_parameters(number).items()}
            if conversion.lawcat is not None:
                layer.self_attn = Lawcat(layer.self_attn, new, conversion.lawcat)
            else:
                search = (new["q_search_proj.weight"], None)
                layer.self_attn = ByHand(layer.self_attn, search, conversion.superlinear or {}, masks)
        else:
            layer.self_attn.register_forward_pre_hook(_masked(masks, kind.windows[number]), with_kwargs=True)
        if conversion.cats:
            config = model.config
            layer.mlp = Cats(layer.mlp, getattr(config, "hidden_activation", None) or config.hidden_act)

    def run() -> list[torch.Tensor]:
        found = []
        for row, places in zip(rows, columns, strict=True):
            masks["columns"] = places
            found.append(model(row[None], position_ids=torch.arange(len(row))[None], use_cache=False).logits[0])
        return found

    sparse = [module for module in model.modules() if isinstance(module, Cats)]
    with torch.no_grad():
        for module in sparse:  # a layer's gates depend on the thresholds before it
            module.magnitudes.clear()
            run()
            module.choose()
    logits = run()
    trained = kinds.adapters(model)
    if trained:
        sum((probe(y) * y).sum() for y in logits).backward()
    return Truth(
        [y.detach() for y in logits],
        [module.threshold for module in sparse],
        {name.replace(".mlp.mlp.", ".mlp.").replace(".attention.", "."): p.grad for name, p in trained.items()},
    )


def probe(logits: torch.Tensor) -> torch.Tensor:
    """Weights of a loss that any gradient shows in."""
    return torch.arange(logits.numel(), dtype=logits.dtype).cos().view(logits.shape)


def _masked(masks: dict[str, Any], window: int | None) -> Callable[..., Any]:
    """A hook that gives a softmax layer the mask of a row whose tokens stand in `masks["columns"]`."""

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        age = masks["columns"][:, None] - masks["columns"]
        visible = (age >= 0) if window is None else (age >= 0) & (age < window)
        mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)
        return args, kwargs | {"attention_mask": mask[None, None]}

    return hook
