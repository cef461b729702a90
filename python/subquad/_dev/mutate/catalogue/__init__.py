"""All planted faults, by area."""

from __future__ import annotations

from ..fault import Fault
from . import (
    cache,
    convert,
    cpu,
    cpu_attention,
    cpu_sink,
    cuda,
    cuda_sink,
    cuda_span,
    integrations,
    masks,
    nn,
    ops,
    triton,
    triton_sink,
)  # fmt: skip

CATALOGUE: dict[str, tuple[Fault, ...]] = {
    "cpu": (*cpu.FAULTS, *cpu_attention.FAULTS, *cpu_sink.FAULTS),
    "cuda": (*cuda.FAULTS, *cuda_sink.FAULTS, *cuda_span.FAULTS),
    "triton": (*triton.FAULTS, *triton_sink.FAULTS),
    "ops": ops.FAULTS,
    "nn": nn.FAULTS,
    "cache": cache.FAULTS,
    "convert": convert.FAULTS,
    "masks": masks.FAULTS,
    "integrations": integrations.FAULTS,
}
