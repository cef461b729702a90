"""All planted faults, by area."""

from __future__ import annotations

from ..fault import Fault
from . import cache, convert, cpu, cpu_attention, cpu_sink, cuda, integrations, masks, nn, ops, triton

CATALOGUE: dict[str, tuple[Fault, ...]] = {
    "cpu": (*cpu.FAULTS, *cpu_attention.FAULTS, *cpu_sink.FAULTS),
    "cuda": cuda.FAULTS,
    "triton": triton.FAULTS,
    "ops": ops.FAULTS,
    "nn": nn.FAULTS,
    "cache": cache.FAULTS,
    "convert": convert.FAULTS,
    "masks": masks.FAULTS,
    "integrations": integrations.FAULTS,
}
