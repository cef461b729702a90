"""Reading a cubin: resources and machine code of every kernel in it, with the binary utilities of CUDA or Triton."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_MATRIX = re.compile(r"(?:[HIDBQO]|HG|IG|QG|UTCH|UTCI|UTCQ|UTCO)MMA\b")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_LOAD = re.compile(r"(?:LDG|LDGSTS)\b")
_BULK_LOAD = re.compile(r"(?:UTMALDG|UBLKCP)\b")
_LOAD_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


@dataclass(frozen=True)
class Code:
    """What one kernel needs and does, as found in its machine code.

    Attributes:
        name: as in the cubin (mangled for C++).
        registers: per thread.
        stack: bytes of stack per thread.
        local: bytes of local memory per thread.
        spill_stores: store instructions to local memory.
        spill_loads: load instructions from local memory.
        shared: bytes of static shared memory.
        threads: most threads per block that the kernel was compiled for, None when it does not say.
        matrix: matrix instructions by mnemonic, such as {"HMMA": 32}.
        widest_load: bits per thread of the widest load from global memory, 0 without any.
        narrow_loads: instructions that load 8 or 16 bits per thread from global memory.
        bulk_loads: tensor or bulk copies from global memory.
    """

    name: str
    registers: int
    stack: int
    local: int
    spill_stores: int
    spill_loads: int
    shared: int
    threads: int | None
    matrix: dict[str, int]
    widest_load: int
    narrow_loads: int
    bulk_loads: int

    @property
    def spills(self) -> bool:
        """Whether values leave the registers for local memory."""
        return bool(self.stack or self.local or self.spill_stores or self.spill_loads)


def tool(name: str) -> str:
    """Path of a CUDA binary utility: on PATH, or the copy in the Triton wheel.

    Raises:
        FileNotFoundError: when neither has it.
    """
    path = shutil.which(name)
    if path is None:
        spec = importlib.util.find_spec("triton")
        for folder in spec.submodule_search_locations or () if spec else ():
            candidate = Path(folder, "backends", "nvidia", "bin", name)
            if candidate.exists():
                path = str(candidate)
    if path is None:
        raise FileNotFoundError(f"{name} was found neither on PATH nor in an installed triton")
    return path


def _cuobjdump(option: str, path: Path) -> str:
    command = [tool("cuobjdump"), option, path.name]
    return subprocess.run(command, cwd=path.parent, check=True, capture_output=True, text=True).stdout


def extract(path: Path, folder: Path) -> dict[int, Path]:
    """The cubins embedded in an object, by architecture, written into a folder of its name below `folder`."""
    own = folder / path.stem
    own.mkdir()
    command = [tool("cuobjdump"), "--extract-elf", "all", str(path.resolve())]
    subprocess.run(command, cwd=own, check=True, capture_output=True, text=True)
    found = {}
    for cubin in own.glob("*.cubin"):
        match = re.search(r"\.sm_(\d+)[a-z]?\.cubin$", cubin.name)
        if match:
            found[int(match.group(1))] = cubin
    return found


def _sections(text: str, header: str) -> dict[str, str]:
    """Split a dump at its per-function headers."""
    parts = re.split(header, text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def read(path: Path) -> list[Code]:
    """Every kernel of a cubin, in the order of their names."""
    resources = _sections(_cuobjdump("--dump-resource-usage", path), r"^ Function (\S+):$")
    assembly = _sections(_cuobjdump("--dump-sass", path), r"^\s*Function : (\S+)$")
    attributes = _sections(_cuobjdump("--dump-elf", path), r"^\.nv\.info\.(\S+)$")
    kernels = []
    for name in sorted(assembly):
        used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", resources[name].splitlines()[1])}
        operations = Counter(_INSTRUCTION.findall(assembly[name]))
        kernels.append(_summary(name, used, operations, _block_limit(attributes.get(name, ""))))
    return kernels


def _block_limit(attributes: str) -> int | None:
    match = re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\s+Format:\s+\w+\s+Value:\s+(0x\w+) (0x\w+) (0x\w+)", attributes)
    if match is None:
        return None
    x, y, z = (int(value, 16) for value in match.groups())
    return x * y * z


def _summary(name: str, used: dict[str, int], operations: Counter[str], threads: int | None) -> Code:
    matrix: Counter[str] = Counter()
    widths: Counter[int] = Counter()
    for operation, count in operations.items():
        if _MATRIX.match(operation):
            matrix[operation.split(".")[0]] += count
        elif _LOAD.match(operation):
            widths[next((bits for part, bits in _LOAD_BITS.items() if part in operation.split(".")), 32)] += count

    def total(mnemonic: str) -> int:
        return sum(count for operation, count in operations.items() if operation.split(".")[0] == mnemonic)

    return Code(
        name=name,
        registers=used["REG"],
        stack=used["STACK"],
        local=used["LOCAL"],
        spill_stores=total("STL"),
        spill_loads=total("LDL"),
        shared=used["SHARED"],
        threads=threads,
        matrix=dict(matrix),
        widest_load=max(widths, default=0),
        narrow_loads=sum(count for bits, count in widths.items() if bits <= 16),
        bulk_loads=sum(count for operation, count in operations.items() if _BULK_LOAD.match(operation)),
    )


def demangle(names: list[str]) -> dict[str, str]:
    """Mangled -> readable, without return type, arguments and namespaces; unchanged where there is no demangler."""
    program = shutil.which("cu++filt") or shutil.which("c++filt")
    if program is None or not names:
        return {name: name for name in names}
    lines = subprocess.run([program], input="\n".join(names), check=True, capture_output=True, text=True).stdout
    return {name: _shorten(line) for name, line in zip(names, lines.splitlines(), strict=True)}


def template(name: str) -> str:
    """`k` of the readable name `k<bf16, 1>`."""
    return name.split("<")[0]


def _shorten(signature: str) -> str:
    """`void subquad::cuda::k<sq::bf16, (subquad::Mode)1>(Params)` -> `k<bf16, 1>`."""
    depth, end = 0, len(signature)
    for position, character in enumerate(signature):
        if character == "<":
            depth += 1
        elif character == ">":
            depth -= 1
        elif character == "(" and depth == 0:
            end = position
            break
    name = re.sub(r"\((?:[a-z]+|[\w:]+)\)(?=-?\d)", "", signature[:end])
    return re.sub(r"^void |\b(?:\w+::)+", "", name)
