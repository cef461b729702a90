"""The header of a GGUF file as the package gguf reads it, and files that are broken."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from subquad.convert import gguf_header

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

FIELDS: dict[str, Any] = {
    "text": "words, wörter, 語",
    "strings": ["a", "", "▁of", "ö" * 300],
    "integers": [1, -2, 1 << 20],
    "floats": [0.5, -1000.0],
    "flags": [True, False],
    "yes": True,
}


def write(path: Path, alignment: int | None = None, **options: Any) -> dict[str, np.ndarray]:
    """A file with every kind of field; what is in its tensors."""
    writer = gguf.GGUFWriter(path, "gemma3", **options)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_string("text", FIELDS["text"])
    for name in ("strings", "integers", "floats", "flags"):
        writer.add_array(name, FIELDS[name])
    writer.add_bool("yes", True)
    for kind, value in (("uint8", 200), ("int8", -3), ("uint16", 60000), ("int16", -300), ("uint64", 1 << 60)):
        getattr(writer, f"add_{kind}")(kind, value)
    writer.add_float32("float32", 1e-6)
    writer.add_float64("float64", 1e-300)
    numbers = np.random.default_rng(0).standard_normal((3, 5, 64)).astype(np.float32)
    tensors = {"plain": numbers, "half": numbers[0].astype(np.float16), "row": numbers[0, 0]}
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    blocks = gguf.quantize(numbers[1], gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors | {"blocks": blocks}


@pytest.mark.parametrize("alignment", [None, 64])
def test_everything_is_as_the_package_reads_it(tmp_path: Path, alignment: int | None) -> None:
    tensors = write(tmp_path / "x.gguf", alignment)
    header, reader = gguf_header.read(tmp_path / "x.gguf"), gguf.GGUFReader(tmp_path / "x.gguf")
    theirs = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.fields == theirs and {name: theirs[name] for name in FIELDS} == FIELDS
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors] == list(tensors)
    for tensor in reader.tensors:
        ours = header.tensors[tensor.name]
        assert ours.kind == tensor.tensor_type.name and ours.shape == tuple(tensor.shape[::-1].tolist())
        assert ours.data.tobytes() == tensors[tensor.name].tobytes()
        found = gguf.dequantize(ours.data, tensor.tensor_type)
        assert found.shape == ours.shape and np.array_equal(found, gguf.dequantize(tensor.data, tensor.tensor_type))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf")
    whole = (tmp_path / "x.gguf").read_bytes()
    for end in range(len(whole) - 32 - len(whole) % 32, -1, -11):  # the last tensor may be padded
        (tmp_path / "y.gguf").write_bytes(whole[:end])
        with pytest.raises(ValueError):
            gguf_header.read(tmp_path / "y.gguf")


@pytest.mark.parametrize(
    "at, form, value, message",
    [
        (0, "<I", 1, "it does not start with GGUF"),
        (4, "<I", 1, "expected version 2 or 3 in little-endian order, got 1"),
        (8, "<Q", 1 << 62, "its header is broken|is not a valid|it ends"),  # tensors
        (16, "<Q", 1 << 62, "its header is broken|it ends"),  # fields
        (24, "<Q", (1 << 64) - 1, "it ends within its header"),  # the length of the first field's name
    ],
)
def test_what_the_header_says_is_checked(tmp_path: Path, at: int, form: str, value: int, message: str) -> None:
    write(tmp_path / "x.gguf")
    whole = bytearray((tmp_path / "x.gguf").read_bytes())
    struct.pack_into(form, whole, at, value)
    (tmp_path / "y.gguf").write_bytes(whole)
    with pytest.raises(ValueError, match=message):
        gguf_header.read(tmp_path / "y.gguf")


def test_any_byte_of_the_header_may_be_wrong(tmp_path: Path) -> None:
    """No other error than ValueError, and never an answer that lies outside the file."""
    write(tmp_path / "x.gguf")
    whole = (tmp_path / "x.gguf").read_bytes()
    header = gguf_header.read(tmp_path / "x.gguf")
    refused = 0
    for at in range(0, whole.index(b"blocks") + 64, 3):
        changed = bytearray(whole)
        changed[at] ^= 0xFF
        (tmp_path / "y.gguf").write_bytes(changed)
        try:
            found = gguf_header.read(tmp_path / "y.gguf")
        except ValueError:
            refused += 1
        else:
            assert len(found.tensors) == len(header.tensors)
    assert refused > 20


def test_another_byte_order_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(ValueError, match="little-endian order"):
        gguf_header.read(tmp_path / "x.gguf")
