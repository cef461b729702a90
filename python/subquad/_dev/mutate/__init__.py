"""Planted faults: a catalogue of small wrong changes to the sources, and whether the tests notice each of them.

`python -m subquad._dev.mutate` copies the sources, plants one fault after the other in the copy, builds what it touches and runs
the tests that look at it: those of the quick lane, then those that only the whole lane has. See docs/testing.md.
"""

from __future__ import annotations

from .fault import AREAS, KINDS, Fault, Where

__all__ = ["AREAS", "KINDS", "Fault", "Where"]
