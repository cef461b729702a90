// Gradients of the scores of the chosen stripes. One instruction set.
#pragma once

#include "cpu/simd/vec.h"
#include "ops/span_search/params.h"

namespace subquad::cpu::SUBQUAD_ISA::stripes {

/// A sum of rows of n elements with factors.
class RowSum {
 public:
  explicit RowSum(int64_t n) : n_(n) {}

  template <class T>
  void add(float factor, const T* row) {
    for (int64_t c = 0; c < n_; ++c) sums_[c] += factor * to_float(row[c]);
  }
  template <class T>
  void store(float scale, T* dst) const {
    for (int64_t c = 0; c < n_; ++c) dst[c] = from_float<T>(scale * sums_[c]);
  }

 private:
  const int64_t n_;
  alignas(64) float sums_[kSpanSearchMaxDim] = {};
};

/// Which of all (b, t, h, slot) a pair of a sequence is: (t, head of the group, slot) in this order.
inline int64_t slot_of(const SpanSearchGrads& p, int64_t sequence, int64_t pair) {
  const int64_t group = p.heads / p.kv_heads, b = sequence / p.kv_heads, row = pair / p.spans;
  const int64_t t = row / group, h = sequence % p.kv_heads * group + row % group;
  return ((b * p.tokens + t) * p.heads + h) * p.spans + pair % p.spans;
}

inline bool is_key(const SpanSearchGrads& p, int64_t anchor) { return anchor >= 0 && anchor < p.keys; }

template <class T>
void dq(const SpanSearchGrads& p, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; ++at) {
    const int64_t h = at % p.heads, b = at / p.heads / p.tokens;
    const T* keys = static_cast<const T*>(p.k) + b * p.k_stride_b + h / (p.heads / p.kv_heads) * p.k_stride_h;
    RowSum sum(p.d);
    for (int64_t slot = at * p.spans; slot < (at + 1) * p.spans; ++slot)
      if (is_key(p, p.anchor[slot])) sum.add(p.grad_score[slot], keys + p.anchor[slot] * p.k_stride_t);
    sum.store(p.scale, static_cast<T*>(p.dq) + at * p.d);
  }
}

inline void sort(const SpanSearchGrads& p, int64_t sequence, int64_t* pairs, int64_t* ends) {
  const int64_t count = p.tokens * (p.heads / p.kv_heads) * p.spans;
  for (int64_t j = 0; j < p.keys; ++j) ends[j] = 0;
  for (int64_t pair = 0; pair < count; ++pair) {
    const int64_t anchor = p.anchor[slot_of(p, sequence, pair)];
    if (is_key(p, anchor)) ++ends[anchor];
  }
  int64_t before = 0;
  for (int64_t j = 0; j < p.keys; ++j) {
    const int64_t here = ends[j];
    ends[j] = before;  // where those of j begin
    before += here;
  }
  for (int64_t pair = 0; pair < count; ++pair) {
    const int64_t anchor = p.anchor[slot_of(p, sequence, pair)];
    if (is_key(p, anchor)) pairs[ends[anchor]++] = pair;
  }
}

template <class T>
void dk(const SpanSearchGrads& p, int64_t sequence, const int64_t* pairs, const int64_t* ends, int64_t begin,
        int64_t end) {
  const int64_t b = sequence / p.kv_heads, kv_head = sequence % p.kv_heads, group = p.heads / p.kv_heads;
  for (int64_t j = begin; j < end; ++j) {
    RowSum sum(p.d);
    for (int64_t i = j == 0 ? 0 : ends[j - 1]; i < ends[j]; ++i) {
      const int64_t row = pairs[i] / p.spans, t = row / group, h = kv_head * group + row % group;
      sum.add(p.grad_score[slot_of(p, sequence, pairs[i])],
              static_cast<const T*>(p.q) + b * p.q_stride_b + t * p.q_stride_t + h * p.q_stride_h);
    }
    sum.store(p.scale, static_cast<T*>(p.dk) + ((b * p.keys + j) * p.kv_heads + kv_head) * p.d);
  }
}

}  // namespace subquad::cpu::SUBQUAD_ISA::stripes
