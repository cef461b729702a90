// The running softmax of a slot, and how the slots of a row and its base become one result. One instruction set.
#pragma once

#include <math.h>

#include "cpu/simd/vec.h"
#include "ops/span_attention/params.h"

namespace subquad::cpu::SUBQUAD_ISA::spans {

constexpr float kNothing = -__builtin_inff();

inline int64_t value_columns(const SpanAttentionParams& p) { return round_up(p.dv, 16); }

/// e^x of one float, by the same way as of a vector.
inline float exp_of(float x) { return vec_exp2(vec_set(x * kLog2e))[0]; }

/// What is subtracted from scores of which `top` is the largest.
inline float shift_of(float top) { return top == kNothing ? 0.0f : top; }

inline void scale_row(float* x, int64_t cols, float factor) {
  for (int64_t c = 0; c < cols; c += kLanes) vec_store(x + c, vec_mul(vec_load(x + c), vec_set(factor)));
}

/// x += factor * y
inline void add_row(float* x, const float* y, int64_t cols, float factor) {
  for (int64_t c = 0; c < cols; c += kLanes)
    vec_store(x + c, vec_fma(vec_load(y + c), vec_set(factor), vec_load(x + c)));
}

/// A softmax over some keys, `cols` values wide: `sum` of the weights e^(score - top), `out` of the values times
/// theirs. `out` is not read where `sum` is 0.
struct Softmax {
  float* out;
  float top, sum;

  /// The keys of `other` as well.
  void add(const Softmax& other, int64_t cols) {
    if (other.sum == 0.0f) return;
    if (sum == 0.0f) std::memset(out, 0, static_cast<size_t>(cols) * sizeof(float));
    const float highest = other.top > top ? other.top : top, shift = shift_of(highest);
    const float old = exp_of(top - shift), more = exp_of(other.top - shift);
    scale_row(out, cols, old);
    add_row(out, other.out, cols, more);
    sum = sum * old + other.sum * more;
    top = highest;
  }
};

/// The result of row `at`, of all (b, t, h): its slots come one after the other.
template <class T>
class RowResult {
 public:
  RowResult(const SpanAttentionParams& p, int64_t at) : p_(p), at_(at), cols_(value_columns(p)) {
    zero(values_), zero(base_);
    if (p.base_lse != nullptr) base_lse_ = p.base_lse[at];
    based_ = base_lse_ != kNothing;  // NaN is something
    const T* base = static_cast<const T*>(p.base_out) + at * p.dv;
    for (int64_t c = 0; based_ && c < p.dv; ++c) base_[c] = to_float(base[c]);
    if (p.gate == nullptr && based_) joint_.add({base_, base_lse_, 1.0f}, cols_);
  }

  void add(int64_t slot, const Softmax& keys) {
    if (p_.gate == nullptr) return joint_.add(keys, cols_);
    const float top = base_lse_ > keys.top ? base_lse_ : keys.top, shift = shift_of(top);
    const float base = based_ ? exp_of(base_lse_ - shift) : 0.0f;
    const float own = keys.sum == 0.0f ? 0.0f : exp_of(keys.top - shift), total = keys.sum * own + base;
    const Vec gate = vec_set(p_.gate[at_ * p_.spans + slot]);
    const Vec of_keys = vec_set(own / total), of_base = vec_set(total == 0.0f ? 0.0f : base / total);
    for (int64_t c = 0; c < cols_; c += kLanes) {
      Vec mixed = vec_mul(vec_load(base_ + c), of_base);
      if (keys.sum != 0.0f) mixed = vec_fma(vec_load(keys.out + c), of_keys, mixed);
      vec_store(values_ + c, vec_fma(mixed, gate, vec_load(values_ + c)));
    }
    p_.lse[at_ * p_.softmaxes + slot] = total == 0.0f ? kNothing : shift + logf(total);
  }

  void store() {
    float factor = 1.0f;
    if (p_.gate == nullptr) {
      const bool empty = joint_.sum == 0.0f;
      factor = empty ? 0.0f : 1.0f / joint_.sum;
      p_.lse[at_] = empty ? kNothing : shift_of(joint_.top) + logf(joint_.sum);
    }
    T* out = static_cast<T*>(p_.out) + at_ * p_.dv;
    for (int64_t c = 0; c < p_.dv; ++c) out[c] = from_float<T>(values_[c] * factor);
  }

 private:
  void zero(float* x) const { std::memset(x, 0, static_cast<size_t>(cols_) * sizeof(float)); }

  const SpanAttentionParams& p_;
  const int64_t at_, cols_;
  float base_lse_ = kNothing;
  bool based_ = false;
  alignas(64) float values_[kSpanAttentionMaxDim], base_[kSpanAttentionMaxDim];
  Softmax joint_{values_, kNothing, 0.0f};
};

}  // namespace subquad::cpu::SUBQUAD_ISA::spans
