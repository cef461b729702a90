// POD arguments of the search for spans. All strides are in elements.
#pragma once

#include <cstdint>

#include "common/paged.h"

namespace subquad {

constexpr int64_t kSpanSearchMaxDim = 256;
constexpr int64_t kSpanSearchMaxSpans = 8;

/// One forward call. Stripe i of row (b, t) is key position + 1 - offsets[i]; it can be chosen if it is in
/// [max(first, 0), keys) and not masked. Of equal scores the farther stripe (the larger i) is chosen, NaN and -inf
/// never.
struct SpanSearchParams {
  const void* q;            // [B, T, H, D]
  const void* k;            // see `keys_at`
  const int32_t* position;  // [B, T], contiguous, like the next four; values are not trusted
  const int32_t* first;
  const int32_t* last;
  const int32_t* back;
  const int32_t* ahead;
  const int32_t* offsets;  // [stripes], ascending
  const bool* key_mask;    // [B, keys] or null
  float* score;            // [B, T, H, spans], contiguous, like the others; best first, -inf where there is none
  int32_t* anchor;         // -1 where there is none
  int32_t* start;          // max(anchor - back, first, 0)
  int32_t* end;            // min(anchor + ahead, last)
  PagedRows keys_at;
  int64_t batch, tokens, keys, heads, kv_heads, d, stripes, spans;
  int64_t q_stride_b, q_stride_t, q_stride_h;
  float scale;
  bool per_group;  // the heads of a key head choose together, by the sum of their scores
};

/// One backward call: dq = scale * sum_s grad_score_s k[anchor_s], and the same the other way. No gradient where anchor
/// < 0.
struct SpanSearchGrads {
  const float* grad_score;  // [B, T, H, spans], contiguous, like `anchor`
  const int32_t* anchor;    // values are not trusted
  const void* q;            // [B, T, H, D]
  const void* k;            // [B, keys, Hkv, D]
  void* dq;                 // as q, contiguous
  void* dk;                 // as k, contiguous
  int64_t batch, tokens, keys, heads, kv_heads, d, spans;
  int64_t q_stride_b, q_stride_t, q_stride_h;
  int64_t k_stride_b, k_stride_t, k_stride_h;
  float scale;
};

}  // namespace subquad
