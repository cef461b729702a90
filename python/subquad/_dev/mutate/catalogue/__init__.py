"""All planted faults, by area."""

from __future__ import annotations

from ..fault import Fault
from . import cache, convert, cpu, cpu_attention, cuda, integrations, masks, nn, ops, triton, triton_sink

CATALOGUE: dict[str, tuple[Fault, ...]] = {
    "cpu": (*cpu.FAULTS, *cpu_attention.FAULTS),
    "cuda": cuda.FAULTS,
    "triton": (*triton.FAULTS, *triton_sink.FAULTS),
    "ops": ops.FAULTS,
    "nn": nn.FAULTS,
    "cache": cache.FAULTS,
    "convert": convert.FAULTS,
    "masks": masks.FAULTS,
    "integrations": integrations.FAULTS,
}
