// A chunk of consecutive tokens of one state head: its operands with the decays folded in. One instruction set.
//
// With b the decay summed from the chunk's second token on (base-2 logarithm) and m that of its middle token,
//   kb = k 2^(m - b),  qb = scale q 2^(b - m),  (qb kb^T)[i, j] = scale sum_c q k 2^(b_i - b_j),
// so that each operand is scaled once. The state enters as 2^(first gate + m) S and leaves as 2^(b_last - m) (S + kb^T
// v). This is exact in float as long as the exponents and the operands are moderate. A chunk where they are not is
// halved; one token has no exponents at all, so any gate works, and a NaN meets no other token.
#pragma once

#include <math.h>

#include "cpu/simd/arena.h"
#include "cpu/simd/tile.h"
#include "cpu/simd/vec.h"
#include "ops/gated_linear_attention/params.h"

namespace subquad::cpu::SUBQUAD_ISA::gla {

constexpr int64_t kChunk = 32;
constexpr int64_t kHalvings = 6;     // one of 32 tokens is halved at most five times
constexpr float kHalfRange = 57.7f;  // 40 natural units: masked products stay below 2^116 times the operands
constexpr float kModerate = 1e18f;   // operands below it cannot overflow in a product of two

inline int64_t chunk_rows(int64_t n) { return n <= 16 ? 16 : kChunk; }

/// The largest magnitude of what went by. NaN is above every number.
struct Magnitude {
  VecBits bits = {};

  void add(Vec x) {
    const VecBits magnitude = same_bits<VecBits>(x) & 0x7fffffffu;
    bits = magnitude > bits ? magnitude : bits;
  }
  bool within(float limit) const {
    uint32_t largest = 0;
    for (int i = 0; i < kLanes; ++i) largest = bits[i] > largest ? bits[i] : largest;
    return largest <= float_to_bits(limit);
  }
};

/// 2^x for any x, NaN kept; 2^126 at most.
inline Vec decay_of(Vec x) { return vec_exp2(x > 126.0f ? vec_set(126.0f) : x); }

/// visit(c, x) for the columns [c, c + kLanes) of a row of n elements, zeros beyond them up to `padded`.
template <class T, class Visit>
inline __attribute__((always_inline)) void for_lanes(const T* row, int64_t n, int64_t padded, Visit visit) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) visit(c, vec_load_part<true>(row + c, kLanes));
  for (; c < padded; c += kLanes) visit(c, vec_load_part<false>(row + c, n - c));
}

/// dst[i] = float(row[i]) for the n elements of a row, zeros up to `padded`, in whole vectors.
template <class T>
inline void widen_row(const T* row, int64_t n, int64_t padded, float* dst) {
  for_lanes(row, n, padded, [&](int64_t c, Vec x) { vec_store(dst + c, x); });
}

/// dst = row * factor for the n elements of a row, rounded.
template <class T>
inline void round_row(const float* row, int64_t n, float factor, T* dst) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) vec_store_part<true>(dst + c, vec_load(row + c) * factor, kLanes);
  if (c < n) vec_store_part<false>(dst + c, vec_load_part<false>(row + c, n - c) * factor, n - c);
}

struct Sizes {
  explicit Sizes(const GatedLinearAttentionParams& p)
      : k(round_up(p.dk, 16)), v(round_up(p.dv, 16)), per_state(p.q.heads / p.states) {}
  int64_t k, v;       // padded
  int64_t per_state;  // query heads of a state head
};

/// Tokens [begin, end) of one sequence in batch row b.
struct Sequence {
  int64_t b, begin, end;
};

inline Sequence sequence_at(const GatedLinearAttentionParams& p, int64_t n) {
  if (p.cu_seqlens == nullptr) return {n, 0, p.tokens};
  const int64_t begin = clamp(p.cu_seqlens[n], 0, p.tokens);
  return {0, begin, clamp(p.cu_seqlens[n + 1], begin, p.tokens)};
}

/// Row of token t of a head, in elements of E.
template <class E>
inline const E* row_of(const GlaTensor& x, int64_t b, int64_t t, int64_t head) {
  return static_cast<const E*>(x.data) + b * x.stride_b + t * x.stride_t + head * x.stride_h;
}

enum class Rows { kAll, kKeys, kQueries };  // that a chunk loads; keys with values

