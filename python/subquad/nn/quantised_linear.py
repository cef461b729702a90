"""`QuantisedLinear`: a linear layer whose weight is kept in few bits."""

from __future__ import annotations

import torch
from torch import nn

from .. import _checks
from .._backends import BACKENDS
from ..ops.quantised_linear import check_weight, dequantise, quantise, quantised_linear
from ..reference.quantised_linear import FORMATS, GROUP
from ._children import plain
from ._codes import LinearCodes


class QuantisedLinear(LinearCodes):
    """y = x W^T + b with W in groups of 32 codes; see `subquad.quantised_linear`.

    `weight` is a uint8 buffer `[out_features, row bytes]`: `.to(dtype)`, `.half()` and optimisers leave it alone, `state_dict`
    and safetensors keep its bytes. Gradients reach x and the bias, never the weight. A checkpoint of a dense layer does not
    load, nor one of another format: the shapes differ.

    Args:
        in_features: K, a multiple of 32.
        out_features: N.
        bias: whether there is one.
        format: "int8", "int4" or "int4_min".
        backend: as in `subquad.quantised_linear`.
        device: of weight and bias.
        dtype: of the bias.

    Raises:
        ValueError: sizes without groups of 32, an unknown format or backend.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: str = "int8",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, format, "in_features", device, dtype)
        if backend is not None:
            _checks.choice("backend", backend, BACKENDS)
        self.backend = backend
        row = in_features // GROUP * FORMATS[format].group_bytes
        self.register_buffer("weight", torch.zeros((out_features, row), dtype=torch.uint8, device=device))

    @classmethod
    def from_linear(cls, linear: nn.Linear, weights: str = "int8", *, backend: str | None = None) -> QuantisedLinear:
        """The layer with its weight quantised; the bias is the very same parameter.

        Args:
            linear: an `nn.Linear` without adapters or hooks.
            weights: "int8", "int4" or "int4_min".
            backend: as in the class.

        Raises:
            TypeError: `linear` is something else.
            ValueError: a size without groups of 32, weights that are not finite, an unknown format. `linear` is unchanged.
        """
        if not plain(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear without adapters or hooks, got {type(linear).__name__}")
        _checks.choice("weights", weights, tuple(FORMATS))
        self = cls.from_bytes(quantise(linear.weight, weights), linear.bias, format=weights, backend=backend)
        return self.train(linear.training)

    @classmethod
    def from_bytes(
        cls, weight: torch.Tensor, bias: nn.Parameter | None = None, *, format: str, backend: str | None = None
    ) -> QuantisedLinear:
        """Around bytes that `quantise` made, or that came from a file.

        Args:
            weight: uint8 `[N, row bytes]`; not copied.
            bias: `[N]` or None.
            format, backend: as in the class.

        Raises:
            TypeError: weight is not uint8.
            ValueError: a shape that does not fit.
        """
        _checks.choice("format", format, tuple(FORMATS))
        columns = check_weight("weight", weight, format)
        if bias is not None and bias.shape != (weight.shape[0],):
            raise ValueError(f"bias: expected shape [{weight.shape[0]}], got {list(bias.shape)}")
        self = cls(columns, weight.shape[0], False, format=format, backend=backend, device="meta")
        self.weight = weight
        self.bias = bias
        return self

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The dense layer that computes the same: its weight is what the codes stand for, its bias the same parameter.

        Args:
            dtype: of the weight; None for that of the bias, or float32.

        Raises:
            TypeError: dtype is no floating one.
        """
        return self._dense(dequantise(self.weight, self.format, self._dense_dtype(dtype)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y `[..., N]` of x `[..., K]`, in x's dtype."""
        return quantised_linear(x, self.weight, self.bias, format=self.format, backend=self.backend)

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """`to_linear`, under the name that it has for every module in few bits."""
        return self.to_linear(dtype)


__all__: list[str] = ["QuantisedLinear"]
