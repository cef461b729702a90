"""The learned feature map of linear attention as a module."""

from __future__ import annotations

import torch
from torch import nn

from .. import _checks
from .._backends import BACKENDS
from ..ops.feature_map import feature_map
from ..reference.feature_map import KINDS

INITS = ("eye", "kaiming")


class LearnedFeatureMap(nn.Module):
    r"""phi(x) = max([g(y), g(-y)], eps) with y = x layer, and a layer for every head (LoLCATs, arXiv 2410.10254).

    Tied maps of queries and keys are one module called twice.

    Args:
        num_heads, head_dim: H and d of its input [B, T, H, d].
        feature_dim: f, columns of the layer. "hedgehog2" and `fullspace` give 2f features.
        kind: g; see `subquad.feature_map`.
        fullspace: both halves.
        skip_connection: y = x layer + x, computed as x (layer + 1) with the sum in float32, rounded to the layer's dtype; needs
            `feature_dim == head_dim`.
        eps: least value of a feature.
        init: "eye" starts with y = the first f elements of x (with `skip_connection`, a layer of zeros does that);
            "kaiming" is uniform within sqrt(3 / d).
        backend: of the operator.
        device, dtype: of the layer.

    Attributes:
        layer: parameter [H, d, f], named as in LoLCATs.
        out_dim: features per head, f or 2f.

    Raises:
        TypeError: wrong type of an option.
        ValueError: a size below 1, an unknown option, a skip connection between different dimensions, "hedgehog2" without
            `fullspace`.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        feature_dim: int,
        *,
        kind: str = "softmax",
        fullspace: bool = True,
        skip_connection: bool = False,
        eps: float = 1e-12,
        init: str = "eye",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("num_heads", num_heads), ("head_dim", head_dim), ("feature_dim", feature_dim)):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name}: expected an int, got {type(size).__name__}")
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        _checks.choice("kind", kind, KINDS)
        _checks.choice("init", init, INITS)
        _checks.flag("fullspace", fullspace)
        _checks.flag("skip_connection", skip_connection)
        if backend is not None:
            _checks.choice("backend", backend, BACKENDS)
        if kind == "hedgehog2" and not fullspace:
            raise ValueError("fullspace: expected True with kind 'hedgehog2', got False")
        if skip_connection and feature_dim != head_dim:
            raise ValueError(f"feature_dim: expected {head_dim} as head_dim with skip_connection, got {feature_dim}")
        self.num_heads, self.head_dim, self.feature_dim = num_heads, head_dim, feature_dim
        self.kind, self.fullspace, self.skip_connection = kind, fullspace, skip_connection
        self.eps, self.init, self.backend = eps, init, backend
        self.out_dim = 2 * feature_dim if fullspace else feature_dim
        self.layer = nn.Parameter(torch.empty((num_heads, head_dim, feature_dim), device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The layer as `init` says."""
        if self.init == "kaiming":
            bound = (3.0 / self.head_dim) ** 0.5
            self.layer.uniform_(-bound, bound)
        elif self.skip_connection:
            self.layer.zero_()
        else:
            self.layer.copy_(torch.eye(self.head_dim, self.feature_dim, device=self.layer.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """phi `[B, T, H, out_dim]` of x `[B, T, H, d]`, in x's dtype."""
        weight: torch.Tensor = self.layer
        if self.skip_connection:
            eye = torch.eye(self.head_dim, device=weight.device)
            weight = (weight + eye).to(weight.dtype)
        return feature_map(x, weight, kind=self.kind, fullspace=self.fullspace, eps=self.eps, backend=self.backend)

    def extra_repr(self) -> str:
        text = f"{self.num_heads}, {self.head_dim}, {self.feature_dim}, kind={self.kind!r}"
        text += "" if self.fullspace else ", fullspace=False"
        return text + (", skip_connection=True" if self.skip_connection else "")
