// POD arguments of attention to spans. All strides are in elements.
#pragma once

#include <cstdint>

#include "common/integers.h"
#include "common/paged.h"

namespace subquad {

constexpr int64_t kSpanAttentionMaxDim = 256;  // of D and of Dv

/// One forward call. Slot s of row (b, t, h) is the softmax over keys [start, end] that are not masked, and over the
/// terms of the base. With a gate out = sum_s gate_s out_s; without, one softmax takes all slots, and the base once.
struct SpanAttentionParams {
  const void* q;          // [B, T, H, D]
  const void* k;          // see `keys_at`
  const void* v;          // see `values_at`
  const int32_t* start;   // [B, T, H, spans], contiguous, like all but q, k and v; values are not trusted
  const int32_t* end;     // the last key, which counts
  const float* gate;      // [B, T, H, spans] or null
  const void* base_out;   // [B, T, H, Dv], or null like `base_lse`; not read where base_lse is -inf
  const float* base_lse;  // [B, T, H]
  const bool* key_mask;   // [B, keys] or null
  void* out;              // [B, T, H, Dv]; 0 where nothing is seen
  float* lse;             // [B, T, H, softmaxes], -inf where nothing is seen
  PagedRows keys_at, values_at;
  int64_t batch, tokens, keys, heads, kv_heads, d, dv, spans;
  int64_t softmaxes;  // spans with a gate, else 1
  int64_t q_stride_b, q_stride_t, q_stride_h;
  float scale;
};

/// The rest of a backward call; element types as in the forward, all contiguous. With u_j = <grad_out, v_j>,
/// P_sj = exp(score_j - lse_s), w_s = exp(base_lse - lse_s) and delta_s = sum_j P_sj u_j + w_s <grad_out, base_out>:
/// dgate_s = delta_s, c_s = gate_s delta_s - grad_lse_s, dscore_j = sum_s P_sj (gate_s u_j - c_s),
/// dv_j = sum_s gate_s P_sj grad_out, dbase_out = sum_s gate_s w_s grad_out,
/// dbase_lse = sum_s w_s (gate_s <grad_out, base_out> - c_s). Without a gate it is 1 and there is one lse and one c,
/// with delta = <grad_out, out>.
struct SpanAttentionGrads {
  const void* grad_out;   // [B, T, H, Dv]
  const float* grad_lse;  // [B, T, H, softmaxes]
  void* dq;               // [B, T, H, D]
  void* dk;               // [B, keys, Hkv, D]
  void* dv;               // [B, keys, Hkv, Dv]
  float* dgate;           // [B, T, H, spans] or null
  void* dbase_out;        // [B, T, H, Dv] or null
  float* dbase_lse;       // [B, T, H] or null
};

SQ_ISA_BEGIN

struct Span {
  int64_t begin, end;  // keys [begin, end); empty when begin >= end
};

/// Span s of row (b, t, h), inside [0, keys).
SQ_HD Span span_of(const SpanAttentionParams& p, int64_t b, int64_t t, int64_t h, int64_t s) {
  const int64_t at = ((b * p.tokens + t) * p.heads + h) * p.spans + s;
  return {clamp(p.start[at], 0, p.keys), clamp(int64_t{p.end[at]} + 1, 0, p.keys)};
}

SQ_ISA_END
}  // namespace subquad
