// POD arguments of the interval attention kernels, and the intervals of a row. All strides are in elements.
#pragma once

#include <cstdint>

#include "common/integers.h"

namespace subquad {

constexpr int64_t kIntervalMaxDim = 512;  // of D and of Dv

/// Which keys a row sees. With `starts`, interval r of row t is [starts, ends) at
/// b * mask_stride_b + h * mask_stride_h + t * intervals + r; without, the analytic form (see `row_interval`).
struct IntervalMaskParams {
  const int32_t* starts;     // [B|1, H|1, Tq, intervals] or null; values are not trusted
  const int32_t* ends;       // as starts
  const int32_t* key_start;  // [B|1, H|1, Tk] or null: row t sees key j only if key_start[j] <= t < key_stop[j]
  const int32_t* key_stop;   // as key_start
  int64_t mask_stride_b, mask_stride_h;  // of starts and ends; 0 where broadcast
  int64_t key_stride_b, key_stride_h;    // of key_start and key_stop; 0 where broadcast
  int64_t intervals;                     // per row; of the analytic form 2 with sinks and window, else 1
  int64_t sink_tokens;
  int64_t window;  // -1: unbounded
  bool causal;
  int64_t tq, tk;
};

/// One forward call. q, k, v and out share one element type; the last dimensions are contiguous.
struct IntervalAttentionParams {
  IntervalMaskParams mask;
  const void* q;              // [B, Tq, Hq, slots, D]; with slots > 1, interval r of a row uses slot r
  const void* k;              // [B, Tk, Hkv, D]
  const void* v;              // [B, Tk, Hkv, Dv]
  const float* key_bias;      // [B|1, Hq|1, Tk] or null
  const float* sink_logits;   // [Hq] or null
  const float* alibi_slopes;  // [B|1, Hq] or null: of every key, slope * |t + Tk - Tq - j| is taken from the score
  void* out;                  // [B, Tq, Hq, Dv], contiguous
  float* lse;                 // [B, Tq, Hq], contiguous
  float* stats;               // [B, Tq, Hq, 2], contiguous: the largest score of a row, the sink logit among them, and
                              // log of the sum of exp(score - largest); lse is their sum. 0, inf where nothing is seen
  int64_t batch, heads, kv_heads, slots, d, dv;
  int64_t q_stride_b, q_stride_t, q_stride_h, q_stride_s;
  int64_t k_stride_b, k_stride_t, k_stride_h;
  int64_t v_stride_b, v_stride_t, v_stride_h;
  int64_t bias_stride_b, bias_stride_h;  // 0 where broadcast
  int64_t slope_stride_b;                // 0 where broadcast
  float scale;
  float softcap;  // scaled scores become softcap * tanh(score / softcap) before biases; 0 leaves them
};

/// The rest of a backward call; element types as in the forward, all contiguous.
struct IntervalAttentionGrads {
  const void* grad_out;   // [B, Tq, Hq, Dv]
  const float* grad_lse;  // [B, Tq, Hq]
  void* dq;               // [B, Tq, Hq, slots, D]
  void* dk;               // [B, Tk, Hkv, D]
  void* dv;               // [B, Tk, Hkv, Dv]
  float* dkey_bias;       // [B, Hq, Tk] or null
  float* delta;           // [B, Tq, Hq]: sum_d grad_out * out - grad_lse
};

SQ_ISA_BEGIN

struct Interval {
  int64_t begin, end;  // empty when begin >= end
};

/// Interval r of row t, inside [0, Tk]. Analytic: i = t + Tk - Tq sees all keys, or, when causal, those of
/// [0, min(sink_tokens, i + 1)) and [max(sink_tokens, i - window + 1), i + 1).
SQ_HD Interval row_interval(const IntervalMaskParams& m, int64_t b, int64_t h, int64_t t, int64_t r) {
  if (m.starts != nullptr) {
    const int64_t at = b * m.mask_stride_b + h * m.mask_stride_h + t * m.intervals + r;
    return {clamp(m.starts[at], 0, m.tk), clamp(m.ends[at], 0, m.tk)};
  }
  if (!m.causal) return {0, m.tk};
  const int64_t stop = t + m.tk - m.tq + 1;
  if (stop <= 0) return {0, 0};
  if (m.window < 0) return {0, stop};
  const int64_t sinks = m.sink_tokens < stop ? m.sink_tokens : stop;
  const int64_t first = m.window < stop ? stop - m.window : 0;
  if (m.intervals == 1) return {first, stop};
  if (r == 0) return {0, sinks};
  return {first > sinks ? first : sinks, stop};
}

SQ_ISA_END
}  // namespace subquad
