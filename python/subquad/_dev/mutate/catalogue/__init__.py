"""All planted faults, by area."""

from __future__ import annotations

from ..fault import Fault
from . import (
    cache,
    cache_sink,
    cache_span,
    convert,
    cpu,
    cpu_attention,
    cpu_sink,
    cpu_span,
    cuda,
    cuda_sink,
    cuda_span,
    integrations,
    masks,
    nn,
    nn_span,
    ops,
    ops_span,
    quantised,
    triton,
    triton_sink,
    triton_span,
)  # fmt: skip

CATALOGUE: dict[str, tuple[Fault, ...]] = {
    "cpu": (*cpu.FAULTS, *cpu_attention.FAULTS, *cpu_sink.FAULTS, *cpu_span.FAULTS, *quantised.CPU),
    "cuda": (*cuda.FAULTS, *cuda_sink.FAULTS, *cuda_span.FAULTS, *quantised.CUDA),
    "triton": (*triton.FAULTS, *triton_sink.FAULTS, *triton_span.FAULTS, *quantised.TRITON),
    "ops": (*ops.FAULTS, *ops_span.FAULTS, *quantised.OPS),
    "nn": (*nn.FAULTS, *nn_span.FAULTS),
    "cache": (*cache.FAULTS, *cache_sink.FAULTS, *cache_span.FAULTS),
    "convert": convert.FAULTS,
    "masks": masks.FAULTS,
    "integrations": integrations.FAULTS,
}
