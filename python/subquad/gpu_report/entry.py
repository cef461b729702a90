"""One line of the report."""

from __future__ import annotations

from dataclasses import dataclass

from .cubin import Code


@dataclass(frozen=True)
class Entry:
    """One kernel for one architecture: where it comes from, what a launch gives it, what its code needs.

    `shared` is in bytes: static, and for Triton dynamic too. `occupancy` is None when the block size is unknown.
    """

    backend: str
    stem: str
    kernel: str
    cases: list[str]
    arch: int
    threads: int | None
    grid: list[int] | None
    shared: int
    occupancy: float | None
    code: Code
    allow_spill: str | None

    @property
    def failed(self) -> bool:
        """Spills, and nobody said why."""
        return self.code.spills and not self.allow_spill
