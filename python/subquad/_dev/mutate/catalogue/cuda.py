"""Faults of the CUDA kernels, which the emulator runs."""

from __future__ import annotations

from ..fault import Fault, Where, tests_of


def _of(file: str, *stems: str, first: tuple[str, ...] = ("forward", "gradients")) -> Where:
    return Where(f"csrc/{file}", tests_of(*stems), "simt", first, "simt")


_PORTABLE = _of("cuda/portable.cuh", "cats_activation", "feature_map")
_CHUNK = _of("cuda/chunk.cuh", "cats_activation", "cats_mlp", "causal_conv1d")
_WARP = _of("cuda/chunk.cuh", "feature_map", "cats_mlp", "lawcat_decode_step")
_SHARES = _of("cuda/shares.cuh", "interval_attention", "sink_attention_step", "span_attention")
_LAUNCH = Where(
    "csrc/cuda/portable.cuh",
    ("tests/emulator", "tests/package/test_bindings.py", "tests/package/test_grids.py"),
    "",
    ("launch", "extent"),
    "simt",
)
_GLU = _of("ops/cats_activation/cuda.cuh", "cats_activation")
_MLP = _of("ops/cats_mlp/cuda.cuh", "cats_mlp")
_CONV = _of("ops/causal_conv1d/cuda.cuh", "causal_conv1d", "conv_feature_map")
_CONV_MAP = _of("ops/conv_feature_map/cuda.cuh", "conv_feature_map")
_MAP = _of("ops/feature_map/cuda.cuh", "feature_map", "conv_feature_map")
_WALK = _of("ops/gated_linear_attention/cuda.cuh", "gated_linear_attention")
_STEP = _of("ops/gated_linear_attention/cuda_step.cuh", "gated_linear_attention", "lawcat_decode_step")
_ATTENTION = _of("ops/interval_attention/cuda.cuh", "interval_attention")
_DECODE = _of("ops/lawcat_decode_step/cuda.cuh", "lawcat_decode_step")