template <class T>
class Chunk {
 public:
  Chunk(const GatedLinearAttentionParams& p, Arena& arena) : p_(p), size_(p) {
    up = arena.take<float>(kChunk * size_.k);
    down = arena.take<float>(kChunk * size_.k);
    head = arena.take<float>(size_.k);
    tail = arena.take<float>(size_.k);
    kb = arena.take<float>(kChunk * size_.k);
    v = arena.take<float>(kChunk * size_.v);
    qb = arena.take<float>(size_.per_state * kChunk * size_.k);
  }

  /// Tokens [t, t + n) of state head s. False when they must be taken in smaller chunks.
  bool load(const Sequence& sequence, int64_t s, int64_t t, int64_t n, Rows rows = Rows::kAll) {
    keys_fit = false;
    const int64_t b = sequence.b;
    if (!load_gates(b, s, t, n, rows)) return false;
    Magnitude far;
    if (rows != Rows::kQueries) load_keys(b, s, t, n, far);
    keys_fit = far.within(kModerate) || n == 1;
    for (int64_t h = 0; h < size_.per_state && rows != Rows::kKeys; ++h)
      load_queries(b, s * size_.per_state + h, t, n, q(h), far);
    return far.within(kModerate) || n == 1;
  }

  float* q(int64_t head_of_state) const { return qb + head_of_state * kChunk * size_.k; }

  bool keys_fit = false;  // if `load` failed, it was for queries alone
  float *up, *down;       // [rows, K]: 2^(b - m), 2^(m - b); not set without a gate
  float *head, *tail;     // [K]: decay of the state before and after the chunk's update
  float *kb, *v, *qb;     // [rows, K], [rows, V], [query head, rows, K]; rows padded with zeros to `chunk_rows`

 private:
  void load_keys(int64_t b, int64_t s, int64_t t, int64_t n, Magnitude& far) const {
    const int64_t padded = chunk_rows(n);
    for (int64_t i = 0; i < n; ++i) {
      float *key = kb + i * size_.k, *value = v + i * size_.v;
      const float* fall = down + i * size_.k;
      for_lanes(row_of<T>(p_.k, b, t + i, s * p_.k.heads / p_.states), p_.dk, size_.k, [&](int64_t c, Vec x) {
        if (decays_) x *= vec_load(fall + c);
        far.add(x);
        vec_store(key + c, x);
      });
      for_lanes(row_of<T>(p_.v, b, t + i, s * p_.v.heads / p_.states), p_.dv, size_.v, [&](int64_t c, Vec x) {
        far.add(x);
        vec_store(value + c, x);
      });
    }
    zero_words(kb + n * size_.k, (padded - n) * size_.k);
    zero_words(v + n * size_.v, (padded - n) * size_.v);
  }

  void load_queries(int64_t b, int64_t query_head, int64_t t, int64_t n, float* dst, Magnitude& far) const {
    for (int64_t i = 0; i < n; ++i) {
      float* query = dst + i * size_.k;
      const float* rise = up + i * size_.k;
      for_lanes(row_of<T>(p_.q, b, t + i, query_head), p_.dk, size_.k, [&](int64_t c, Vec x) {
        far.add(x);
        x *= p_.scale;
        if (decays_) x *= vec_load(rise + c);
        vec_store(query + c, x);
      });
    }
    zero_words(dst + n * size_.k, (chunk_rows(n) - n) * size_.k);
  }

