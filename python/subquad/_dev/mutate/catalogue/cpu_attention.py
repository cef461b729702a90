"""Faults of the CPU kernels of linear attention, interval attention and LAWCAT's step."""

from __future__ import annotations

from ..fault import Fault
from .cpu import of

_GLA_STEP = of("ops/gated_linear_attention/cpu.isa.cpp", "gated_linear_attention")
_GLA_STATE = of("ops/gated_linear_attention/cpu_step.h", "gated_linear_attention", "lawcat_decode_step")
_GLA = of("ops/gated_linear_attention/cpu_forward.h", "gated_linear_attention")
_GLA_HELD = of("ops/gated_linear_attention/cpu_state.h", "gated_linear_attention")
_GLA_ENTER = of("ops/gated_linear_attention/cpu_enter.h", "gated_linear_attention")
_GLA_CHUNK = of("ops/gated_linear_attention/cpu_chunk.h", "gated_linear_attention")
_GLA_BACK = of("ops/gated_linear_attention/cpu_backward.h", "gated_linear_attention")
_ATTENTION = of("ops/interval_attention/cpu_forward.h", "interval_attention")
_ATTENTION_BACK = of("ops/interval_attention/cpu_backward.h", "interval_attention")
_BASE_ATTENTION_BACK = of("ops/interval_attention/cpu_backward.h", "interval_attention", levels=("baseline",))
_ATTENTION_SUMS = of("ops/interval_attention/cpu_sums.h", "interval_attention")
_ATTENTION_ROWS = of("ops/interval_attention/cpu_rows.h", "interval_attention")
_ATTENTION_ITEMS = of("ops/interval_attention/cpu.isa.cpp", "interval_attention")
_INTERVALS = of("ops/interval_attention/params.h", "interval_attention")
_DECODE = of("ops/lawcat_decode_step/cpu.isa.cpp", "lawcat_decode_step")

