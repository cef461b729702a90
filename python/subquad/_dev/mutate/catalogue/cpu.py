"""Faults of the CPU kernels: what they share, CATS, convolution, feature maps; attention is in `cpu_attention`."""

from __future__ import annotations

from ..fault import Fault, Where, tests_of

_K = "not simt and not triton and not reference"


def of(
    file: str, *stems: str, levels: tuple[str, ...] = (), first: tuple[str, ...] = ("forward", "gradients")
) -> Where:
    """A file below csrc, and the ops whose tests look at it."""
    return Where(f"csrc/{file}", tests_of(*stems), _K, first, "native", levels)


_V4 = ("v4", "v4_bf16")  # short dense sums leave v4_bf16 for v4
_ACTIVATIONS = of("common/activations.h", "cats_activation", "cats_mlp")
_HALF = of("common/half.h", "cats_activation", "feature_map")
_EXP = of("common/exp.h", "feature_map", "causal_conv1d", "gated_linear_attention")
_VEC = of("cpu/simd/vec.h", "causal_conv1d", "interval_attention", "gated_linear_attention", "cats_mlp")
_BASE_VEC = of("cpu/simd/vec.h", "interval_attention", "cats_mlp", levels=("baseline",))
_TILE = of("cpu/simd/tile.h", "interval_attention", "gated_linear_attention")
_DOT = of("cpu/simd/dot.h", "cats_mlp")
_PRODUCTS = of("cpu/simd/products.h", "cats_mlp")
_THREADS = of("cpu/threads.h", "interval_attention", "feature_map", first=("thread",))
_ISA = Where(
    "csrc/cpu/isa.cpp", ("tests/package/test_backends.py", "tests/ops/cats_activation"), _K, ("isa",), "native"
)
_ISA_DISPATCH = Where(
    "csrc/cpu/isa.h",
    ("tests/package/test_backends.py", "tests/ops/cats_activation", "tests/ops/feature_map"),
    _K,
    ("isa",),
    "native",
)
_GLU = of("ops/cats_activation/cpu.isa.cpp", "cats_activation")
_GLU_CPU = of("ops/cats_activation/cpu.cpp", "cats_activation")
_MLP = of("ops/cats_mlp/cpu.isa.cpp", "cats_mlp")
_MLP_CPU = of("ops/cats_mlp/cpu.cpp", "cats_mlp")
_DENSE = of("ops/cats_mlp/cpu_dense.h", "cats_mlp", levels=_V4)
_PAIRS = of("ops/cats_mlp/cpu_pairs.h", "cats_mlp", levels=("v4_bf16",))
_MLP_ARGUMENTS = of("ops/cats_activation/arguments.h", "cats_activation", "cats_mlp")
_CONV = of("ops/causal_conv1d/cpu.isa.cpp", "causal_conv1d")
_CONV_CPU = of("ops/causal_conv1d/cpu.cpp", "causal_conv1d")
_CONV_ROWS = of("ops/causal_conv1d/cpu_rows.h", "causal_conv1d", "conv_feature_map")
_CONV_RUN = of("ops/causal_conv1d/cpu_run.h", "causal_conv1d", "conv_feature_map")
_CONV_MAP = of("ops/conv_feature_map/cpu.isa.cpp", "conv_feature_map")
_MAP = of("ops/feature_map/cpu_rows.h", "feature_map", "conv_feature_map")