  /// False when an exponent is too large (or NaN). For keys alone the last row alone of `up` is set, for queries `down`
  /// is not.
  bool load_gates(int64_t b, int64_t s, int64_t t, int64_t n, Rows rows) {
    decays_ = p_.gate != GateKind::kNone;
    if (!decays_) {
      for (int64_t c = 0; c < size_.k; ++c) head[c] = tail[c] = 1.0f;
      return true;
    }
    const int64_t gate_head = s * p_.g.heads / p_.states;
    const int64_t width = size_.k, middle = (n - 1) / 2 * width;
    Magnitude far;
    constexpr int kBlock = 4;  // vectors: rows lie far apart, and are better read in longer pieces
    for (int64_t c = 0; c < width;) {
      const bool whole = c + kBlock * kLanes <= p_.dk;
      if (p_.gate_is_float) {
        const float* gates = row_of<float>(p_.g, b, t, gate_head);
        whole ? sum_gates<kBlock>(gates, c, n) : sum_gates<1>(gates, c, n);
      } else {
        const T* gates = row_of<T>(p_.g, b, t, gate_head);
        whole ? sum_gates<kBlock>(gates, c, n) : sum_gates<1>(gates, c, n);
      }
      c += whole ? kBlock * kLanes : kLanes;
    }
    for (int64_t c = 0; c < width; c += kLanes) {
      const Vec m = vec_load(up + middle + c), first = vec_load(head + c);
      for (int64_t i = c; i < n * width; i += width) {
        const Vec exponent = vec_load(up + i) - m;
        far.add(exponent);
        if (rows != Rows::kKeys || i + width >= n * width) vec_store(up + i, vec_exp2(exponent));
        if (rows != Rows::kQueries) vec_store(down + i, vec_exp2(-exponent));
      }
      const Vec grown = first > 126.0f ? vec_set(INFINITY) : decay_of(first);
      vec_store(head + c, grown * decay_of(m));
    }
    std::memcpy(tail, up + (n - 1) * width, static_cast<size_t>(width) * sizeof(float));
    return far.within(kHalfRange);
  }

  /// Of kVecs vectors of channels from c on, to base 2: head = the first gates, up = sums of the others.
  template <int kVecs, class E>
  void sum_gates(const E* gates, int64_t c, int64_t n) {
    Vec sums[kVecs] = {};
    for (int64_t i = 0; i < n; ++i, gates += p_.g.stride_t) {
      const float shared = p_.gate == GateKind::kHead ? to_float(*gates) * kLog2e : 0.0f;
      for (int j = 0; j < kVecs; ++j) {
        const int64_t at = c + j * kLanes;
        if (p_.gate == GateKind::kHead) {
          if (i == 0) vec_store(head + at, vec_set(shared));
          if (i > 0) sums[j] += shared;
        } else {
          const Vec gate = kVecs > 1 || at + kLanes <= p_.dk ? vec_load_part<true>(gates + at, kLanes)
                                                             : vec_load_part<false>(gates + at, p_.dk - at);
          if (i == 0) vec_store(head + at, gate * kLog2e);
          if (i > 0) sums[j] = vec_fma(gate, vec_set(kLog2e), sums[j]);
        }
        vec_store(up + i * size_.k + at, sums[j]);
      }
    }
  }

  const GatedLinearAttentionParams& p_;
  Sizes size_;
  bool decays_ = false;
};

/// Fetches the rows of a chunk into the cache before their turn, a token at a time, between the products of another:
/// all at once they would hold up the products, and one head's rows lie too far apart for the CPU to guess. kNearness:
/// 3 for the nearest cache, 2 for the next, where more of them wait than the nearest holds.
template <class T, int kNearness = 3>
class RowsAhead {
 public:
  explicit RowsAhead(const GatedLinearAttentionParams& p) : p_(p), per_state_(p.q.heads / p.states) {}

  enum class What { kState, kEntered, kResults, kGradients };  // of the call: what else is read and written

  /// Tokens [t, t + n) of state head s; `grads` for kGradients.
  void aim(int64_t b, int64_t s, int64_t t, int64_t n, What what, const GatedLinearAttentionGrads* grads = nullptr) {
    b_ = b, s_ = s, t_ = t, end_ = t + n, what_ = what, grads_ = grads;
  }

  void fetch() {
    if (t_ >= end_) return;
    const int64_t k_head = s_ * p_.k.heads / p_.states, v_head = s_ * p_.v.heads / p_.states;
    if (what_ != What::kEntered) {
      touch<0>(row_of<T>(p_.k, b_, t_, k_head), p_.dk);
      touch<0>(row_of<T>(p_.v, b_, t_, v_head), p_.dv);
    }
    for (int64_t h = s_ * per_state_; h < (s_ + 1) * per_state_ && what_ != What::kState; ++h) {
      touch<0>(row_of<T>(p_.q, b_, t_, h), p_.dk);
      if (what_ == What::kEntered) {
        touch<1>(result<float>(p_.local.sums, p_.q.heads, h, p_.dv), p_.dv);
        continue;
      }
      if (what_ == What::kResults) touch<1>(result<T>(p_.o, p_.q.heads, h, p_.dv), p_.dv);
      if (what_ == What::kResults) continue;
      touch<0>(result<T>(grads_->grad_o, p_.q.heads, h, p_.dv), p_.dv);
      touch<1>(result<T>(grads_->dq, p_.q.heads, h, p_.dk), p_.dk);
    }
    if (what_ == What::kGradients) {
      touch<1>(result<T>(grads_->dk, p_.k.heads, k_head, p_.dk), p_.dk);
      touch<1>(result<T>(grads_->dv, p_.v.heads, v_head, p_.dv), p_.dv);
    }
    if (p_.gate == GateKind::kChannel) p_.gate_is_float ? touch_gate<float>() : touch_gate<T>();
    ++t_;
  }

