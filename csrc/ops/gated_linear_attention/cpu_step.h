// One token through the state of one head, in place, in one pass over it. One instruction set.
#pragma once

#include "cpu/simd/vec.h"

namespace subquad::cpu::SUBQUAD_ISA::gla {

constexpr int64_t kStepWidth = 256;  // of a head, and of the rows below
constexpr int64_t kStepHeads = 4;    // query heads that one pass over a state serves

/// p[0 .. n) as floats.
template <class T>
void widen_token(const T* p, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) vec_store(out + i, vec_load(p + i));
  for (; i < n; ++i) out[i] = to_float(p[i]);
}

/// Sum of a b.
inline float dot_token(const float* a, const float* b, int64_t n) {
  Vec sum{};
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) sum += vec_load(a + i) * vec_load(b + i);
  if (n % kLanes != 0) {
    const int64_t i = n - n % kLanes;
    sum += vec_load_part<false>(a + i, n - i) * vec_load_part<false>(b + i, n - i);
  }
  return vec_sum(sum);
}

/// Columns of a state, [dk, dv] with rows `stride` apart, and the token that goes through them. Heads of q and o are
/// `kStepWidth` apart.
struct StepToken {
  float* state;
  int64_t dk, dv, stride;
  const float *decay, *k, *v, *q;
  float* o;
};

/// kVecs vectors of columns from `first` on: S = a S + k v^T (with kUpdate), o = q S for kHeads query heads.
/// Inline: left to the compiler, one element type got a call here and took a third longer.
template <bool kUpdate, int kHeads, int kVecs>
inline __attribute__((always_inline)) void step_columns(const StepToken& t, int64_t first) {
  constexpr int64_t kAhead = 16;  // rows whose cache lines are asked for early: hardware stops at the end of a page
  Vec sums[kHeads][kVecs] = {}, value[kVecs];
  for (int n = 0; n < kVecs; ++n) value[n] = vec_load(t.v + first + n * kLanes);
  for (int64_t c = 0; c < t.dk; ++c) {
    float* row = t.state + c * t.stride + first;
    const Vec decay = vec_set(t.decay[c]), key = vec_set(t.k[c]);
    for (int n = 0; n < kVecs; ++n) {
      __builtin_prefetch(row + kAhead * t.stride + n * kLanes, kUpdate ? 1 : 0, 3);
      Vec s = vec_load(row + n * kLanes);
      if constexpr (kUpdate) {
        s = decay * s + key * value[n];
        vec_store(row + n * kLanes, s);
      }
      for (int h = 0; h < kHeads; ++h) sums[h][n] += t.q[h * kStepWidth + c] * s;
    }
  }
  for (int h = 0; h < kHeads; ++h)
    for (int n = 0; n < kVecs; ++n) vec_store(t.o + h * kStepWidth + first + n * kLanes, sums[h][n]);
}

/// Ask for the first kilobytes of what is needed soon, while other work is done.
inline void fetch(const void* from, int64_t bytes) {
  constexpr int64_t kLine = 64, kMost = 8192;
  for (int64_t i = 0; i < (bytes < kMost ? bytes : kMost); i += kLine)
    __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
}

template <bool kUpdate, int kHeads>
void step_heads(const StepToken& t) {
  constexpr int kRegisters = kLanes == 16 ? 16 : 8;  // that hold sums
  constexpr int kVecs = kHeads == 1 ? 8 : kRegisters / kHeads;
  int64_t i = 0;
  for (; i + kVecs * kLanes <= t.dv; i += kVecs * kLanes) step_columns<kUpdate, kHeads, kVecs>(t, i);
  for (; i + kLanes <= t.dv; i += kLanes) step_columns<kUpdate, kHeads, 1>(t, i);
  for (; i < t.dv; ++i) {
    float sums[kHeads] = {};
    for (int64_t c = 0; c < t.dk; ++c) {
      float& s = t.state[c * t.stride + i];
      if constexpr (kUpdate) s = t.decay[c] * s + t.k[c] * t.v[i];
      for (int h = 0; h < kHeads; ++h) sums[h] += t.q[h * kStepWidth + c] * s;
    }
    for (int h = 0; h < kHeads; ++h) t.o[h * kStepWidth + i] = sums[h];
  }
}

/// The token through the state, for 1 to kStepHeads query heads; `update` is false for the further heads of a state.
inline void step_state(const StepToken& t, int64_t heads, bool update) {
  switch (heads * 2 + (update ? 1 : 0)) {
    case 3:
      return step_heads<true, 1>(t);
    case 5:
      return step_heads<true, 2>(t);
    case 7:
      return step_heads<true, 3>(t);
    case 9:
      return step_heads<true, 4>(t);
    case 2:
      return step_heads<false, 1>(t);
    case 4:
      return step_heads<false, 2>(t);
    case 6:
      return step_heads<false, 3>(t);
    default:
      return step_heads<false, 4>(t);
  }
}

}  // namespace subquad::cpu::SUBQUAD_ISA::gla
