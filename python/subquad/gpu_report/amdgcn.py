"""Reading AMD's assembly as Triton leaves it: resources and instructions of the one kernel in it. Needs no ROCm."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from .cubin import Code

_INSTRUCTION = re.compile(r"^\t([a-z]\w+)", re.MULTILINE)
_LOAD = re.compile(r"(?:global|buffer)_load_(\w+)")
_LOAD_BITS = {"dwordx2": 64, "dwordx3": 96, "dwordx4": 128, "dword": 32}  # all others are of 8 or 16 bits


def _field(text: str, name: str) -> int:
    """A number of the metadata at the end of the file."""
    found = re.search(rf"^\s+\.{name}:\s+(\d+)$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"{name}: expected in the metadata of the assembly")
    return int(found.group(1))


def read(path: Path) -> list[Code]:
    """The kernel of a file, in a list. Registers are vector registers, of which matrix results take a part."""
    text = path.read_text()
    operations = Counter(_INSTRUCTION.findall(text))
    matrix: Counter[str] = Counter()
    widths: Counter[int] = Counter()
    for operation, count in operations.items():
        if operation.startswith("v_mfma"):
            matrix["MFMA"] += count
        elif match := _LOAD.match(operation):
            widths[_LOAD_BITS.get(match[1].removesuffix("_lds"), 16)] += count

    def total(prefix: str) -> int:
        return sum(count for operation, count in operations.items() if operation.startswith(prefix))

    return [
        Code(
            name=re.search(r"^\s+\.symbol:\s+'?(\S+)\.kd'?$", text, re.MULTILINE).group(1),  # type: ignore[union-attr]
            registers=_field(text, "vgpr_count"),
            stack=_field(text, "private_segment_fixed_size"),
            local=0,
            spill_stores=total("scratch_store"),
            spill_loads=total("scratch_load"),
            shared=_field(text, "group_segment_fixed_size"),
            threads=_field(text, "max_flat_workgroup_size"),
            matrix=dict(matrix),
            widest_load=max(widths, default=0),
            narrow_loads=sum(count for bits, count in widths.items() if bits <= 16),
            bulk_loads=0,
        )
    ]