FAULTS = (
    # --- shared
    Fault("cuda-bf16-truncates", "rounding", _PORTABLE, "((f + 0x7fffu + ((f >> 16) & 1u)) >> 16)", "(f >> 16)"),
    Fault(
        "cuda-fp16-subnormal", "rounding", _PORTABLE, "(sign | ((significand + half + (kept & 1u)) >> shift))", "(sign)"
    ),
    Fault(
        "cuda-launch-extent",
        "index width",
        _LAUNCH,
        "if (n < Int{1} || static_cast<unsigned long long>(n) > 0x7fffffffull) {",
        "if (n < Int{1}) {",
    ),
    Fault(
        "cuda-chunk-tail", "bounds", _CHUNK, "if (j < count) raw.v[j] = kStream", "if (j <= count) raw.v[j] = kStream"
    ),
    Fault(
        "cuda-chunk-store-tail",
        "bounds",
        _CHUNK,
        "if (j < count) sq::store(p + j, sq::from_float<T>(values[j]));",
        "if (j + 1 < count) sq::store(p + j, sq::from_float<T>(values[j]));",
    ),
    Fault(
        "cuda-warp-sum",
        "accumulator",
        _WARP,
        "offset /= 2) v += __shfl_xor_sync(kFullWarp, v, offset);\n  return v;\n}\n\ninline",
        "offset /= 4) v += __shfl_xor_sync(kFullWarp, v, offset);\n  return v;\n}\n\ninline",
    ),
    Fault(
        "cuda-warp-max",
        "formula",
        _WARP,
        "v = fmaxf(v, __shfl_xor_sync(kFullWarp, v, offset));\n  return v;",
        "v = fmaxf(v, __shfl_xor_sync(kFullWarp, v, 1));\n  return v;",
    ),
    # --- CATS
    Fault(
        "cuda-glu-rows",
        "bounds",
        _GLU,
        "if (count <= 0 || row >= p.rows) return;",
        "if (count <= 0 || row + 1 >= p.rows) return;",
    ),
    Fault(
        "cuda-glu-threshold",
        "stride",
        _GLU,
        "sq::load_nc(p.threshold + (col + j) * p.threshold_stride) : 0.0f;",
        "sq::load_nc(p.threshold + col * p.threshold_stride) : 0.0f;",
    ),
    Fault("cuda-glu-straight-through", "gradient", _GLU, "z[j] = active || p.straight_through ?", "z[j] = active ?"),
    Fault("cuda-glu-alignment", "guard", _GLU, "aligned = aligned && is_aligned16(tensor);", ""),
    Fault(
        "cuda-mlp-gate-rows",
        "stride",
        _MLP,
        "CatsDense<T, kAligned>{static_cast<const T*>(p.w_gate), p.ld_gate}",
        "CatsDense<T, kAligned>{static_cast<const T*>(p.w_gate), p.hidden}",
    ),
    Fault(
        "cuda-mlp-union",
        "mask",
        _MLP,
        "if (p.union_mask && alive != 0) alive = (1u << tokens) - 1;",
        "if (p.union_mask && alive != 0) alive = (1u << (tokens - 1)) - 1;",
    ),
    Fault(
        "cuda-mlp-barrier",
        "barrier",
        _MLP,
        "for (int j = 0; j < K; ++j) sums[warp * kTile + Rows::place(lane, j)] = acc[n][j];\n    __syncthreads();",
        "for (int j = 0; j < K; ++j) sums[warp * kTile + Rows::place(lane, j)] = acc[n][j];",
    ),
    Fault(
        "cuda-mlp-last-barrier",
        "barrier",
        _MLP,
        "sq::store(ws.partial + (split * p.tokens + n) * p.hidden + c, total);\n    }\n    __syncthreads();",
        "sq::store(ws.partial + (split * p.tokens + n) * p.hidden + c, total);\n    }",
    ),
    Fault(
        "cuda-mlp-piece",
        "bounds",
        _MLP,
        "const int64_t end = min(p.intermediate, begin + piece);",
        "const int64_t end = min(p.intermediate, begin + piece - 1);",
    ),
    Fault(
        "cuda-mlp-dead",
        "nan",
        _MLP,
        "if ((keep >> n & 1) == 0) continue;\n          SQ_UNROLL\n          for (int j = 0; j < K; ++j) acc",
        "SQ_UNROLL\n          for (int j = 0; j < K; ++j) acc",
    ),
    Fault(
        "cuda-mlp-splits",
        "accumulator",
        _MLP,
        "for (int s = 0; s < splits; ++s) y += sq::load(ws.partial + s * count + i);",
        "for (int s = 0; s < splits; ++s) y = sq::load(ws.partial + s * count + i);",
    ),
    Fault(
        "cuda-mlp-tile", "dispatch", _MLP, "while (tile < tokens) tile *= 2;", "while (2 * tile < tokens) tile *= 2;"
    ),
    Fault(
        "cuda-mlp-prefetched-word",
        "stale",
        _MLP,
        "next = base + kWarp + lane < end ? sq::load(ws.alive + base + kWarp + lane) : 0;",
        "next = base + kWarp + lane < end ? sq::load(ws.alive + base + lane) : 0;",
    ),
    Fault(
        "cuda-mlp-row-major-bias",
        "stride",
        _MLP,
        "sq::load_nc(static_cast<const T*>(p.b_down) + first + r));",
        "sq::load_nc(static_cast<const T*>(p.b_down) + r));",
    ),
    # --- causal convolution
    Fault(
        "cuda-conv-stop",
        "bounds",
        _CONV,
        "const int64_t stop = p.time - first < kConvRows ? p.time : first + kConvRows, input",
        "const int64_t stop = p.time - first < kConvRows ? p.time - 1 : first + kConvRows, input",
    ),
    Fault(
        "cuda-conv-window-crosses",
        "mask",
        _CONV,
        "if (j < p.taps && (p.state != nullptr || t - j >= s.start)) {",
        "if (j < p.taps && (p.state != nullptr || t - j >= 0)) {",
        equivalent="conv_tap gives 0 before a sequence without a state by itself",
    ),
    Fault(
        "cuda-conv-new-sequence",
        "state",
        _CONV,
        "if (t == first || t == s.start) conv_window<T>(p, b, s, t, input, window);",
        "if (t == first) conv_window<T>(p, b, s, t, input, window);",
    ),
    Fault(
        "cuda-conv-state-column",
        "state",
        _CONV,
        "out[k] = sq::to_float(sq::load_nc(state + past - (s.start - t)));",
        "out[k] = sq::to_float(sq::load_nc(state + past - 1));",
    ),
    Fault(
        "cuda-conv-dbias-twice",
        "gradient",
        _CONV,
        "for (int k = 0; k < K; ++k) dw[kTaps][k] += dz[k];",
        "for (int k = 0; k < K; ++k) dw[kTaps][k] += 2.0f * dz[k];",
    ),
    Fault(
        "cuda-conv-warps-barrier",
        "barrier",
        _CONV,
        "dw[j][k];\n      }\n    }\n    __syncthreads();",
        "dw[j][k];\n      }\n    }",
    ),
    Fault(
        "cuda-conv-warps-reused",
        "barrier",
        _CONV,
        "sq::store(partial + row * p.channels + k, sum);\n        }\n      }\n    }\n    __syncthreads();",
        "sq::store(partial + row * p.channels + k, sum);\n        }\n      }\n    }",
    ),
    Fault(
        "cuda-conv-place",
        "stride",
        _CONV,
        "return {rest / columns, int64_t{rest % columns}",
        "return {rest % columns, int64_t{rest / columns}",
    ),
    Fault(
        "cuda-conv-groups-sum",
        "gradient",
        _CONV,
        "for (int k = 0; k < K; ++k) dx[k] = g == 0 ? 0.0f : sum[k];",
        "for (int k = 0; k < K; ++k) dx[k] = 0.0f;",
    ),
    Fault("cuda-conv-ring-wrap", "state", _CONV, "if (slot < 0) slot += length;", ""),
    Fault("cuda-conv-aligned-head", "guard", _CONV, "aligned = aligned && (p.groups == 1 || p.head_dim % K == 0);", ""),
    Fault(
        "cuda-conv-map-tile",
        "bounds",
        _CONV_MAP,
        "store_tile<T>(p.map, head, b * p.conv.time + first, p.conv.time - first, y);",
        "store_tile<T>(p.map, head, b * p.conv.time + first, kMapRows, y);",
    ),
    Fault(
        "cuda-conv-map-strip",
        "state",
        _CONV_MAP,
        "if (r == 0 || t == s.start) conv_window<T>",
        "if (r == 0) conv_window<T>",
    ),
    Fault("cuda-conv-map-batch", "bounds", _CONV_MAP, "if (map.time - t < count) count = map.time - t;", ""),
    # --- feature maps
    Fault("cuda-map-columns", "bounds", _MAP, "up[i] = inside ? value : -kMapInf;", "up[i] = value;"),
    Fault("cuda-map-joint", "formula", _MAP, "if (joint) sum_up = sum_down = sum_up + sum_down;", ""),
    Fault(
        "cuda-map-half",
        "stride",
        _MAP,
        "sq::store(out + f + j, sq::from_float<T>(clamped(down[i], p.eps)));",
        "sq::store(out + f + j, sq::from_float<T>(clamped(up[i], p.eps)));",
    ),
    Fault(
        "cuda-map-barrier",
        "barrier",
        _MAP,
        "load_tile<T>(p, head, first, p.rows, x);\n  __syncthreads();",
        "load_tile<T>(p, head, first, p.rows, x);",
    ),
    Fault(
        "cuda-map-partial",
        "accumulator",
        _MAP,
        "float sum = begins ? 0.0f : sq::load(partial + i);",
        "float sum = 0.0f;",
    ),
    Fault(
        "cuda-map-batch-rows",
        "stride",
        _MAP,
        "for (; t >= p.time; ++b) t -= p.time;",
        "if (t >= p.time) t -= p.time, ++b;",
    ),
    # --- linear attention
    Fault(
        "cuda-walk-heads",
        "bounds",
        _WALK,
        "const int heads = static_cast<int>(left < kWalkHeads ? left : kWalkHeads);\n  const bool",
        "const int heads = static_cast<int>(left < kWalkHeads ? 1 : kWalkHeads);\n  const bool",
    ),
    Fault(
        "cuda-gla-no-queries",
        "state",
        _WALK,
        "static_cast<unsigned>(larger(ceil_div(p.q.heads / p.states, kWalkHeads), 1));",
        "static_cast<unsigned>(ceil_div(p.q.heads / p.states, kWalkHeads));",
    ),
    Fault(
        "cuda-walk-totals-barrier", "barrier", _WALK, "__syncthreads();  // the next tokens overwrite the totals", ""
    ),
    Fault(
        "cuda-walk-parts-barrier",
        "barrier",
        _WALK,
        "kStepTile + quad + j] = sum;\n        }\n      }\n    }\n    __syncthreads();",
        "kStepTile + quad + j] = sum;\n        }\n      }\n    }",
    ),
    Fault("cuda-walk-z-late", "formula", _WALK, "z[i] = fmaf(a, z[i], x);", "z[i] = z[i] + x;"),
    Fault(
        "cuda-walk-final-columns",
        "state",
        _WALK,
        "if (p.z == nullptr || base != 0) return;",
        "if (p.z == nullptr || base == 0) return;",
    ),
    Fault(
        "cuda-walk-packed",
        "bounds",
        _WALK,
        "end = clamp(sq::load_nc(p.cu_seqlens + n + 1), begin, p.tokens);",
        "end = p.tokens;",
    ),
    Fault("cuda-step-skip", "guard", _WALK, "if (slot < 0 || slot >= p.pool) {", "if (slot >= p.pool) {"),
    Fault(
        "cuda-step-totals-read",
        "barrier",
        _WALK,
        "__syncthreads();  // the last heads' totals may still be being read",
        "",
    ),
    Fault(
        "cuda-step-update-again",
        "state",
        _STEP,
        "for (int j = 0; j < kStepQuad; ++j) s[j] = fmaf(key[c], v[j], decay[c] * s[j]);",
        "for (int j = 0; j < kStepQuad; ++j) s[j] = fmaf(key[c], v[j], s[j]);",
    ),
    Fault(
        "cuda-step-not-stored", "state", _STEP, "store_chunk<kAligned>(state + int64_t{c} * dv + col, dv - col, s);", ""
    ),
    Fault("cuda-step-eps", "formula", _STEP, "sum / (total + eps)", "sum / total"),
    Fault(
        "cuda-step-columns",
        "bounds",
        _STEP,
        "v[j] = col + j < dv ? value[col + j] : 0.0f;",
        "v[j] = col + j + 1 < dv ? value[col + j] : 0.0f;",
    ),
    # --- interval attention
    Fault(
        "cuda-attention-sink-per-split",
        "sink",
        _SHARES,
        "shares.total(shift, weight_of(sink, shift))",
        "shares.total(shift, static_cast<float>(shares.count) * weight_of(sink, shift))",
    ),
    Fault("cuda-attention-sink-dropped", "sink", _SHARES, "shares.top(sink)", "shares.top(-INFINITY)"),
    Fault(
        "cuda-attention-sink-head",
        "sink",
        _ATTENTION,
        "sq::load_nc(p.sink_logits + row % p.heads);",
        "sq::load_nc(p.sink_logits + row / p.mask.tq % p.heads);",
    ),
    Fault(
        "cuda-attention-split-end",
        "bounds",
        _ATTENTION,
        "high = total * (split + 1) / splits;",
        "high = total * (split + 1) / splits - (split + 1 == splits && total > 1);",
    ),
    Fault(
        "cuda-attention-weights-barrier",
        "barrier",
        _ATTENTION,
        "weights[lane * kAttentionKeys + j] = mine ? score : -INFINITY;\n      }\n      __syncthreads();",
        "weights[lane * kAttentionKeys + j] = mine ? score : -INFINITY;\n      }",
    ),
    Fault(
        "cuda-attention-tile-barrier",
        "barrier",
        _ATTENTION,
        "__syncthreads();  // the next tile overwrites the weights",
        "",
    ),
    Fault(
        "cuda-attention-slots-merged",
        "mask",
        _ATTENTION,
        "const int64_t begin = slot < 0 ? 0 : slot, end = slot < 0 ? mask.intervals : slot + 1;",
        "const int64_t begin = 0, end = mask.intervals;",
    ),
    Fault("cuda-attention-seen-twice", "mask", _ATTENTION, "if (tiles.begin < seen) tiles.begin = seen;", ""),
    Fault("cuda-attention-hidden-value", "nan", _ATTENTION, "if ((visible[i] >> j & 1u) != 0) acc", "acc"),
    Fault(
        "cuda-attention-rescale",
        "accumulator",
        _ATTENTION,
        "for (int n = 0; n < kCols; ++n) acc[i][n] *= factors[i];",
        "",
    ),
    Fault(
        "cuda-attention-kv-head",
        "stride",
        _ATTENTION,
        "+ rows.b * p.v_stride_b + rows.kv_head * p.v_stride_h;",
        "+ rows.b * p.v_stride_b + rows.kv_head * p.k_stride_h;",
    ),
    Fault(
        "cuda-attention-lifetime",
        "mask",
        _ATTENTION,
        "|| t >= sq::load_nc(mask.key_stop + at)) return false;",
        "|| t > sq::load_nc(mask.key_stop + at)) return false;",
    ),
    Fault(
        "cuda-attention-lse",
        "formula",
        _ATTENTION,
        "merged.empty() ? -INFINITY : merged.shift + log_sum);",
        "merged.empty() ? -INFINITY : log_sum);",
    ),
    Fault(
        "cuda-attention-distance",
        "formula",
        _ATTENTION,
        "rows.position(i) + p.mask.tk - p.mask.tq - key);",
        "rows.position(i) + p.mask.tk - key);",
    ),
    Fault(
        "cuda-attention-slope-batch",
        "stride",
        _ATTENTION,
        "p.alibi_slopes + rows.b * p.slope_stride_b + h)",
        "p.alibi_slopes + h)",
    ),
    Fault(
        "cuda-attention-slope-head",
        "stride",
        _ATTENTION,
        "p.alibi_slopes + rows.b * p.slope_stride_b + h)",
        "p.alibi_slopes + rows.b * p.slope_stride_b + rows.kv_head)",
    ),
    Fault(
        "cuda-attention-cap", "formula", _ATTENTION, "tanhf(score / p.softcap) * p.softcap", "tanhf(score) * p.softcap"
    ),
    # --- LAWCAT's step
    Fault(
        "cuda-decode-key-moves-early",
        "state",
        _DECODE,
        "at(p.ck_bias, s * d), conv_k, false, x);",
        "at(p.ck_bias, s * d), conv_k, true, x);",
    ),
    Fault(
        "cuda-decode-features-free", "barrier", _DECODE, "__syncthreads();  // totals and features are free again", ""
    ),
    Fault(
        "cuda-decode-warp-barrier",
        "barrier",
        _DECODE,
        "}\n      __syncwarp();\n      const T* weight",
        "}\n      const T* weight",
    ),
    Fault("cuda-decode-scale", "formula", _DECODE, "is_key ? 1.0f : p.scale", "p.scale"),
    Fault(
        "cuda-decode-zero-rows",
        "state",
        _DECODE,
        "for (int64_t i = thread; i < n; i += kStepThreads) sq::store(out + i, sq::from_float<T>(0.0f));",
        "",
    ),
)