FAULTS = (
    # --- linear attention
    Fault(
        "cpu-gla-step-order",
        "formula",
        _GLA_STATE,
        "s = decay * s + key * value[n];",
        "s = decay * (s + key * value[n]);",
    ),
    Fault(
        "cpu-gla-step-heads", "state", _GLA_STEP, "step_state(token, heads, h == 0);", "step_state(token, heads, true);"
    ),
    Fault(
        "cpu-gla-step-skip",
        "guard",
        _GLA_STEP,
        "skipped = slot < 0 || slot >= p.pool;",
        "skipped = slot < -1 || slot >= p.pool;",
    ),
    Fault("cpu-gla-step-z", "state", _GLA_STEP, "z[c] = decay[c] * z[c] + k[c];", "z[c] = z[c] + k[c];"),
    Fault("cpu-gla-last-tail", "state", _GLA, "state_.move_to(nullptr, p_, size_);", ""),
    Fault(
        "cpu-gla-pending-first",
        "state",
        _GLA_HELD,
        "pending[c] = decay[c] = 1.0f;",
        "pending[c] = 0.0f, decay[c] = 1.0f;",
    ),
    Fault(
        "cpu-gla-local-decay",
        "state",
        _GLA_HELD,
        "decay[c] = decay[c] * pending[c] * then;",
        "decay[c] = decay[c] * pending[c];",
    ),
    Fault(
        "cpu-gla-local-first",
        "bounds",
        _GLA,
        "return p_.cu_seqlens == nullptr || n == 0;",
        "return p_.cu_seqlens == nullptr;",
    ),
    Fault("cpu-gla-local-reach", "bounds", _GLA, "reach = t, within_reach_ = false;", "reach = t;"),
    Fault(
        "cpu-gla-local-kept", "state", _GLA, "state_.decay[c] * state_.pending[c] != 0.0f", "state_.pending[c] != 0.0f"
    ),
    Fault(
        "cpu-gla-enter-tail",
        "state",
        _GLA_ENTER,
        "std::memcpy(state_.pending, chunk_.tail,",
        "std::memcpy(state_.pending, chunk_.head,",
    ),
    Fault("cpu-gla-enter-den", "formula", _GLA_ENTER, "p_.den[at] += extra;", "p_.den[at] = extra;"),
    Fault("cpu-gla-enter-eps", "formula", _GLA_ENTER, "1.0f / (p_.den[at] + p_.eps)", "1.0f / p_.den[at]"),
    Fault("cpu-gla-enter-endless", "nan", _GLA_ENTER, "return finite ? reach(s) : p_.tokens;", "return reach(s);"),
    Fault("cpu-gla-enter-nan", "nan", _GLA_ENTER, "    add_row(o, more, extra, 1.0f, o);", ""),
    Fault(
        "cpu-gla-enter-half", "bounds", _GLA_ENTER, "walk(t + half, n - half);", "walk(t + half, n - half - (n > 3));"
    ),
    Fault(
        "cpu-gla-half",
        "bounds",
        _GLA,
        "walk(t + half, n - half, depth + 1);",
        "walk(t + half, n - half - (n > 3), depth + 1);",
    ),
    Fault(
        "cpu-gla-walk-left-over",
        "bounds",
        _GLA,
        "for (; t < end; t += kChunk) pass(t, smaller(kChunk, end - t));",
        "for (; t + kChunk <= end; t += kChunk) pass(t, kChunk);",
    ),
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
        "segment_states_ + t / kSegment * per_unit_ * state_size_",
        "segment_states_",
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
    Fault("cpu-attention-sink-dropped", "sink", _ATTENTION_SUMS, "if (p.sink_logits == nullptr) return;", "return;"),
    Fault(
        "cpu-attention-sink-head",
        "sink",
        _ATTENTION_SUMS,
        "const float sink = p.sink_logits[rows.head(row)];",
        "const float sink = p.sink_logits[rows.kv_head];",
    ),
    Fault("cpu-attention-sink-doubled", "sink", _ATTENTION_SUMS, ": 1.0f + (sink - sink);", ": 2.0f + (sink - sink);"),
    Fault("cpu-attention-rescale", "accumulator", _ATTENTION, "sums_.sum[row] *= factor[0];", ""),
    Fault(
        "cpu-attention-last-keys",
        "bounds",
        _ATTENTION,
        "for (int64_t key = begin; key < end; key += kKeys)",
        "for (int64_t key = begin; key + kKeys <= end || key == begin; key += kKeys)",
    ),
    Fault("cpu-attention-sink-per-range", "sink", _ATTENTION, "clear(sums, rows.padded());", "start(p_, rows, sums);"),
    Fault(
        "cpu-attention-merged-sink", "sink", _ATTENTION_ITEMS, "start(p, one, total);", "clear(total, one.padded());"
    ),
    Fault(
        "cpu-attention-merged-sum",
        "accumulator",
        _ATTENTION_SUMS,
        "*total.sum = *total.sum * old[0] + *part.sum * more[0];",
        "*total.sum = *total.sum + *part.sum * more[0];",
    ),
    Fault("cpu-attention-merged-top", "stale", _ATTENTION_SUMS, "*total.top = top;", ""),
    Fault(
        "cpu-attention-range-end",
        "bounds",
        _ATTENTION_ITEMS,
        "smaller(p.mask.tk, key + kRangeKeys)",
        "smaller(p.mask.tk, key + kRangeKeys - kKeys)",
    ),
    Fault(
        "cpu-attention-ranges-of-many-heads",
        "accumulator",
        _ATTENTION_ITEMS,
        "for (int64_t row = 0; row < all_rows; ++row) merge(total.from(row), sums.from(row));",
        "for (int64_t row = 0; row < all_rows; row += 2) merge(total.from(row), sums.from(row));",
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
        _ATTENTION_SUMS,
        "p.lse[at] = empty ? -__builtin_inff() : top + log_sum;",
        "p.lse[at] = empty ? -__builtin_inff() : log_sum;",
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
        equivalent="on a CPU a row sees the union of its intervals",
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
        "--marks[ceil_div(to, kKeys)];",
        "--marks[to / kKeys];",
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
        "for (int64_t i = 0; i < parts.count; ++i)",
        "for (int64_t i = 0; i + 1 < parts.count; ++i)",
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
    Fault(
        "cpu-attention-cap-slope",
        "gradient",
        _ATTENTION_BACK,
        "vec_store(d + j, g == 0.0f ? g : vec_mul(g, vec_load(rates + j)));",
        "vec_store(d + j, g);",
    ),
    Fault(
        "cpu-attention-hidden-cap-slope",
        "nan",
        _BASE_ATTENTION_BACK,  # a sum of fused multiply-adds that overflowed stays infinite
        "g == 0.0f ? g : vec_mul(g, vec_load(rates + j)));",
        "vec_mul(g, vec_load(rates + j)));",
    ),
    Fault(
        "cpu-attention-dbias-capped",
        "gradient",
        _ATTENTION_BACK,
        "dbias[j] += d[j];",
        "dbias[j] += d[j] * (terms.softcap != 0.0f ? rates[j] : 1.0f);",
    ),
    Fault("cpu-attention-pair-cap-slope", "gradient", _ATTENTION_BACK, "d = dbias * (1.0f - t * t);", "d = dbias;"),
    Fault(
        "cpu-attention-distance",
        "formula",
        _ATTENTION,
        "terms.own = rows.position(row) + p.mask.tk - p.mask.tq - key;",
        "terms.own = rows.position(row) + p.mask.tk - key;",
    ),
    Fault(
        "cpu-attention-slope-batch",
        "stride",
        _ATTENTION,
        "p.alibi_slopes[rows.b * p.slope_stride_b + rows.head(row)];",
        "p.alibi_slopes[rows.head(row)];",
    ),
    Fault(
        "cpu-attention-slope-head",
        "stride",
        _ATTENTION,
        "p.alibi_slopes[rows.b * p.slope_stride_b + rows.head(row)];",
        "p.alibi_slopes[rows.b * p.slope_stride_b + rows.kv_head];",
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
