"""Theoretical occupancy from registers, shared memory and block size, and what an architecture offers.

Limits: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability"; AMD Instinct MI300 and MI350
instruction set guides.
"""

from __future__ import annotations

from dataclasses import dataclass

Arch = int | str  # a compute capability of NVIDIA's such as 90, or AMD's name such as "gfx942"


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor (AMD: compute unit) offers; shared memory in bytes, of all blocks and of one."""

    warps: int
    blocks: int
    shared: int
    block_shared: int
    registers: int = 65536
    register_unit: int = 256  # registers are allotted to a warp in units of this
    reserved_shared: int = 1024  # per block, taken by the system
    lanes: int = 32  # threads of a warp


def _amd(shared: int) -> Limits:
    return Limits(32, 32, shared, shared, registers=131072, register_unit=512, reserved_shared=0, lanes=64)


ARCHS: dict[Arch, Limits] = {
    80: Limits(64, 32, 164 * 1024, 163 * 1024),
    86: Limits(48, 16, 100 * 1024, 99 * 1024),
    89: Limits(48, 24, 100 * 1024, 99 * 1024),
    90: Limits(64, 32, 228 * 1024, 227 * 1024),
    100: Limits(64, 32, 228 * 1024, 227 * 1024),
    103: Limits(64, 32, 228 * 1024, 227 * 1024),
    120: Limits(48, 24, 100 * 1024, 99 * 1024),
    "gfx942": _amd(64 * 1024),
    "gfx950": _amd(160 * 1024),
}
_WARP_UNIT = 4  # warps are spread over four partitions
_SHARED_UNIT = 128


def label(arch: Arch) -> str:
    """sm_90, gfx942."""
    return arch if isinstance(arch, str) else f"sm_{arch}"


def parse_archs(text: str) -> list[Arch]:
    """Known architectures of a list such as "80,gfx942", each once, in the order of `ARCHS`.

    Raises:
        ValueError: for others, or none.
    """
    wanted = text.split(",")
    if not set(wanted) <= set(map(str, ARCHS)):
        raise ValueError(f"expected a list out of {', '.join(map(str, ARCHS))}, got {text!r}")
    return [arch for arch in ARCHS if str(arch) in wanted]


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(arch: Arch, threads: int, registers: int, shared: int) -> float:
    """Resident warps over the most a multiprocessor of `arch` can hold, 0 when a block does not fit.

    Args:
        arch: a key of `ARCHS`, such as 90 or "gfx942".
        threads: threads per block.
        registers: registers per thread.
        shared: bytes of shared memory per block, static and dynamic.

    Raises:
        ValueError: for an architecture without known limits.
    """
    if arch not in ARCHS:
        raise ValueError(f"arch: expected one of {list(ARCHS)}, got {arch}")
    limits = ARCHS[arch]
    warps = -(-threads // limits.lanes)
    registers_per_warp = _round_up(max(registers, 1) * limits.lanes, limits.register_unit)
    by_registers = limits.registers // registers_per_warp // _WARP_UNIT * _WARP_UNIT // warps
    taken = _round_up(shared + limits.reserved_shared, _SHARED_UNIT)
    by_shared = limits.shared // taken if taken else limits.blocks
    if shared > limits.block_shared:
        return 0.0
    blocks = min(limits.blocks, limits.warps // warps, by_registers, by_shared)
    return blocks * warps / limits.warps
