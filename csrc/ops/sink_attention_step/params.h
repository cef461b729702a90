// POD arguments of a streaming cache's step, and where its tokens lie.
#pragma once

#include <cstdint>

#include "common/integers.h"

namespace subquad {

constexpr int64_t kSinkMaxDim = 256;  // of D and of Dv

enum class RingKind : int { kPlain, kInt8, kFloat8 };  // of the tokens' element type, or quantised with a scale per row

/// q, k, v, out and the sinks share one element type. States are contiguous; the last dimensions of q, k and v are,
/// too.
struct SinkAttentionStepParams {
  const void* q;                               // [batch, width, heads, d] or null: only write
  const void* k;                               // [batch, width, kv_heads, d]
  const void* v;                               // [batch, width, kv_heads, dv]
  int64_t q_stride_b, q_stride_t, q_stride_h;  // in elements
  int64_t k_stride_b, k_stride_t, k_stride_h;
  int64_t v_stride_b, v_stride_t, v_stride_h;
  void* sink_k;              // [batch, kv_heads, sinks, d]: tokens 0 .. sinks - 1
  void* sink_v;              // [batch, kv_heads, sinks, dv]
  void* ring_k;              // [batch, kv_heads, ring, d]: token j >= sinks in place (j - sinks) % ring
  void* ring_v;              // [batch, kv_heads, ring, dv]
  float* k_scale;            // [batch, kv_heads, ring] or null where the ring is plain
  float* v_scale;            // as k_scale
  int64_t* seen;             // [batch], tokens before the step; values are not trusted
  int64_t* written;          // [batch]
  const int64_t* first;      // [batch]: tokens of the ring below it are forgotten
  const int64_t* tokens;     // [batch], columns that are tokens, or null for all; values are not trusted
  const float* sink_logits;  // [heads] or null
  const uint64_t* turns;     // [rotary / 2], turns per position in units of 2^-64, or null: no rotation
  void* out;                 // [batch, width, heads, dv]
  float* lse;                // [batch, width, heads]
  int64_t batch, width, heads, kv_heads, d, dv, sinks, ring, window, rotary;
  RingKind kind;
  float scale, rotary_scale;  // the second is a factor of the rotated elements of q
  bool interleaved;           // pairs are (2 f, 2 f + 1) instead of (f, f + rotary / 2)
  bool rotated;               // keys are rotated by their token when they are written, not when they are read
  bool absolute;              // queries keep their distance to the sinks
  bool together;              // new tokens see each other and end their window at the last of them
  bool advance;
};

SQ_ISA_BEGIN

/// Tokens before the step, and new ones.
SQ_HD int64_t tokens_before(const SinkAttentionStepParams& p, int64_t b) { return larger(p.seen[b], 0); }
SQ_HD int64_t new_tokens(const SinkAttentionStepParams& p, int64_t b) {
  return p.tokens == nullptr ? p.width : clamp(p.tokens[b], 0, p.width);
}

/// What token i = before + t sees: the sinks [0, sink_stop) and [begin, stop), begin >= sinks; `forgotten` tokens lie
/// between them in the sequence and do not count as positions. Tokens from `before` on are new: they lie in k and v.
struct SinkView {
  int64_t sink_stop, begin, stop, forgotten;
};

SQ_HD SinkView sink_view(const SinkAttentionStepParams& p, int64_t before, int64_t count, int64_t first, int64_t t) {
  const int64_t stop = before + (p.together ? count : t + 1);
  const int64_t oldest = larger(larger(p.sinks, first), stop - p.window);
  const int64_t kept = larger(larger(stop - p.sinks - p.window, first - p.sinks), 0);
  // What was overwritten is out of every window; a ring that holds fewer tokens than `before` says must not be overrun.
  return {smaller(p.sinks, stop), smaller(larger(oldest, before - p.ring), stop), stop, kept};
}

SQ_ISA_END
}  // namespace subquad
