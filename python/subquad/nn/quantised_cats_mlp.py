"""`QuantisedCATSMLP`: the gated MLP of CATS on weights in few bits, and its down projection, stored neuron by neuron."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from .. import _checks
from ..ops._autograd import once_differentiable
from ..ops.quantised_cats_mlp import quantised_cats_mlp
from ..ops.quantised_linear import quantise
from ..reference._common import upcast
from ..reference.quantised_cats_mlp import by_neuron, dequantise_down
from ..reference.quantised_linear import FORMATS, GROUP
from ._children import plain, set_mode
from ._codes import Codes, LinearCodes
from ._gated import GatedParts, activation_name, gated_parts
from ._options import CatsConfig
from .cats_mlp import CATSMLP, DENSE, GatedMLP
from .quantised_linear import QuantisedLinear

_BLOCK = 512  # neurons that are dequantised at a time


class QuantisedDown(LinearCodes):
    """The down projection y = h W^T + b of a gated MLP, with the codes of a neuron behind each other.

    `weight` is a uint8 buffer: rows of `subquad.quantise` of the transposed weight, [I, row bytes]. With `scales`, where 32
    neurons share the scales of a channel, it is the codes alone; that is how the down projection of a GGUF file looks from here.
    Both as `subquad.quantised_cats_mlp` takes them.

    Args:
        in_features: I, the number of neurons; with shared scales a multiple of 32.
        out_features: H, a multiple of 32.
        bias: whether there is one.
        format: "int8", "int4" or "int4_min".
        shared: whether 32 neurons share their scales.
        device: of weight and bias.
        dtype: of the bias.

    Raises:
        ValueError: sizes without groups of 32, an unknown format.
    """

    scales: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: str = "int8",
        shared: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, format, "out_features", device, dtype)
        _checks.flag("shared", shared)
        if shared and in_features % GROUP:
            raise ValueError(f"in_features: expected a multiple of {GROUP} with shared scales, got {in_features}")
        kind, made = FORMATS[format], {"dtype": torch.uint8, "device": device}
        row = out_features // GROUP * (kind.code_bytes if shared else kind.group_bytes)
        numbers = out_features * (kind.group_bytes - kind.code_bytes)
        self.register_buffer("weight", torch.zeros((in_features, row), **made))  # type: ignore[arg-type]
        scales = torch.zeros((in_features // GROUP, numbers), **made) if shared else None  # type: ignore[arg-type]
        self.register_buffer("scales", scales)

    @property
    def shared(self) -> bool:
        """Whether 32 neurons share the scales of a channel."""
        return self.scales is not None

    @classmethod
    def from_linear(cls, linear: nn.Linear | QuantisedLinear, weights: str | None = None) -> QuantisedDown:
        """The layer with its weight quantised neuron by neuron, or with the very codes of a `QuantisedLinear`.

        Args:
            linear: an `nn.Linear` [I -> H], whose scales will belong to neurons; or a `QuantisedLinear`, whose groups lie along
                the neurons, so that 32 of them share scales.
            weights: "int8", "int4" or "int4_min"; None for "int8", or for the format of the codes.

        Raises:
            TypeError: `linear` is something else, or has adapters or hooks.
            ValueError: a size without groups of 32, weights that are not finite, another format than the codes have.
        """
        if plain(linear, QuantisedLinear):
            if weights not in (None, linear.format):
                raise ValueError(f"weights: expected {linear.format!r}, which the codes are in, got {weights!r}")
            parts: tuple[torch.Tensor, torch.Tensor | None] = by_neuron(linear.weight, linear.format)
            weights = linear.format
        elif plain(linear, nn.Linear):
            weights = "int8" if weights is None else weights
            parts = quantise(linear.weight.t(), weights), None
        else:
            kind = type(linear).__name__
            raise TypeError(f"linear: expected an nn.Linear or a QuantisedLinear without adapters or hooks, got {kind}")
        self = cls(
            linear.in_features, linear.out_features, False, format=weights, shared=parts[1] is not None, device="meta"
        )
        self.weight, self.scales = parts
        self.bias = linear.bias
        return self.train(linear.training)

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The dense layer that computes the same: its weight is what the codes stand for, its bias the same parameter.

        Args:
            dtype: of the weight; None for that of the bias, or float32.

        Raises:
            TypeError: dtype is no floating one.
        """
        dtype = self._dense_dtype(dtype)
        wide = dtype if dtype == torch.float64 else torch.float32
        weight = torch.empty((self.out_features, self.in_features), dtype=dtype, device=self.weight.device)
        for neurons, block in _blocks(self.weight, self.scales, self.format, wide):
            weight[:, neurons] = block.t().to(dtype)
        return self._dense(weight)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """y `[..., H]` of h `[..., I]`, in h's dtype, through blocks of dequantised rows; `QuantisedCATSMLP` skips rows."""
        _checks.tensor("h", h)
        if h.dim() == 0 or h.shape[-1] != self.in_features:
            raise ValueError(f"h: expected shape [..., {self.in_features}], got {list(h.shape)}")
        y: torch.Tensor = _Across.apply(h.reshape(-1, self.in_features), self.weight, self.scales, self.format)
        y = y if self.bias is None else y + upcast(self.bias)
        return y.to(h.dtype).view(*h.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, shared={self.shared}"


def _blocks(
    weight: torch.Tensor, scales: torch.Tensor | None, format: str, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Neurons, and the numbers of their rows."""
    for i in range(0, weight.shape[0], _BLOCK):
        own = None if scales is None else scales[i // GROUP : (i + _BLOCK) // GROUP]
        yield slice(i, i + _BLOCK), dequantise_down(weight[i : i + _BLOCK], format, own, dtype)


class _Across(torch.autograd.Function):
    """h W [N, H] of h [N, I] in float32 or float64. Of the weight only codes are kept for the backward."""

    @staticmethod
    def forward(
        ctx: Any, h: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None, format: str
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, scales)
        ctx.format, ctx.dtype = format, h.dtype
        wide = upcast(h)
        channels = weight.shape[1] // FORMATS[format].group_bytes * GROUP
        if scales is not None:
            channels = weight.shape[1] // FORMATS[format].code_bytes * GROUP
        y = wide.new_zeros((h.shape[0], channels))
        for neurons, block in _blocks(weight, scales, format, wide.dtype):
            y = y.addmm(wide[:, neurons], block)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, scales = ctx.saved_tensors
        parts = [grad_y @ block.t() for _, block in _blocks(weight, scales, ctx.format, grad_y.dtype)]
        grad_h = torch.cat(parts, 1) if parts else grad_y.new_zeros((grad_y.shape[0], 0))
        return grad_h.to(ctx.dtype), None, None, None


class QuantisedCATSMLP(CATSMLP):
    """`CATSMLP` on weights in few bits: `subquad.quantised_cats_mlp` as a module.

    gate_proj and up_proj (or a fused gate_up_proj) are `QuantisedLinear`s, down_proj is a `QuantisedDown`; names, biases,
    threshold, calibration and options are those of `CATSMLP`. The gate that is calibrated is the quantised one. Gradients reach x
    and the biases. A projection that is anything else (an adapter around it, a hook) is called: the same function, but nothing is
    skipped.

    Args:
        hidden_size: H, a multiple of 32.
        intermediate_size: I, the number of neurons.
        bias: whether all three projections have one.
        activation: "silu", "gelu_tanh", "gelu" or "relu".
        weights: "int8", "int4" or "int4_min".
        gate_weights: the format of the gate; None for that of the others. Codes of 8 bits flip twenty times fewer neurons than
            those of 4.
        shared: whether 32 neurons share the scales of the down projection, as in a GGUF file.
        device: of weights and biases.
        dtype: of the biases.
        options: the keyword arguments of `CATSMLP` from `threshold` on. `down_layout` means nothing here.

    Raises:
        ValueError: sizes without groups of 32, an unknown format or option, a NaN threshold.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        activation: str = "silu",
        weights: str = "int8",
        gate_weights: str | None = None,
        shared: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        nn.Module.__init__(self)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes = hidden_size, intermediate_size, bias
        self._take(
            {
                "gate_proj": QuantisedLinear(*sizes, format=weights if gate_weights is None else gate_weights, **made),
                "up_proj": QuantisedLinear(*sizes, format=weights, **made),
                "down_proj": QuantisedDown(intermediate_size, hidden_size, bias, format=weights, shared=shared, **made),
            },
            activation_name(activation),
            CatsConfig(**options),
        )

    def _take(self, projections: dict[str, nn.Module], activation: str, config: CatsConfig) -> None:
        for name, child in projections.items():
            self.add_module(name, child)
        self._remember(None)
        self._configure(activation, config)

    @classmethod
    def from_llama_mlp(
        cls,
        mlp: nn.Module,
        *,
        weights: str | None = None,
        gate_weights: str | None = None,
        share_weights: bool = True,
        lay_out: bool = True,
        **options: Any,
    ) -> QuantisedCATSMLP:
        """Build from a gated MLP, dense or with `QuantisedLinear`s, whose codes are taken as they are.

        Args:
            mlp: as in `CATSMLP.from_llama_mlp`.
            weights: "int8", "int4" or "int4_min"; None for "int8", and for the formats of what is quantised.
            gate_weights: the format of gate_proj; None for `weights`.
            share_weights: keep the very biases and codes; False copies them.
            lay_out: nothing here.
            options: the keyword arguments of `CATSMLP` from `threshold` on.

        Raises:
            ValueError: as there; or H is no multiple of 32, a projection is quantised in another format, `gate_weights` of a
                fused gate_up_proj, weights that are not finite. `mlp` is unchanged.
            TypeError: a projection to be quantised that has adapters or hooks; an unknown option.
        """
        self = cls._of(gated_parts(mlp), weights, gate_weights, CatsConfig(**options), mlp)
        set_mode(self, mlp.training, besides=mlp)
        return self if share_weights else copy.deepcopy(self)

    @classmethod
    def from_cats(
        cls, mlp: CATSMLP, *, weights: str | None = None, gate_weights: str | None = None
    ) -> QuantisedCATSMLP:
        """Build from a `CATSMLP`, with its options and its threshold, which was calibrated on the gate as it was.

        Args:
            mlp: with dense projections or quantised ones.
            weights, gate_weights: as in `from_llama_mlp`.

        Raises:
            TypeError, ValueError: as `from_llama_mlp`.
        """
        if not isinstance(mlp, CATSMLP):
            raise TypeError(f"mlp: expected a CATSMLP, got {type(mlp).__name__}")
        options = {field.name: getattr(mlp, field.name) for field in fields(CatsConfig) if field.name != "threshold"}
        parts = GatedParts(dict(mlp.named_children()), mlp.activation)
        self = cls._of(parts, weights, gate_weights, CatsConfig(**options), mlp.original)
        self.threshold, self.cats_meta = mlp.threshold.clone(), mlp.cats_meta.clone()
        self.enabled = mlp.enabled
        set_mode(self, mlp.training, besides=mlp)
        return self

    @classmethod
    def _of(
        cls,
        parts: GatedParts,
        weights: str | None,
        gate_weights: str | None,
        config: CatsConfig,
        original: nn.Module | None,
    ) -> QuantisedCATSMLP:
        """Around projections that are quantised here, or already: then the original has them too, and is remembered."""
        if gate_weights is not None and "gate_up_proj" in parts.projections:
            raise ValueError(
                f"gate_weights: expected None for a fused gate_up_proj, whose rows have one format, got {gate_weights!r}"
            )
        coded = [name for name, child in parts.projections.items() if isinstance(child, Codes)]
        dense = [name for name in parts.projections if name not in coded]
        if coded and dense and weights is None:  # dense weights are not rounded unless somebody says so
            raise ValueError(
                f"mlp.{dense[0]}: expected a weight in few bits like {coded[0]}, got a dense one; give weights="
            )
        projections: dict[str, nn.Module] = {}
        for name, child in parts.projections.items():
            wanted = gate_weights if name == "gate_proj" and gate_weights is not None else weights
            try:
                projections[name] = _quantised(child, wanted, down=name == "down_proj")
            except (TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"mlp.{name}: {error}") from error
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._take(projections, parts.activation, config)
        if all(projections[name] is child for name, child in parts.projections.items()):
            self._remember(original)
        return self

    @property
    def formats(self) -> tuple[str, str, str]:
        """Of gate, up and down."""
        gate = self.gate_up_proj if self._fused else self.gate_proj
        return gate.format, (gate if self._fused else self.up_proj).format, self.down_proj.format

    def _readable(self, name: str, child: nn.Module) -> bool:
        return plain(child, QuantisedDown if name == "down_proj" else QuantisedLinear)

    def _read(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = self._projections()
        y: torch.Tensor = quantised_cats_mlp(  # type: ignore[assignment]
            x,
            gate[0],
            up[0],
            down.weight,
            self.threshold if self.enabled else DENSE,
            format=self.formats,
            down_scales=down.scales,
            b_gate=gate[1],
            b_up=up[1],
            b_down=down.bias,
            **self._options(),
        )
        return y

    def share_read(self, woken: torch.Tensor) -> float:
        """Scales that 32 neurons share are read if one of them is in `woken`."""
        (gate, _), (up, _), down = self._projections()
        read = gate.numel() + woken.float().mean().item() * (up.numel() + down.weight.numel())
        total = gate.numel() + up.numel() + down.weight.numel()
        if down.scales is not None:
            read += woken.unflatten(0, (-1, GROUP)).any(1).float().mean().item() * down.scales.numel()
            total += down.scales.numel()
        return read / total

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A `GatedMLP` with new dense weights, what the codes stand for; the threshold is left out.

        Args:
            dtype: of the weights; None for that of the biases, or float32.

        Raises:
            TypeError: dtype is no floating one.
            ValueError: a projection that is not quantised, or has an adapter.
        """
        children: dict[str, Any] = dict(self.named_children())
        for name, child in children.items():
            if not self._readable(name, child):
                raise ValueError(
                    f"{name}: expected a quantised projection without adapters, got {type(child).__name__}"
                )
        parts = {name: child.to_dense(dtype) for name, child in children.items()}
        if self._fused:
            parts |= zip(("gate_proj", "up_proj"), _halves(parts.pop("gate_up_proj")), strict=True)
        return GatedMLP(**parts, activation=self.activation).train(self.training)

    def extra_repr(self) -> str:
        kinds = [getattr(child, "format", type(child).__name__) for _, child in self.named_children()]
        return f"{super().extra_repr()}, formats={'/'.join(dict.fromkeys(kinds))}"


def _quantised(child: nn.Module, weights: str | None, *, down: bool) -> nn.Module:
    """A projection in the form that the kernel reads: the child itself if it has that, be it offloaded or with hooks."""
    if not isinstance(child, QuantisedDown if down else QuantisedLinear):
        if down:
            return QuantisedDown.from_linear(child, weights)  # type: ignore[arg-type]  # which checks it
        return QuantisedLinear.from_linear(child, "int8" if weights is None else weights)  # type: ignore[arg-type]
    if weights not in (None, child.format):
        raise ValueError(f"weights: expected {child.format!r}, which the codes are in, got {weights!r}")
    return child


def _halves(linear: nn.Linear) -> list[nn.Linear]:
    """The two layers whose rows a fused one has."""
    biases = (None, None) if linear.bias is None else linear.bias.detach().chunk(2)
    found = []
    for weight, bias in zip(linear.weight.detach().chunk(2), biases, strict=True):
        half = nn.Linear(weight.shape[1], weight.shape[0], False, device="meta")
        half.weight = nn.Parameter(weight.clone())
        half.bias = None if bias is None else nn.Parameter(bias.clone())  # type: ignore[assignment]
        found.append(half)
    return found


__all__: list[str] = ["QuantisedCATSMLP", "QuantisedDown"]