 private:
  template <int kWrite, class E>
  static void touch(const E* row, int64_t n) {
    for (int64_t i = 0; i < n; i += static_cast<int64_t>(64 / sizeof(E)))
      __builtin_prefetch(row + i, kWrite, kNearness);
  }

  /// Row t of a head of a contiguous tensor.
  template <class E>
  const E* result(const void* base, int64_t heads, int64_t head, int64_t width) const {
    return static_cast<const E*>(base) + ((b_ * p_.tokens + t_) * heads + head) * width;
  }

  template <class E>
  void touch_gate() const {
    const int64_t head = s_ * p_.g.heads / p_.states;
    touch<0>(row_of<E>(p_.g, b_, t_, head), p_.dk);
    if (what_ == What::kGradients) touch<1>(result<E>(grads_->dg, p_.g.heads, head, p_.dk), p_.dk);
  }

  const GatedLinearAttentionParams& p_;
  int64_t per_state_, b_ = 0, s_ = 0, t_ = 0, end_ = 0;
  What what_ = What::kState;
  const GatedLinearAttentionGrads* grads_ = nullptr;
};

/// Scratch of the products within a chunk.
struct Pairs2D {
  Pairs2D(const Sizes& size, Arena& arena)
      : transposed(arena.take<float>(larger(size.k, size.v) * kChunk)), scores(arena.take<float>(kChunk * kChunk)) {}
  float *transposed, *scores;
};

/// Rows [row, row + kTileRows) of scores = a b^T, its upper triangle 0: a [padded, stride], b transposed [depth,
/// padded]. By selection: what stands there may be infinite.
inline void lower_products(int64_t row, const float* a, int64_t stride, int64_t depth, const float* b_transposed,
                           int64_t padded, float* scores) {
  float* out = scores + row * padded;
  product<Floats>(kTileRows, round_up(row + kTileRows, kLanes), depth, Left{a + row * stride, stride, 1},
                  Block{const_cast<float*>(b_transposed), padded}, Block{out, padded}, false);
  for (int64_t i = 0; i < kTileRows; ++i)
    std::memset(out + i * padded + row + i + 1, 0, static_cast<size_t>(padded - row - i - 1) * sizeof(float));
}

/// Rows [row, row + kTileRows) of c += scores b, with b [n, cols].
inline void add_lower(int64_t row, const float* scores, int64_t padded, int64_t n, const float* b, int64_t cols,
                      float* c) {
  product<Floats>(kTileRows, cols, smaller(n, row + kTileRows), Left{scores + row * padded, padded, 1},
                  Block{const_cast<float*>(b), cols}, Block{c + row * cols, cols}, true);
}

/// Rows [row, row + kTileRows) of c = scores^T b, or c += that, with b [n, cols].
inline void upper_product(int64_t row, const float* scores, int64_t padded, int64_t n, const float* b, int64_t cols,
                          float* c, bool add) {
  product<Floats>(kTileRows, cols, n - row, Left{scores + row * padded + row, 1, padded},
                  Block{const_cast<float*>(b) + row * cols, cols}, Block{c + row * cols, cols}, add);
}

inline float dot(const float* a, const float* b, int64_t n) {
  Vec sum = vec_zero();
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) sum = vec_fma(vec_load(a + c), vec_load(b + c), sum);
  float total = vec_sum(sum);
  for (; c < n; ++c) total += a[c] * b[c];
  return total;
}

inline float sum_of(const float* a, int64_t n) {
  Vec sum = vec_zero();
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) sum = vec_add(vec_load(a + c), sum);
  float total = vec_sum(sum);
  for (; c < n; ++c) total += a[c];
  return total;
}

}  // namespace subquad::cpu::SUBQUAD_ISA::gla
