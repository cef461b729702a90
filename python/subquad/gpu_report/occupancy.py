"""Theoretical occupancy from registers, shared memory and block size.

Limits per architecture: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor offers; shared memory in bytes."""

    warps: int
    blocks: int
    shared: int
    registers: int = 65536


ARCHS = {
    80: Limits(64, 32, 164 * 1024),
    86: Limits(48, 16, 100 * 1024),
    89: Limits(48, 24, 100 * 1024),
    90: Limits(64, 32, 228 * 1024),
    100: Limits(64, 32, 228 * 1024),
    120: Limits(48, 24, 100 * 1024),
}
_WARP = 32
_REGISTER_UNIT = 256  # registers are allotted to a warp in units of this
_WARP_UNIT = 4  # warps are spread over four partitions
_RESERVED_SHARED = 1024  # per block, taken by the system
_SHARED_UNIT = 128


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(arch: int, threads: int, registers: int, shared: int) -> float:
    """Resident warps over the most a multiprocessor of `arch` can hold, 0 when a block does not fit.

    Args:
        arch: a key of `ARCHS`, such as 90.
        threads: threads per block.
        registers: registers per thread.
        shared: bytes of shared memory per block, static and dynamic.

    Raises:
        ValueError: for an architecture without known limits.
    """
    if arch not in ARCHS:
        raise ValueError(f"arch: expected one of {sorted(ARCHS)}, got {arch}")
    limits = ARCHS[arch]
    warps = -(-threads // _WARP)
    registers_per_warp = _round_up(max(registers, 1) * _WARP, _REGISTER_UNIT)
    by_registers = limits.registers // registers_per_warp // _WARP_UNIT * _WARP_UNIT // warps
    by_shared = limits.shared // _round_up(shared + _RESERVED_SHARED, _SHARED_UNIT)
    blocks = min(limits.blocks, limits.warps // warps, by_registers, by_shared)
    return blocks * warps / limits.warps