FAULTS = (
    # --- shared
    Fault("cpu-gelu-cubic", "formula", _ACTIVATIONS, "kGeluCubic = 0.044715f", "kGeluCubic = 0.04715f"),
    Fault(
        "cpu-silu-slope",
        "gradient",
        _ACTIVATIONS,
        "return s * (1.0f + x * (1.0f - s));\n  } else",
        "return s * (1.0f + x * s);\n  } else",
    ),
    Fault(
        "cpu-active-at-threshold",
        "mask",
        _ACTIVATIONS,
        "!(magnitude < threshold) : !(magnitude <= threshold)",
        "!(magnitude < threshold) : !(magnitude < threshold)",
    ),
    Fault("cpu-nan-inactive", "nan", _ACTIVATIONS, ": !(magnitude <= threshold)", ": magnitude > threshold"),
    Fault(
        "cpu-bf16-truncates",
        "rounding",
        _VEC,
        "const VecBits rounded = bits + 0x7fffu + (bits >> 16 & 1u);",
        "const VecBits rounded = bits;",
    ),
    Fault(
        "cpu-bf16-half-up", "rounding", _HALF, "(bits + 0x7fffu + (bits >> 16 & 1u)) >> 16", "(bits + 0x8000u) >> 16"
    ),
    Fault(
        "cpu-bf16-nan-to-inf",
        "nan",
        _HALF,
        "return {static_cast<uint16_t>(bits >> 16 | 0x40u)};",
        "return {static_cast<uint16_t>(0x7f80u)};",
    ),
    Fault("cpu-fp16-overflow", "rounding", _HALF, "if (magnitude >= 0x477ff000u)", "if (magnitude >= 0x7f800000u)"),
    Fault("cpu-exp-overflow", "guard", _EXP, "return x > most ? infinity : low;", "return low;"),
    Fault("cpu-exp-coefficient", "formula", _EXP, "p = p * r + 1.6666666e-1f;", "p = p * r + 1.5666666e-1f;"),
    Fault(
        "cpu-vec-part-reads-on",
        "bounds",
        _VEC,
        "for (int64_t i = 0; i < n; ++i) part[i] = p[i];\n  return vec_load(part);",
        "for (int64_t i = 0; i + 1 < n; ++i) part[i] = p[i];\n  return vec_load(part);",
    ),
    Fault(
        "cpu-baseline-sum",
        "accumulator",
        _BASE_VEC,
        "return (a[0] + a[2]) + (a[1] + a[3]);",
        "return (a[0] + a[2]) + a[1];",
    ),
    Fault("cpu-baseline-max", "formula", _BASE_VEC, "return low > high ? low : high;", "return low;"),
    Fault("cpu-isa-ignored", "dispatch", _ISA, "subquad::cpu::current().store(level, std::memory_order_relaxed);", ""),
    Fault(
        "cpu-isa-all-baseline",
        "dispatch",
        _ISA_DISPATCH,
        "return SQ_CALL_ISA(v4_bf16, function, __VA_ARGS__);",
        "return SQ_CALL_ISA(baseline, function, __VA_ARGS__);",
    ),
    Fault(
        "cpu-items-skip-last",
        "bounds",
        _THREADS,
        "for (int64_t i = next(); i < n; i = next()) body(i);",
        "for (int64_t i = next(); i + 1 < n || i == 0; i = next()) body(i);",
    ),
    Fault(
        "cpu-product-last-columns",
        "bounds",
        _TILE,
        "for (int64_t col = 0; col < cols; col += kTileCols) {",
        "for (int64_t col = 0; col < cols; col += 2 * kTileCols) {",
    ),
    Fault(
        "cpu-product-forgets",
        "accumulator",
        _TILE,
        "sums[r][n] = add ? vec_load(c + r * ldc + n * kLanes) : vec_zero();",
        "sums[r][n] = vec_zero();",
    ),
    Fault(
        "cpu-dot-tail",
        "bounds",
        _DOT,
        "if (k < n) {\n    for (int r = 0; r < R; ++r) {\n      const Tail<W> tail",
        "if (k + 1 < n) {\n    for (int r = 0; r < R; ++r) {\n      const Tail<W> tail",
    ),
    Fault(
        "cpu-products-single-rows",
        "stride",
        _PRODUCTS,
        "const int t = j < wide ? j * kTokens : wide * kTokens + j - wide;",
        "const int t = j < wide ? j * kTokens : wide * kTokens;",
    ),
    # --- CATS
    Fault(
        "cpu-glu-last-column",
        "bounds",
        _GLU,
        "const int64_t n = p.cols - column < kTile ? p.cols - column : kTile, offset",
        "const int64_t n = p.cols - column < kTile ? p.cols - column - 1 : kTile, offset",
    ),
    Fault(
        "cpu-glu-threshold-column",
        "stride",
        _GLU,
        "out[i] = p.threshold[(column + i) * p.threshold_stride];",
        "out[i] = p.threshold[i * p.threshold_stride];",
    ),
    Fault(
        "cpu-glu-straight-through-du",
        "gradient",
        _GLU,
        "du[i] = active ? product : 0.0f;",
        "du[i] = kStraightThrough || active ? product : 0.0f;",
    ),
    Fault(
        "cpu-glu-dead-product",
        "nan",
        _GLU,
        "out[i] = is_active(s, t[i], kInclusive) ? value : 0.0f;",
        "out[i] = is_active(s, t[i], kInclusive) * value;",
    ),
    Fault(
        "cpu-glu-last-rows",
        "bounds",
        _GLU_CPU,
        "items = ceil_div(p.rows, rows);",
        "items = std::max<int64_t>(1, p.rows / rows);",
    ),
    Fault(
        "cpu-threshold-shape",
        "guard",
        _MLP_ARGUMENTS,
        "p.threshold_stride = count == 1 ? 0 : threshold.stride(0);",
        "p.threshold_stride = count == 1 ? 0 : 1;",
    ),
    Fault(
        "cpu-mlp-bias-up",
        "formula",
        _MLP,
        "h[r] = activation[r] * (vec_sum(acc[r]) + bias<W>(p.b_up, index[r]));",
        "h[r] = activation[r] * vec_sum(acc[r]);",
    ),
    Fault(
        "cpu-mlp-threshold-neuron",
        "stride",
        _MLP,
        "p.threshold[(i + r) * p.threshold_stride], p.inclusive)) continue;",
        "p.threshold[i * p.threshold_stride], p.inclusive)) continue;",
    ),
    Fault(
        "cpu-mlp-single-rest",
        "bounds",
        _MLP,
        "for (; j < active; ++j) single_up_down<W, 1>",
        "for (; j + 1 < active; ++j) single_up_down<W, 1>",
    ),
    Fault(
        "cpu-mlp-union", "mask", _MLP, "if (p.union_mask) {\n      for", "if (p.union_mask && wanting > 1) {\n      for"
    ),
    Fault(
        "cpu-mlp-wanted-token",
        "stride",
        _MLP,
        "(u[r * kMaxTokens + (dense ? t : j)] + offset)",
        "(u[r * kMaxTokens + t] + offset)",
    ),
    Fault(
        "cpu-mlp-partials",
        "accumulator",
        _MLP,
        "for (int64_t c = 0; c < s.chunks; ++c) {\n      const float* from",
        "for (int64_t c = 0; c + 1 < s.chunks; ++c) {\n      const float* from",
    ),
    Fault("cpu-mlp-dead-inf", "nan", _MLP, "if (!__builtin_isfinite(sum)) sum = selected_sum<W>(p, s, t, o + r);", ""),
    Fault(
        "cpu-mlp-stale-alive",
        "stale",
        _MLP,
        "if (!dense && !p.neuron_major) std::memset(s.alive, 0, static_cast<size_t>(p.tokens * p.intermediate));",
        "",
    ),
    Fault(
        "cpu-mlp-panel",
        "bounds",
        _MLP_CPU,
        "panel.y = static_cast<char*>(p.y) + begin * row_bytes;",
        "panel.y = static_cast<char*>(p.y) + t * row_bytes;",
    ),
    Fault(
        "cpu-mlp-short-sums",
        "rounding",
        _MLP_CPU,
        "constexpr int64_t kLongSum = 64;",
        "constexpr int64_t kLongSum = 0;",
    ),
    Fault(
        "cpu-mlp-union-limit",
        "guard",
        _MLP_CPU,
        "STD_TORCH_CHECK(!p.union_mask || p.tokens <= kDenseTokens,",
        "STD_TORCH_CHECK(!p.union_mask || p.tokens <= 1000 * kDenseTokens,",
    ),
    Fault(
        "cpu-dense-mask",
        "mask",
        _DENSE,
        "u[j] = active[j] ? value : 0.0f;",
        "u[j] = value;",
    ),
    Fault("cpu-pairs-odd-row", "bounds", _PAIRS, "2 * j + 1 < count;", "true;"),
    Fault("cpu-pairs-slice", "stride", _PAIRS, "ldz, k > 0, ahead);", "ldz, false, ahead);"),
    Fault("cpu-dense-bias", "stride", _DENSE, "bias<W>(p.b_down, o + c));", "bias<W>(p.b_down, c));"),
    # --- causal convolution
    Fault("cpu-conv-silu-slope", "gradient", _CONV_ROWS, "return s * (1.0f + x * (1.0f - s));", "return s;"),
    Fault(
        "cpu-conv-tile-rows",
        "bounds",
        _CONV_ROWS,
        "#pragma GCC unroll 4\n    for (int64_t t = 0; t < r.rows; ++t) row(t);",
        "#pragma GCC unroll 4\n    for (int64_t t = 0; t < r.rows - (r.rows > 2); ++t) row(t);",
    ),
    Fault(
        "cpu-conv-state-slot",
        "state",
        _CONV_ROWS,
        "return to_float(state[p.taps - 1 - (s.start - t)]);",
        "return to_float(state[s.start - t - 1]);",
    ),
    Fault(
        "cpu-conv-sequence-clamp",
        "guard",
        _CONV_ROWS,
        "const int64_t n = clamp(p.sequence[t], 0, p.sequences - 1);",
        "const int64_t n = p.sequence[t];",
    ),
    Fault(
        "cpu-conv-group",
        "stride",
        _CONV_ROWS,
        "return h / p.groups * p.head_dim + (c - h * p.head_dim);",
        "return h % (p.inputs / p.head_dim) * p.head_dim + (c - h * p.head_dim);",
    ),
    Fault(
        "cpu-conv-dweight-short",
        "gradient",
        _CONV,
        "if (!kEdge || t < r.t1) {\n        db += dz;",
        "if (!kEdge) {\n        db += dz;",
    ),
    Fault(
        "cpu-conv-grad-final",
        "gradient",
        _CONV,
        "if (kEdge && r.grad_final != nullptr && column >= 0) {",
        "if (kEdge && r.grad_final != nullptr && column > 0) {",
    ),
    Fault(
        "cpu-conv-final-short", "state", _CONV, "const int64_t slot = k + (s.end - s.start);", "const int64_t slot = k;"
    ),
    Fault(
        "cpu-conv-ring",
        "state",
        _CONV,
        "data[(s.position + t) % s.length * s.stride_l]",
        "data[t % s.length * s.stride_l]",
    ),
    Fault(
        "cpu-conv-update-lost",
        "state",
        _CONV,
        "from < s.length ? data[from * s.stride_l] : x[(from - s.length) * stride + k];",
        "data[l * s.stride_l];",
    ),
    Fault(
        "cpu-conv-skipped-row",
        "guard",
        _CONV,
        "const bool live = index >= 0 && index < p.states;",
        "const bool live = index < p.states;",
    ),
    Fault(
        "cpu-conv-dstate-through",
        "gradient",
        _CONV,
        "if (grad_final != nullptr && k >= length) sum[k] +=",
        "if (grad_final != nullptr && k > length) sum[k] +=",
    ),
    Fault(
        "cpu-conv-last-slice",
        "bounds",
        _CONV_CPU,
        "slices = ceil_div(width, kConvUpdateChannels),",
        "slices = width < kConvUpdateChannels ? 1 : width / kConvUpdateChannels,",
    ),
    Fault(
        "cpu-conv-reduce-columns",
        "bounds",
        _CONV_RUN,
        "kernels.reduce(p, i * kSlice, std::min(p.channels, (i + 1) * kSlice)); });",
        "kernels.reduce(p, 0, std::min(p.channels, kSlice)); });",
    ),
    Fault(
        "cpu-conv-map-batch",
        "stride",
        _CONV_MAP,
        "feature::store_tile<T>(p.map, s, weight, head, b * p.conv.time + t, n);",
        "feature::store_tile<T>(p.map, s, weight, head, t, n);",
    ),
    # --- feature maps
    Fault("cpu-map-joint-maximum", "formula", _MAP, "top = up > down ? up : down;", "top = up;"),
    Fault(
        "cpu-map-clamped-gradient",
        "gradient",
        _MAP,
        "= value[j] < eps ? 0.0f : grad[j];",
        "= eps < eps ? 0.0f : grad[j];",
    ),
    Fault("cpu-map-joint-dot", "gradient", _MAP, "if (joint) up = down = up + down;", ""),
    Fault("cpu-map-padding", "nan", _MAP, "fill(s.positive + p.f, s.ldy - p.f, -kInf);", ""),
    Fault(
        "cpu-map-shared-heads",
        "gradient",
        _MAP,
        "head < (index + 1) * p.sharing; ++head) {",
        "head < index * p.sharing + 1; ++head) {",
    ),
    Fault("cpu-map-dweight-forgets", "accumulator", _MAP, "{s.dweight, s.ldy}, true);", "{s.dweight, s.ldy}, false);"),
)
