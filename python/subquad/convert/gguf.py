"""Weights of a GGUF file, taken as they are: the bytes of its blocks in another order, never rounded again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..nn._codes import Codes
from ..nn.quantised_cats_mlp import QuantisedDown
from ..nn.quantised_linear import QuantisedLinear
from ..ops.quantised_linear import dequantise
from ..reference.quantised_linear import FORMATS, pack
from .weights import Left

BLOCKS = {kind.gguf: name for name, kind in FORMATS.items()}
DENSE = ("F32", "F16", "BF16", "F64")
_PERMUTED = ("attn_q.weight", "attn_k.weight")  # in llama's files; others have the rows as the model has them


class GgufFile:
    """The tensors of a file under the names that a model of transformers has for them.

    Args:
        path: a file with the whole model in it.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: no GGUF file, or one of an architecture that the package does not know.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        if path is None or not Path(path).is_file():
            raise ValueError(f"gguf_file: expected the path of a file, got {path if path is None else str(path)!r}")
        try:
            import gguf
        except ImportError as error:
            raise ImportError(
                "weights='gguf' needs the Python package gguf; install it with: pip install gguf"
            ) from error
        try:
            reader = gguf.GGUFReader(path)
        except Exception as error:  # the reader runs into the end of a file in many ways
            raise ValueError(f"gguf_file: expected a GGUF file, got {str(path)!r}: {error}") from error
        fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        name = fields.get("general.architecture")
        known = {text: architecture for architecture, text in gguf.MODEL_ARCH_NAMES.items()}
        if name not in known:
            raise ValueError(f"gguf_file: expected an architecture that the package gguf knows, got {name!r}")
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._names = gguf.get_tensor_name_map(known[name], fields.get(f"{name}.block_count", 0))
        counts = (fields.get(f"{name}.attention.{key}", []) for key in ("head_count", "head_count_kv"))
        self._heads = {heads for count in counts for heads in (count if isinstance(count, list) else [count])}

    def make(self, name: str, linear: nn.Linear, down: bool) -> QuantisedLinear | QuantisedDown:
        """The module in the place of a Linear, around the bytes of the file's blocks.

        Raises:
            Left: the file has it dense.
            ValueError: the file has none of this name, blocks without a kernel, another shape or other numbers than the model.
        """
        tensor = self._tensor(name)
        kind = tensor.tensor_type.name
        if kind in DENSE:
            raise Left(f"dense in the file: {tensor.name} is in {kind}")
        if kind not in BLOCKS:
            raise ValueError(
                f"gguf_file: expected {tensor.name} in blocks of {', '.join(BLOCKS)} or dense, got {kind}, for which there "
                "is no kernel"
            )
        shape = list(linear.weight.shape)
        if list(tensor.shape[::-1]) != shape:
            raise ValueError(
                f"gguf_file: expected {tensor.name} of shape {shape} as in the model, got {tensor.shape[::-1].tolist()}"
            )
        format = BLOCKS[kind]
        for rows in self._orders(tensor.name, rows_of(tensor.data, format)):
            if torch.allclose(dequantise(rows, format).to(linear.weight), linear.weight, 0, 0, equal_nan=True):
                made = QuantisedLinear.from_bytes(rows, linear.bias, format=format).train(linear.training)
                return QuantisedDown.from_linear(made) if down else made
        raise ValueError(
            f"gguf_file: expected the numbers of the model in {tensor.name}, got others: this file is another model's"
        )

    def check(self, name: str, module: Codes) -> None:
        """What is in few bits already stays so."""

    def _tensor(self, name: str) -> Any:
        """Of a Linear, whose name may have those of wrappers in front. An output layer may be the embedding."""
        tail = name
        while tail:
            found = self._names.get_name(f"{tail}.weight", try_suffixes=(".weight",))
            if found in self.tensors:
                return self.tensors[found]
            if found == "output.weight" and "token_embd.weight" in self.tensors:
                return self.tensors["token_embd.weight"]
            tail = tail.partition(".")[2]
        raise ValueError("gguf_file: expected a tensor for this layer in the file, got none")

    def _orders(self, name: str, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        """The rows as they may have been before they were written: as they are, or with the halves of a head taken apart."""
        yield rows
        for heads in self._heads if name.endswith(_PERMUTED) else ():
            if heads and len(rows) % (2 * heads) == 0:
                yield rows.view(heads, -1, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def rows_of(blocks: Any, format: str) -> torch.Tensor:
    """uint8 [N, row bytes], as `subquad.quantise` makes them, of blocks as numpy has them from a file: uint8 [N, bytes].

    A block has its scale, its minimum if there is one, and its codes; a row of ours has all codes, all scales, all minima.
    """
    kind = FORMATS[format]
    data = torch.tensor(blocks).unflatten(-1, (-1, kind.group_bytes))
    numbers, codes = data.split([kind.group_bytes - kind.code_bytes, kind.code_bytes], dim=-1)
    scale, *minimum = numbers.contiguous().view(torch.float16).unbind(-1)
    return pack(codes, scale, minimum[0] if minimum else None)


__all__ = ["GgufFile", "rows_of"]
