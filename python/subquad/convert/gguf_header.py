"""What is in a GGUF file: its fields, and its tensors where they lie.

After the specification of the format (ggml's docs/gguf.md), versions 2 and 3. The package gguf has a reader, too, which makes
arrays of every word of a vocabulary: half a minute for Gemma's 262,144, against a fraction of a second.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

_VERSIONS = (2, 3)
_NUMBERS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    Attributes:
        name: in the file.
        shape: as torch has it, the last dimension contiguous.
        kind: name of its type: "F32", "Q8_0".
        data: uint8 [..., bytes of a row], in the file's memory map.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    data: np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Header:
    """Fields and tensors of a file by their names in it; an array is a list."""

    fields: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def read(path: str | os.PathLike[str]) -> Header:
    """The header of a GGUF file. Tensors are mapped, not read.

    Raises:
        ValueError: another file, one of another version or byte order, or one that ends too early.
    """
    try:
        return _Reader(np.asarray(np.memmap(path, np.uint8, "r"))).header()
    except (struct.error, LookupError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"its header is broken: {type(error).__name__}: {error}") from error


class _Reader:
    def __init__(self, data: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        self.data, self.bytes, self.at = data, data.data, 0

    def header(self) -> Header:
        import gguf

        if self.bytes[:4] != b"GGUF":
            raise ValueError("it does not start with GGUF")
        self.at = 4
        version = self.number("<I")
        if version not in _VERSIONS:
            raise ValueError(f"expected version 2 or 3 in little-endian order, got {version}")
        count, field_count = self.number("<Q"), self.number("<Q")
        fields = {self.string(): self.value(self.number("<I")) for _ in range(field_count)}
        infos = [self.info() for _ in range(count)]
        alignment = fields.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"expected its alignment to be a positive integer, got {alignment!r}")
        start = -(-self.at // alignment) * alignment
        tensors = {}
        for name, shape, kind, offset in infos:
            type_ = gguf.GGMLQuantizationType(kind)
            elements, size = gguf.GGML_QUANT_SIZES[type_]
            if name in tensors or shape[-1] % elements:
                raise ValueError(f"its tensor {name!r} is there twice or has part of a block: {list(shape)}")
            stored = (*shape[:-1], shape[-1] // elements * size)
            data = self.data[start + offset : start + offset + prod(stored)]
            if data.size != prod(stored):
                raise ValueError(f"it ends within the tensor {name!r}")
            tensors[name] = Tensor(name, shape, type_.name, data.reshape(stored))
        return Header(fields, tensors)

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.bytes, self.at)
        self.at += struct.calcsize(form)
        return value

    def string(self) -> str:
        length = self.number("<Q")
        self.at += length
        if self.at > self.data.size:
            raise ValueError("it ends within its header")
        return str(self.bytes[self.at - length : self.at], "utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_NUMBERS[kind])
        inner, length = self.number("<I"), self.number("<Q")
        if inner in _NUMBERS:
            form = f"<{length}{_NUMBERS[inner][1]}"
            values = struct.unpack_from(form, self.bytes, self.at)
            self.at += struct.calcsize(form)
            return list(values)
        return [self.value(inner) for _ in range(length)]

    def info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset of a tensor; a file has the dimension that moves fastest first."""
        name, dims = self.string(), self.number("<I")
        shape = tuple(self.number("<Q") for _ in range(dims))[::-1]
        return name, shape, self.number("<I"), self.number("<Q")


__all__ = ["Header", "Tensor", "read"]
