"""Faults of the CUDA kernels of the streaming cache's step, which the emulator runs."""

from __future__ import annotations

from ..fault import Fault, Where


def _of(file: str) -> Where:
    path = f"csrc/ops/sink_attention_step/{file}"
    return Where(path, ("tests/ops/sink_attention_step",), "simt", ("forward", "simt"), "simt")


_PARTS = _of("cuda_parts.cuh")
_TILE = _of("cuda_tile.cuh")
_READ = _of("cuda_read.cuh")
_WRITE = _of("cuda_write.cuh")

FAULTS = (
    Fault(
        "cuda-sink-wrap",
        "bounds",
        _TILE,
        "start + key < from.wrap ? start + key : start + key - from.wrap;",
        "start + key;",
    ),
    Fault("cuda-sink-window", "mask", _READ, "block.begin[thread]) - base,", "block.begin[thread]) - base - 1,"),
    Fault("cuda-sink-back", "formula", _READ, "before + t - (p.absolute ? 0 : view.forgotten);", "before + t;"),
    Fault("cuda-sink-across", "formula", _READ, "row[sink_slot(pair.second, width)] = -first;", ""),
    Fault("cuda-sink-tile-barrier", "barrier", _READ, "__syncthreads();  // the last tile has been walked", ""),
    Fault("cuda-sink-table", "bounds", _READ, "fill_turns(p, keys, shared);", "fill_turns(p, keys - 1, shared);"),
    Fault("cuda-sink-rescale", "accumulator", _TILE, "float sum = sums.sum[i] * factor;", "float sum = sums.sum[i];"),
    Fault("cuda-sink-v-scale", "stride", _TILE, "kScaled<S> ? v[e] * batch.v_scale[u] : v[e];", "v[e];"),
    Fault("cuda-sink-infinity", "nan", _TILE, "fabsf(score) < INFINITY ? score : NAN;", "score;"),
    Fault(
        "cuda-sink-phase",
        "index width",
        _PARTS,
        "static_cast<std::uint64_t>(position) * step",
        "static_cast<std::uint32_t>(position) * step",
    ),
    Fault(
        "cuda-sink-even", "rounding", _PARTS, "magnitude + 0x7ffffu + (magnitude >> 20 & 1u)", "magnitude + 0x80000u"
    ),
    Fault("cuda-sink-no-token", "mask", _WRITE, "is_token ? splits : 0", "splits"),
    Fault("cuda-sink-later-token", "state", _WRITE, "t < count - p.ring)", "t <= count - p.ring)"),
    Fault("cuda-sink-early-counter", "state", _WRITE, "if (writers > 1) return;", ""),
)
