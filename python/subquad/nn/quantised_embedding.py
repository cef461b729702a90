"""`QuantisedEmbedding`: rows of a weight in few bits, such as that of an output layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .. import _checks
from ..ops.quantised_linear import check_weight, dequantise, quantise
from ..reference.quantised_linear import FORMATS, GROUP
from ._children import plain
from ._codes import Codes
from ._sizes import check_sizes


class QuantisedEmbedding(Codes):
    """Token n is row n of what the codes stand for. No gradients.

    `weight` is a uint8 buffer [num_embeddings, row bytes], as that of a `QuantisedLinear` [embedding_dim -> num_embeddings]: an
    output layer that is tied to it has the same buffer. The result has the dtype that `.to(dtype)` and `.half()` set last.

    Args:
        num_embeddings: number of tokens.
        embedding_dim: size of a row, a multiple of 32.
        format: "int8", "int4" or "int4_min".
        padding_idx: as in `nn.Embedding`, where it stops a gradient; kept.
        device: of the weight.
        dtype: of the result; None for torch's default.

    Raises:
        ValueError: sizes without groups of 32, an unknown format.
    """

    like: torch.Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        format: str = "int8",
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(0, num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        _checks.choice("format", format, tuple(FORMATS))
        if embedding_dim % GROUP:
            raise ValueError(f"embedding_dim: expected a multiple of {GROUP}, got {embedding_dim}")
        device = _checks.device("device", device)
        self.num_embeddings, self.embedding_dim, self.format = num_embeddings, embedding_dim, format
        self.padding_idx = padding_idx
        row = embedding_dim // GROUP * FORMATS[format].group_bytes
        self.register_buffer("weight", torch.zeros((num_embeddings, row), dtype=torch.uint8, device=device))
        # Nothing but a dtype, which follows the module's.
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, weights: str = "int8") -> QuantisedEmbedding:
        """The embedding with its weight quantised.

        Args:
            embedding: an `nn.Embedding` without `max_norm` and hooks.
            weights: "int8", "int4" or "int4_min".

        Raises:
            TypeError: `embedding` is something else.
            ValueError: a size without groups of 32, weights that are not finite, an unknown format, `max_norm`.
        """
        cls.check(embedding)
        return cls.from_bytes(quantise(embedding.weight, weights), format=weights, like=embedding)

    @staticmethod
    def check(embedding: nn.Module) -> None:
        """TypeError or ValueError for what is no plain embedding."""
        if not plain(embedding, nn.Embedding):
            raise TypeError(f"embedding: expected an nn.Embedding without hooks, got {type(embedding).__name__}")
        if embedding.max_norm is not None:
            raise ValueError(f"max_norm: expected None, for codes are not changed by a call, got {embedding.max_norm}")

    @classmethod
    def from_bytes(
        cls, weight: torch.Tensor, *, format: str, like: nn.Embedding | None = None, dtype: torch.dtype | None = None
    ) -> QuantisedEmbedding:
        """Around bytes that `quantise` made, that came from a file, or that an output layer has.

        Args:
            weight: uint8 `[N, row bytes]`; not copied.
            format: as in the class.
            like: an embedding with the same padding_idx, dtype and mode.
            dtype: of the result, without `like`.

        Raises:
            TypeError: weight is not uint8.
            ValueError: a shape that does not fit.
        """
        _checks.choice("format", format, tuple(FORMATS))
        columns = check_weight("weight", weight, format)
        padding, dtype = (None, dtype) if like is None else (like.padding_idx, like.weight.dtype)
        self = cls(weight.shape[0], columns, format=format, padding_idx=padding, dtype=dtype, device="meta")
        self.weight, self.like = weight, torch.empty(0, dtype=self.like.dtype, device=weight.device)
        return self if like is None else self.train(like.training)

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """The dense embedding: its weight is what the codes stand for.

        Args:
            dtype: of the weight; None for that of the result.

        Raises:
            TypeError: dtype is no floating one.
        """
        dense = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        dense.weight = nn.Parameter(dequantise(self.weight, self.format, self._dense_dtype(dtype)))
        return dense.train(self.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., embedding_dim] of token ids [...]."""
        rows = F.embedding(input.flatten(), self.weight)  # with its checks of ids
        return dequantise(rows, self.format, self.like.dtype).view(*input.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.format!r}"


__all__: list[str] = ["QuantisedEmbedding"]
