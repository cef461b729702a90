"""`QuantisedEmbedding`: rows of a weight in few bits, such as that of an output layer."""

from __future__ import annotations

from typing import Any

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
        embed_scale: factor of the result, rounded to its dtype, as in Gemma's embeddings.

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
        embed_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_sizes(0, num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        _checks.choice("format", format, tuple(FORMATS))
        if embedding_dim % GROUP:
            raise ValueError(f"embedding_dim: expected a multiple of {GROUP}, got {embedding_dim}")
        device = _checks.device("device", device)
        self.num_embeddings, self.embedding_dim, self.format = num_embeddings, embedding_dim, format
        self.padding_idx, self.embed_scale = padding_idx, embed_scale
        row = embedding_dim // GROUP * FORMATS[format].group_bytes
        self.register_buffer("weight", torch.zeros((num_embeddings, row), dtype=torch.uint8, device=device))
        # Nothing but a dtype, which follows the module's.
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, weights: str = "int8") -> QuantisedEmbedding:
        """The embedding with its weight quantised.

        Args:
            embedding: an `nn.Embedding` without `max_norm` and hooks, or one of transformers' that scale their rows (Gemma).
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
        if not plain(embedding, nn.Embedding) and not _scales(embedding):
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
            like: an embedding with the same padding_idx, scale, dtype and mode.
            dtype: of the result, without `like`.

        Raises:
            TypeError: weight is not uint8.
            ValueError: a shape that does not fit.
        """
        _checks.choice("format", format, tuple(FORMATS))
        columns = check_weight("weight", weight, format)
        padding, dtype = (None, dtype) if like is None else (like.padding_idx, like.weight.dtype)
        scale = 1.0 if like is None else _scale_of(like)
        self = cls(
            weight.shape[0], columns, format=format, padding_idx=padding, dtype=dtype, device="meta", embed_scale=scale
        )
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
        if self.embed_scale != 1:
            dense = ScaledWordEmbedding(dense, self.embed_scale)
        dense.weight = nn.Parameter(dequantise(self.weight, self.format, self._dense_dtype(dtype)))
        return dense.train(self.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., embedding_dim] of token ids [...]."""
        rows = F.embedding(input.flatten(), self.weight)  # with its checks of ids
        out = dequantise(rows, self.format, self.like.dtype).view(*input.shape, self.embedding_dim)
        return out if self.embed_scale == 1 else _scaled(out, self.embed_scale)

    def extra_repr(self) -> str:
        scale = "" if self.embed_scale == 1 else f", embed_scale={self.embed_scale}"
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.format!r}{scale}"


class ScaledWordEmbedding(nn.Embedding):
    """An embedding whose rows are scaled, as transformers' classes of this name do."""

    def __init__(self, like: nn.Embedding, embed_scale: float) -> None:
        super().__init__(like.num_embeddings, like.embedding_dim, like.padding_idx, device="meta")
        self.scalar_embed_scale = embed_scale

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., embedding_dim] of token ids [...]."""
        return _scaled(super().forward(input), self.scalar_embed_scale)


def _scaled(rows: torch.Tensor, scale: float) -> torch.Tensor:
    """Times the scale in their dtype."""
    return rows * torch.full((), scale, dtype=rows.dtype, device=rows.device)


def _scales(embedding: Any) -> bool:
    """Whether an embedding multiplies its rows by a number that is rounded to their dtype, and does nothing else."""
    if not isinstance(embedding, nn.Embedding):
        return False
    kind = type(embedding)
    if not kind.__name__.endswith("ScaledWordEmbedding"):
        return False
    if not (plain(embedding, kind) and (kind is ScaledWordEmbedding or torch.is_tensor(embedding.embed_scale))):
        return False
    if embedding.weight.is_meta:
        return True
    row = torch.zeros(1, dtype=torch.int64, device=embedding.weight.device)
    with torch.no_grad():
        return torch.equal(embedding(row), _scaled(embedding.weight[:1], _scale_of(embedding)))


def _scale_of(embedding: nn.Embedding) -> float:
    """1 for a plain one."""
    scale = getattr(embedding, "embed_scale", getattr(embedding, "scalar_embed_scale", 1.0))
    if torch.is_tensor(scale) and scale.is_meta:
        known = getattr(embedding, "scalar_embed_scale", None)  # of transformers 5
        if known is None:
            raise ValueError("embed_scale: expected one with a value, got one on the meta device")
        scale = torch.tensor(known, dtype=scale.dtype, device="cpu")
    return float(scale)


__all__: list[str] = ["QuantisedEmbedding"]
