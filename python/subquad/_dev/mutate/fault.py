"""One planted fault, and what makes a catalogue of them valid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

AREAS = ("cpu", "cuda", "triton", "ops", "nn", "cache", "convert", "masks", "integrations")
KINDS = (
    "bounds",  # off by one, a block left out or read twice
    "mask",  # what a row sees, or which neuron is active
    "stride",  # the wrong element: strides, heads, groups, offsets
    "accumulator",  # a sum that forgets, keeps or narrows what it should not
    "barrier",  # threads that do not wait
    "sink",  # dropped or doubled
    "gradient",  # a wrong factor, a missing term
    "state",  # not written back, written too early, of another row
    "stale",  # a cache that outlives what it was made from
    "rounding",  # of results or operands
    "guard",  # a check, a clamp or a fallback that is missing
    "index width",  # 32 bits where 64 are needed
    "dispatch",  # another kernel, level or backend than the right one
    "formula",  # another function
    "nan",  # a value that leaks, or one that is swallowed
)


@dataclass(frozen=True)
class Where:
    """A source file and the tests that look at it.

    Attributes:
        file: path below the root.
        tests: files or folders of tests below the root.
        select: pytest's -k, to leave out what cannot see the file.
        first: words of test names, the likeliest to notice: they run first.
        library: "native" or "simt", to be built anew; "" for sources in Python.
        levels: CPU instruction sets to build with the fault; () for the best of the machine alone.
    """

    file: str
    tests: tuple[str, ...]
    select: str = ""
    first: tuple[str, ...] = ("forward", "gradients")
    library: str = ""
    levels: tuple[str, ...] = ()


def tests_of(*stems: str) -> tuple[str, ...]:
    """The tests of these ops, and those of what all ops do alike."""
    return (*(f"tests/ops/{stem}" for stem in stems), "tests/package/test_call_path.py")


@dataclass(frozen=True)
class Fault:
    """`old`, which stands exactly once in the file, becomes `new`.

    Attributes:
        name: unique, as it is selected and reported.
        kind: one of KINDS.
        equivalent: why no test can see it, for a fault that turned out to change nothing; it stays among the others.
    """

    name: str
    kind: str
    where: Where
    old: str
    new: str
    equivalent: str = ""

    def matches(self, root: Path) -> int:
        """How often the pattern stands in the file; 0 if there is no such file."""
        path = root / self.where.file
        return path.read_text().count(self.old) if path.is_file() else 0

    def text(self, root: Path) -> str:
        """The file with the fault in it."""
        return (root / self.where.file).read_text().replace(self.old, self.new)


def problems(catalogue: dict[str, tuple[Fault, ...]], root: Path) -> list[str]:
    """What is wrong with a catalogue by area; empty when every pattern is alive."""
    found = [f"unknown area {area}" for area in catalogue if area not in AREAS]
    faults = [fault for group in catalogue.values() for fault in group]
    found += [f"{name}: {n} faults have this name" for name, n in _repeated(f.name for f in faults)]
    for fault in faults:
        matches = fault.matches(root)
        if matches != 1:
            found.append(f"{fault.name}: its pattern matches {matches} places in {fault.where.file}, expected 1")
        if fault.old == fault.new:
            found.append(f"{fault.name}: changes nothing")
        if fault.kind not in KINDS:
            found.append(f"{fault.name}: unknown kind {fault.kind!r}")
        found += [f"{fault.name}: there is no {path}" for path in fault.where.tests if not (root / path).exists()]
    changes = (f"{f.where.file}: {f.old!r} -> {f.new!r}" for f in faults)
    return found + [f"planted {n} times: {change}" for change, n in _repeated(changes)]


def _repeated(items: Iterable[str]) -> list[tuple[str, int]]:
    return [(item, n) for item, n in Counter(items).items() if n > 1]
