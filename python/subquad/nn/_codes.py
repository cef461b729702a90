"""Weights in few bits, kept as buffers of bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .. import _checks
from ..reference.quantised_linear import FORMATS, GROUP
from ._loading import Checked
from ._sizes import check_sizes


class Codes(Checked):
    """Base of modules with uint8 buffers: moved but never cast, and never filled with dense weights.

    Two modules with the same buffer keep sharing it where they would keep sharing a parameter.
    """

    weight: torch.Tensor
    format: str

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The dense module that computes the same, with what the codes stand for as its weight.

        Args:
            dtype: of the weight; None for that of the bias, or of the result of an embedding, else float32.

        Raises:
            TypeError: dtype is no floating one.
        """
        raise NotImplementedError

    def _dense_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """The dtype that `to_dense` was asked for, or that goes with what the module has."""
        if dtype is None:
            floats = (t.dtype for t in (*self.parameters(), *self.buffers()) if t.is_floating_point())
            return next(floats, torch.float32)
        return check_dense_dtype(dtype)

    def _codes(self) -> dict[str, torch.Tensor]:
        return {name: b for name, b in self._buffers.items() if b is not None and b.dtype == torch.uint8}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """No cast reaches the codes: neither torch's own, which leave integers alone, nor `.type(dtype)`, which does not."""
        before = self._codes()
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            assert new is not None
            if new.dtype != torch.uint8:
                new = self._buffers[name] = old.to(new.device)
            if new is not old and torch._has_compatible_shallow_copy_type(old, new):
                old.data = new  # in place, as torch moves parameters
                self._buffers[name] = old
        return self

    def _problem(self, given: Mapping[str, torch.Tensor]) -> str | None:
        for name in self._codes():
            value = given.get(name)
            if value is not None and value.dtype != torch.uint8:
                return (
                    f"{name}: expected uint8 codes of format {self.format!r}, got {value.dtype} {list(value.shape)}; "
                    "load a dense checkpoint into the dense model and quantise that"
                )
        return None


class LinearCodes(Codes):
    """Base of linear layers in few bits: sizes, a bias that is a parameter, and the dense layer.

    Args:
        in_features, out_features: of the layer.
        bias: whether there is one.
        format: "int8", "int4" or "int4_min".
        grouped: the size whose elements lie in groups of 32.
        device, dtype: of the bias.

    Raises:
        ValueError: sizes without groups of 32, an unknown format.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        format: str,
        grouped: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "out_features": out_features}
        check_sizes(0, **sizes)
        _checks.flag("bias", bias)
        _checks.choice("format", format, tuple(FORMATS))
        if sizes[grouped] % GROUP:
            raise ValueError(f"{grouped}: expected a multiple of {GROUP}, got {sizes[grouped]}")
        device = _checks.device("device", device)
        self.in_features, self.out_features, self.format = in_features, out_features, format
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))

    def _dense(self, weight: torch.Tensor) -> nn.Linear:
        """An nn.Linear with this weight, the very bias, and the mode."""
        linear = nn.Linear(self.in_features, self.out_features, False, device="meta")
        linear.weight = nn.Parameter(weight)
        linear.bias = self.bias  # type: ignore[assignment]  # None is what nn.Linear has without one
        return linear.train(self.training)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, format={self.format!r}"


def check_dense_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype; TypeError for one that no dense weight has."""
    if dtype not in _checks.FLOAT_DTYPES:
        raise TypeError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
    return dtype
