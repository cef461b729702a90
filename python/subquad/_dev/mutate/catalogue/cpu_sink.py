"""Faults of the CPU kernels of the streaming cache's step."""

from __future__ import annotations

from ..fault import Fault
from .cpu import of

_ROWS = of("ops/sink_attention_step/cpu_rows.h", "sink_attention_step")
_PRODUCTS = of("ops/sink_attention_step/cpu_products.h", "sink_attention_step")
_ATTEND = of("ops/sink_attention_step/cpu_attend.h", "sink_attention_step")
_ITEMS = of("ops/sink_attention_step/cpu.isa.cpp", "sink_attention_step")
_CALL = of("ops/sink_attention_step/cpu.cpp", "sink_attention_step")
_VIEW = of("ops/sink_attention_step/params.h", "sink_attention_step")

FAULTS = (
    Fault(
        "cpu-sink-logit-twice",
        "sink",
        _ATTEND,
        "if (has_sink) total += sink == shift ? 1.0f : vector_exp(sink - shift);",
        "if (has_sink) total += static_cast<float>(ranges) * vector_exp(sink - shift);",
    ),
    Fault("cpu-sink-window", "bounds", _VIEW, "stop - p.window);", "stop - p.window - 1);"),
    Fault(
        "cpu-sink-wrap",
        "bounds",
        _ATTEND,
        "n = smaller(left, p_.ring - place);",
        "n = left;",
    ),
    Fault("cpu-sink-range", "bounds", _ATTEND, "oldest + (range + 1) * kRange)", "oldest + (range + 1) * kRange - 1)"),
    Fault("cpu-sink-back", "formula", _ATTEND, "return p_.absolute ? 0 : views_[row].forgotten;", "return 0;"),
    Fault("cpu-sink-base", "formula", _ATTEND, "(sinks ? back(row) : 0) - base", "(sinks ? back(row) : 0) - base + 1"),
    Fault(
        "cpu-sink-entering",
        "formula",
        _ATTEND,
        "half_ > 0 && p_.rotated && tokens.entering;\n    for (",
        "false;\n    for (",
    ),
    Fault(
        "cpu-sink-unseen",
        "nan",
        _ATTEND,
        "if (other.begin != seen.begin || other.end != seen.end) break;",
        "if (other.begin != seen.begin) break;",
    ),
    Fault("cpu-sink-v-scale", "stride", _ATTEND, "rest.k_scale += i, rest.v_scale += i;", "rest.k_scale += i;"),
    Fault("cpu-sink-rescale", "accumulator", _PRODUCTS, "state.sum *= fade[0];", ""),
    Fault("cpu-sink-quadrant", "formula", _ROWS, "((quadrant + 1u) & 2u) << 30", "(quadrant & 2u) << 30"),
    Fault("cpu-sink-phase", "index width", _ROWS, "factor * turns[f] >> 32", "static_cast<uint32_t>(factor) * turns[f] >> 32"),
    Fault("cpu-sink-even", "rounding", _ROWS, "magnitude + 0x7ffffu + (magnitude >> 20 & 1u)", "magnitude + 0x80000u"),
    Fault("cpu-sink-zero-row", "nan", _ROWS, "most == 0.0f ? 1.0f : most / limit", "most / limit"),
    Fault("cpu-sink-later-token", "state", _ITEMS, "if (token >= p.sinks && t + p.ring < count)", "if (t + p.ring < count)"),
    Fault("cpu-sink-rolled-back", "state", _CALL, "larger(p.written[b], after)", "after"),
)  # fmt: skip
