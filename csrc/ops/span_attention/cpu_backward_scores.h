// Backward pass of attention to spans: the scores of pairs against a tile of keys, recomputed, and their gradients.
#pragma once

#include "ops/span_attention/cpu_pairs.h"
#include "ops/span_attention/cpu_sums.h"

namespace subquad::cpu::SUBQUAD_ISA::spans {

constexpr int64_t kTilePairs = 128;  // pairs that meet a tile of keys together

/// With P = e^(score - lse), a pair's weight of a key is factor * P, the gradient of its score
/// P * (factor * <grad_out, v> - shift).
struct Terms {
  float lse, factor, shift;
};

/// x = q.k, d = <grad_out, v> over columns [begin, end), multiples of kLanes: x becomes the weights, d the gradients.
inline void weigh(float* x, float* d, int64_t begin, int64_t end, float scale, const Terms& terms) {
  const Vec by = vec_set(scale), minus_lse = vec_set(-terms.lse), log2e = vec_set(kLog2e);
  const Vec factor = vec_set(terms.factor), minus_shift = vec_set(-terms.shift);
  for (int64_t j = begin; j < end; j += kLanes) {
    const Vec p = vec_exp2(vec_mul(vec_fma(vec_load(x + j), by, minus_lse), log2e));
    vec_store(x + j, vec_mul(p, factor));
    vec_store(d + j, vec_mul(p, vec_fma(vec_load(d + j), factor, minus_shift)));
  }
}

inline float sum_of(const float* x, int64_t begin, int64_t end) {
  Vec sum = vec_zero();
  for (int64_t j = begin; j < end; j += kLanes) sum = vec_add(sum, vec_load(x + j));
  return vec_sum(sum);
}

template <class T>
inline float dot_of(const T* a, const T* b, int64_t n) {
  Vec sums = vec_zero();
  float sum = 0.0f;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sums = vec_fma(vec_load(a + i), vec_load(b + i), sums);
  for (; i < n; ++i) sum += to_float(a[i]) * to_float(b[i]);
  return sum + vec_sum(sums);
}

/// The columns of floats in which tiles hold n elements.
inline int64_t columns(int64_t n) { return padded_words<Floats>(n); }

/// A tile of keys and values, and the scores of pairs against it.
template <class T>
class KeyTile {
 public:
  KeyTile(const SpanAttentionParams& p, Arena& arena)
      : k(arena.take<float>(kKeys * columns(p.d))),
        kt(arena.take<float>(kKeys * columns(p.d))),
        vt(arena.take<float>(kKeys * columns(p.dv))),
        p_(p),
        v_(arena.take<float>(kKeys * columns(p.dv))) {}

  void load(int64_t b, int64_t kv_head, int64_t key) {
    b_ = b, key_ = key;
    k_finite = load_tile<Floats, T>(p_, p_.k, p_.keys_at, b, kv_head, key, p_.d, k, columns(p_.d));
    load_tile<Floats, T>(p_, p_.v, p_.values_at, b, kv_head, key, p_.dv, v_, columns(p_.dv));
    transpose_words(k, kKeys, columns(p_.d), kt, kKeys);
    transpose_words(v_, kKeys, columns(p_.dv), vt, kKeys);
    whole_ = is_whole(p_, b, key);
  }

  /// x and d, products over the columns of `hull`, become weights and gradients; 0 for keys that the pair does not see.
  void finish(const Pair& pair, bool full, const Hull& hull, const Terms& terms, float* x, float* d) const {
    weigh(x, d, hull.begin, hull.end, p_.scale, terms);
    if (full && whole_) return;
    for (int64_t j = hull.begin; j < hull.end; ++j) {
      const bool seen = sees(pair, j);
      x[j] = seen ? x[j] : 0.0f;
      d[j] = seen ? d[j] : 0.0f;
    }
  }

  bool sees(const Pair& pair, int64_t j) const {
    return key_ + j >= pair.begin && key_ + j < pair.end &&
           (p_.key_mask == nullptr || p_.key_mask[b_ * p_.keys + key_ + j]);
  }

  float *const k, *const kt, *const vt;  // [kKeys, columns], and transposed
  bool k_finite = true;

 private:
  const SpanAttentionParams& p_;
  float* const v_;
  int64_t b_ = 0, key_ = 0;
  bool whole_ = true;
};

}  // namespace subquad::cpu::SUBQUAD_ISA::spans
