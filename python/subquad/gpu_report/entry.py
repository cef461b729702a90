"""One line of the report."""

from __future__ import annotations

from dataclasses import dataclass

from .cubin import Code
from .occupancy import ARCHS, Arch


@dataclass(frozen=True)
class Entry:
    """One kernel for one architecture: where it comes from, what a launch gives it, what its code needs.

    `shared` is in bytes: static, and for Triton dynamic too. `occupancy` is None when the block size is unknown.
    """

    backend: str
    stem: str
    kernel: str
    cases: list[str]
    arch: Arch
    threads: int | None
    grid: list[int] | None
    shared: int
    occupancy: float | None
    code: Code
    allow_spill: str | None

    @property
    def oversized(self) -> bool:
        """Needs more shared memory than a block there can have: it would not launch."""
        return self.shared > ARCHS[self.arch].block_shared

    @property
    def failed(self) -> bool:
        """Would not launch, or spills and nobody said why. Spills on AMD, whose tiles nobody has chosen, are only listed."""
        return self.oversized or (self.code.spills and not self.allow_spill and isinstance(self.arch, int))
