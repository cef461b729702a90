"""Faults of the CPU kernels."""

from __future__ import annotations

from ..fault import Fault, Where

_K = "not simt and not triton and not reference"


def _of(
    file: str, *stems: str, levels: tuple[str, ...] = (), first: tuple[str, ...] = ("forward", "gradients")
) -> Where:
    return Where(f"csrc/{file}", tuple(f"tests/ops/{stem}" for stem in stems), _K, first, "native", levels)


_V4 = ("v4", "v4_bf16")  # short dense sums leave v4_bf16 for v4
_ACTIVATIONS = _of("common/activations.h", "cats_activation", "cats_mlp")
_HALF = _of("common/half.h", "cats_activation", "feature_map")
_EXP = _of("common/exp.h", "feature_map", "causal_conv1d", "gated_linear_attention")
_VEC = _of("cpu/simd/vec.h", "causal_conv1d", "interval_attention", "gated_linear_attention", "cats_mlp")
_BASE_VEC = _of("cpu/simd/vec.h", "interval_attention", "cats_mlp", levels=("baseline",))
_TILE = _of("cpu/simd/tile.h", "interval_attention", "gated_linear_attention")
_DOT = _of("cpu/simd/dot.h", "cats_mlp")
_PRODUCTS = _of("cpu/simd/products.h", "cats_mlp")
_THREADS = _of("cpu/threads.h", "interval_attention", "feature_map", first=("thread",))
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
_GLU = _of("ops/cats_activation/cpu.isa.cpp", "cats_activation")
_GLU_CPU = _of("ops/cats_activation/cpu.cpp", "cats_activation")
_MLP = _of("ops/cats_mlp/cpu.isa.cpp", "cats_mlp")
_MLP_CPU = _of("ops/cats_mlp/cpu.cpp", "cats_mlp")
_DENSE = _of("ops/cats_mlp/cpu_dense.h", "cats_mlp", levels=_V4)
_MLP_ARGUMENTS = _of("ops/cats_activation/arguments.h", "cats_activation", "cats_mlp")
_CONV = _of("ops/causal_conv1d/cpu.isa.cpp", "causal_conv1d")
_CONV_CPU = _of("ops/causal_conv1d/cpu.cpp", "causal_conv1d")
_CONV_ROWS = _of("ops/causal_conv1d/cpu_rows.h", "causal_conv1d", "conv_feature_map")
_CONV_RUN = _of("ops/causal_conv1d/cpu_run.h", "causal_conv1d", "conv_feature_map")
_CONV_MAP = _of("ops/conv_feature_map/cpu.isa.cpp", "conv_feature_map")
_MAP = _of("ops/feature_map/cpu_rows.h", "feature_map", "conv_feature_map")
_GLA_STEP = _of("ops/gated_linear_attention/cpu.isa.cpp", "gated_linear_attention")
_GLA_STATE = _of("ops/gated_linear_attention/cpu_step.h", "gated_linear_attention", "lawcat_decode_step")
_GLA = _of("ops/gated_linear_attention/cpu_forward.h", "gated_linear_attention")
_GLA_CHUNK = _of("ops/gated_linear_attention/cpu_chunk.h", "gated_linear_attention")
_GLA_BACK = _of("ops/gated_linear_attention/cpu_backward.h", "gated_linear_attention")
_ATTENTION = _of("ops/interval_attention/cpu_forward.h", "interval_attention")
_ATTENTION_BACK = _of("ops/interval_attention/cpu_backward.h", "interval_attention")
_ATTENTION_ROWS = _of("ops/interval_attention/cpu_rows.h", "interval_attention")
_ATTENTION_ITEMS = _of("ops/interval_attention/cpu.isa.cpp", "interval_attention")
_INTERVALS = _of("ops/interval_attention/params.h", "interval_attention")
_DECODE = _of("ops/lawcat_decode_step/cpu.isa.cpp", "lawcat_decode_step")

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
        "return threshold.size(0) == 1 ? 0 : threshold.stride(0);",
        "return threshold.size(0) == 1 ? 0 : 1;",
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
        "u[r * kMaxTokens + j] = active[r][t + j] ? value : 0.0f;",
        "u[r * kMaxTokens + j] = value;",
    ),
    Fault("cpu-dense-odd-row", "bounds", _DENSE, "const int pairs = (count + 1) / 2;", "const int pairs = count / 2;"),
    Fault("cpu-dense-bias", "stride", _DENSE, "bias<W>(p.b_down, o + c));", "bias<W>(p.b_down, c));"),
    # --- causal convolution
    Fault("cpu-conv-silu-slope", "gradient", _CONV_ROWS, "return s * (1.0f + x * (1.0f - s));", "return s;"),
    Fault(
        "cpu-conv-tile-rows",
        "bounds",
        _CONV_ROWS,
        "for (int64_t t = 0; t < r.rows; ++t) {\n    window",
        "for (int64_t t = 0; t < r.rows - (r.rows > 2); ++t) {\n    window",
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
        "state[(position + t) % p.length * p.state_stride_l] = x[t * p.inputs];",
        "state[t % p.length * p.state_stride_l] = x[t * p.inputs];",
    ),
    Fault(
        "cpu-conv-update-lost",
        "state",
        _CONV,
        "from < p.length ? state[from * p.state_stride_l] : x[(from - p.length) * p.inputs];",
        "state[l * p.state_stride_l];",
    ),
    Fault(
        "cpu-conv-skipped-row",
        "guard",
        _CONV,
        "const bool live = n >= 0 && n < p.states;",
        "const bool live = n < p.states;",
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
        "slices = ceil_div(p.inputs, kSlice);",
        "slices = p.inputs < kSlice ? 1 : p.inputs / kSlice;",
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
    Fault("cpu-map-clamped-gradient", "gradient", _MAP, "grad[j] = value[j] < eps ? 0.0f : grad[j];", ""),
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
    # --- linear attention
    Fault(
        "cpu-gla-step-order",
        "formula",
        _GLA_STATE,
        "s = decay * s + key * vec_load(t.v + first + n * kLanes);",
        "s = decay * (s + key * vec_load(t.v + first + n * kLanes));",
    ),
    Fault(
        "cpu-gla-step-heads", "state", _GLA_STEP, "step_state(token, heads, h == 0);", "step_state(token, heads, true);"
    ),
    Fault(
        "cpu-gla-step-skip",
        "guard",
        _GLA_STEP,
        "if (slot < 0 || slot >= p.pool) {",
        "if (slot < -1 || slot >= p.pool) {",
    ),
    Fault("cpu-gla-step-z", "state", _GLA_STEP, "z[c] = decay[c] * z[c] + k[c];", "z[c] = z[c] + k[c];"),
    Fault("cpu-gla-last-tail", "state", _GLA, "decay_state(nullptr);", ""),
    Fault("cpu-gla-pending-first", "state", _GLA, "pending_[c] = 1.0f;", "pending_[c] = 0.0f;"),
    Fault("cpu-gla-half", "bounds", _GLA, "walk(t + half, n - half);", "walk(t + half, n - half - (n > 3));"),
    Fault("cpu-gla-eps", "formula", _GLA, "inverse = 1.0f / (total + p_.eps);", "inverse = 1.0f / total;"),
    Fault(
        "cpu-gla-clamped-bounds",
        "guard",
        _GLA_CHUNK,
        "const int64_t begin = clamp(p.cu_seqlens[n], 0, p.tokens);",
        "const int64_t begin = p.cu_seqlens[n];",
    ),
    Fault(
        "cpu-gla-moderate",
        "guard",
        _GLA_CHUNK,
        "constexpr float kHalfRange = 57.7f;",
        "constexpr float kHalfRange = 5770.0f;",
    ),
    Fault(
        "cpu-gla-diagonal",
        "mask",
        _GLA_CHUNK,
        "std::memset(out + i * padded + row + i + 1, 0, static_cast<size_t>(padded - row - i - 1) * sizeof(float));",
        "std::memset(out + i * padded + row + i, 0, static_cast<size_t>(padded - row - i) * sizeof(float));",
    ),
    Fault(
        "cpu-gla-gate-head",
        "stride",
        _GLA_CHUNK,
        "const int64_t gate_head = s * p_.g.heads / p_.states;",
        "const int64_t gate_head = s % p_.g.heads;",
    ),
    Fault(
        "cpu-gla-segment",
        "state",
        _GLA_BACK,
        "if (t % kSegment == 0) copy_states(current_, segment_states_ + t / kSegment * per_unit_ * state_size_);",
        "if (t == 0) copy_states(current_, segment_states_ + t / kSegment * per_unit_ * state_size_);",
    ),
    Fault(
        "cpu-gla-dden",
        "gradient",
        _GLA_BACK,
        "const float dden = -along * inverse_[h * kChunk + i];",
        "const float dden = -along;",
    ),
    Fault(
        "cpu-gla-gate-through",
        "gradient",
        _GLA_BACK,
        "vec_store(before + c, vec_fma(kb, vec_load(dk_inter_ + at), through));",
        "",
    ),
    Fault(
        "cpu-gla-dk-groups",
        "accumulator",
        _GLA_BACK,
        "upper_product(row, dscores_, padded, n, qb, size_.k, dk_intra_, more);",
        "upper_product(row, dscores_, padded, n, qb, size_.k, dk_intra_, false);",
    ),
    # --- interval attention
    Fault(
        "cpu-attention-sink-dropped",
        "sink",
        _ATTENTION,
        "const bool sink = p_.sink_logits != nullptr && row < rows.count;",
        "const bool sink = false;",
    ),
    Fault(
        "cpu-attention-sink-head",
        "sink",
        _ATTENTION,
        "sink ? p_.sink_logits[rows.head(row)] :",
        "sink ? p_.sink_logits[rows.kv_head] :",
    ),
    Fault(
        "cpu-attention-sink-doubled",
        "sink",
        _ATTENTION,
        ": 1.0f + (top_[row] - top_[row]);",
        ": 2.0f + (top_[row] - top_[row]);",
    ),
    Fault("cpu-attention-rescale", "accumulator", _ATTENTION, "sum_[row] *= factor[0];", ""),
    Fault(
        "cpu-attention-last-keys",
        "bounds",
        _ATTENTION,
        "for (int64_t key = 0; key < p_.mask.tk; key += kKeys)",
        "for (int64_t key = 0; key + kKeys <= p_.mask.tk || key == 0; key += kKeys)",
    ),
    Fault(
        "cpu-attention-hidden-nan",
        "nan",
        _ATTENTION,
        "add_groups(seen, key, live, g, stop, biased, finite || (hulls_[g].full && !biased));",
        "add_groups(seen, key, live, g, stop, biased, true);",
    ),
    Fault(
        "cpu-attention-bias-stride",
        "stride",
        _ATTENTION,
        "return p.key_bias + rows.b * p.bias_stride_b + rows.head(row) * p.bias_stride_h + key;",
        "return p.key_bias + rows.b * p.bias_stride_b + rows.kv_head * p.bias_stride_h + key;",
    ),
    Fault(
        "cpu-attention-lse",
        "formula",
        _ATTENTION,
        "p_.lse[at] = empty ? -__builtin_inff() : top + log_sum;",
        "p_.lse[at] = empty ? -__builtin_inff() : log_sum;",
    ),
    Fault(
        "cpu-attention-window",
        "mask",
        _INTERVALS,
        "const int64_t first = m.window < stop ? stop - m.window : 0;",
        "const int64_t first = m.window < stop ? stop - m.window - 1 : 0;",
    ),
    Fault(
        "cpu-attention-sinks-seen-twice",
        "sink",
        _INTERVALS,
        "return {first > sinks ? first : sinks, stop};",
        "return {first, stop};",
    ),
    Fault(
        "cpu-attention-lifetime",
        "mask",
        _ATTENTION_ROWS,
        "return t >= mask_.key_start[at] && t < mask_.key_stop[at];",
        "return t >= mask_.key_start[at] && t <= mask_.key_stop[at];",
    ),
    Fault("cpu-attention-hull", "mask", _ATTENTION_ROWS, "hull.end = larger(hull.end, at.end);", "hull.end = at.end;"),
    Fault(
        "cpu-attention-marks",
        "bounds",
        _ATTENTION_ROWS,
        "--marks[ceil_div(at.end, kKeys)];",
        "--marks[at.end / kKeys];",
    ),
    Fault(
        "cpu-attention-delta-lse",
        "gradient",
        _ATTENTION_ITEMS,
        "vec_sum(vec_load(sums)) - grads.grad_lse[row];",
        "vec_sum(vec_load(sums));",
    ),
    Fault(
        "cpu-attention-parts",
        "accumulator",
        _ATTENTION_ITEMS,
        "for (int64_t part = 0; part < count; ++part)",
        "for (int64_t part = 0; part + 1 < count; ++part)",
    ),
    Fault(
        "cpu-attention-dk-scale",
        "gradient",
        _ATTENTION_BACK,
        "dk[c] = from_float<T>(k_sums[c] * p_.scale);",
        "dk[c] = from_float<T>(k_sums[c]);",
    ),
    Fault(
        "cpu-attention-dbias-slots",
        "accumulator",
        _ATTENTION_BACK,
        "for (int64_t j = hull.begin; j < hull.end; ++j) dbias[j] += d[j];",
        "for (int64_t j = hull.begin; j < hull.end; ++j) dbias[j] = d[j];",
    ),
    Fault(
        "cpu-attention-key-groups",
        "bounds",
        _ATTENTION_BACK,
        "if (hulls_[i].begin >= j + kBlockKeys || hulls_[i].end <= j) continue;",
        "if (hulls_[i].begin >= j || hulls_[i].end <= j) continue;",
    ),
    # --- LAWCAT's step
    Fault(
        "cpu-decode-past-moves",
        "state",
        _DECODE,
        "memmove(past, past + 1, static_cast<size_t>(d * past_taps - 1) * sizeof(T));",
        "",
    ),
    Fault("cpu-decode-gate-stale", "stale", _DECODE, "gate = own;", "gate = own + 1;"),
    Fault(
        "cpu-decode-map-of-query",
        "stride",
        _DECODE,
        "at(p.wphi, h * p.maps / p.q_heads * map)",
        "at(p.wphi, s * p.maps / p.states * map)",
    ),
    Fault(
        "cpu-decode-clamp",
        "guard",
        _DECODE,
        "decay[c] = vector_exp(g < clamp_min ? clamp_min : g);",
        "decay[c] = vector_exp(g);",
    ),
    Fault("cpu-decode-odd-channel", "bounds", _DECODE, "if (c < d) add(c, even);", ""),
)
