"""Faults of the CUDA kernels of Superlinear attention, which the emulator runs."""

from __future__ import annotations

from ..fault import Fault, Where


def _of(file: str, *stems: str) -> Where:
    tests = tuple(f"tests/ops/{stem}" for stem in stems)
    return Where(f"csrc/{file}", tests, "simt", ("forward", "simt"), "simt")


_ROWS = _of("cuda/rows.cuh", "span_attention", "span_search")
_SEARCH = _of("ops/span_search/cuda.cuh", "span_search")
_SPANS = _of("ops/span_attention/cuda.cuh", "span_attention")

FAULTS = (
    Fault("cuda-rows-aligned", "bounds", _ROWS, "is_aligned16(data) && ", ""),
    Fault("cuda-rows-runs", "index width", _ROWS, "int64_t{64} << 20", "int64_t{64} << 40"),
    Fault("cuda-search-nearer", "formula", _SEARCH, "stripe > other.stripe", "stripe < other.stripe"),
    Fault("cuda-search-first", "mask", _SEARCH, "possible[u] = key >= row.first", "possible[u] = key >= 0"),
    Fault("cuda-search-empty-share", "guard", _SEARCH, "Ranked{-INFINITY, -1, 0}", "Ranked{INFINITY, -1, 0}"),
    Fault(
        "cuda-search-queries-barrier",
        "barrier",
        _SEARCH,
        "if (held > 0) __syncthreads();  // the last heads' queries may still be being read",
        "",
    ),
    Fault("cuda-search-nothing", "nan", _SEARCH, "mine.rank > -INFINITY && mine.before", "mine.before"),
    Fault("cuda-search-run", "bounds", _SEARCH, "row(p, first_token + at / heads)", "row(p, at / heads)"),
    Fault("cuda-span-piece-end", "bounds", _SPANS, "smaller(pieces.keys, pieces.end - begin)", "pieces.keys"),
    Fault("cuda-span-rescale", "accumulator", _SPANS, "sums.top = top, sums.sum *= factor;", "sums.top = top;"),
    Fault("cuda-span-share-barrier", "barrier", _SPANS, "__syncthreads();  // the last piece is stored", ""),
    Fault("cuda-span-mask", "mask", _SPANS, "p.key_mask + b * p.keys + begin", "p.key_mask + b * p.keys"),
    Fault("cuda-span-base-dropped", "formula", _SPANS, "float total = base_weight;", "float total = 0.0f;"),
    Fault("cuda-span-gate", "formula", _SPANS, "p.gate + row * p.spans + m", "p.gate + row * p.spans"),
)
