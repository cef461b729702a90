// A chunk of consecutive tokens of one state head: its operands with the decays folded in. One instruction set.
//
// With b the decay summed from the chunk's second token on (base-2 logarithm) and m that of its middle token,
//   kb = k 2^(m - b),  qb = scale q 2^(b - m),  (qb kb^T)[i, j] = scale sum_c q k 2^(b_i - b_j),
// so that each operand is scaled once. The state enters as 2^(first gate + m) S and leaves as 2^(b_last - m) (S + kb^T
// v). This is exact in float as long as the exponents and the operands are moderate. A chunk where they are not is
// halved; one token has no exponents at all, so any gate works, and a NaN meets no other token.
#pragma once

#include <math.h>

#include "common/gated_linear_attention_params.h"
#include "cpu/interval_rows.h"
#include "cpu/tile.h"

namespace subquad::cpu::SUBQUAD_ISA {

constexpr int64_t kChunk = 32;
constexpr float kLog2E = 1.44269504f;
constexpr float kHalfRange = 57.7f;  // 40 natural units: masked products stay below 2^116 times the operands
constexpr float kModerate = 1e18f;   // operands below it cannot overflow in a product of two

inline int64_t chunk_rows(int64_t n) { return n <= 16 ? 16 : kChunk; }

/// |x| <= limit for all; false with NaN.
inline bool all_below(const float* x, int64_t n, float limit) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = float_to_bits(x[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest <= float_to_bits(limit);
}

/// 2^x for any x, NaN kept; 2^126 at most.
inline Vec decay_of(Vec x) {
  const Vec minus = vec_set(-1.0f);
  return vec_exp2(vec_mul(vec_max(vec_set(-126.0f), vec_mul(x, minus)), minus));
}

/// dst[i] = float(src[i]), the rest up to `padded` zero.
template <class T>
inline void widen_row(const T* __restrict src, int64_t n, int64_t padded, float* __restrict dst) {
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i] = to_float(src[i]);
  }
  for (int64_t i = n; i < padded; ++i) dst[i] = 0.0f;
}

template <class T>
inline void round_row(const float* __restrict src, int64_t n, T* __restrict dst) {
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i] = from_float<T>(src[i]);
  }
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
  const auto clamp = [&](int64_t x, int64_t low) { return x < low ? low : x > p.tokens ? p.tokens : x; };
  const int64_t begin = clamp(p.cu_seqlens[n], 0);
  return {0, begin, clamp(p.cu_seqlens[n + 1], begin)};
}

/// Row of token t of a head, in elements of E.
template <class E>
inline const E* row_of(const GlaTensor& x, int64_t b, int64_t t, int64_t head) {
  return static_cast<const E*>(x.data) + b * x.stride_b + t * x.stride_t + head * x.stride_h;
}

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
  bool load(const Sequence& sequence, int64_t s, int64_t t, int64_t n) {
    rows = n;
    const bool legal = load_gates(sequence.b, s, t, n) || n == 1;
    if (!legal) return false;
    const int64_t padded = chunk_rows(n);
    fetch(sequence, s, t + n);
    for (int64_t i = 0; i < n; ++i) {
      widen_row(row_of<T>(p_.k, sequence.b, t + i, s * p_.k.heads / p_.states), p_.dk, size_.k, kb + i * size_.k);
      widen_row(row_of<T>(p_.v, sequence.b, t + i, s * p_.v.heads / p_.states), p_.dv, size_.v, v + i * size_.v);
    }
    zero_words(kb + n * size_.k, (padded - n) * size_.k);
    zero_words(v + n * size_.v, (padded - n) * size_.v);
    if (decays_) scale_rows(kb, down, 1.0f);
    bool moderate = all_below(kb, n * size_.k, kModerate) && all_below(v, n * size_.v, kModerate);
    for (int64_t h = 0; h < size_.per_state; ++h) {
      float* rows_of_head = q(h);
      for (int64_t i = 0; i < n; ++i)
        widen_row(row_of<T>(p_.q, sequence.b, t + i, s * size_.per_state + h), p_.dk, size_.k,
                  rows_of_head + i * size_.k);
      zero_words(rows_of_head + n * size_.k, (padded - n) * size_.k);
      moderate = moderate && all_below(rows_of_head, n * size_.k, kModerate);
      if (!moderate && n > 1) return false;
      scale_rows(rows_of_head, decays_ ? up : nullptr, p_.scale);
    }
    return moderate || n == 1;
  }

  float* q(int64_t head_of_state) const { return qb + head_of_state * kChunk * size_.k; }

  int64_t rows = 0;
  float *up, *down;    // [rows, K]: 2^(b - m), 2^(m - b); not set without a gate
  float *head, *tail;  // [K]: decay of the state before and after the chunk's update
  float *kb, *v, *qb;  // [rows, K], [rows, V], [query head, rows, K]; rows padded with zeros to `chunk_rows`

 private:
  /// The rows of the chunk after this one: too far apart for the CPU to guess.
  void fetch(const Sequence& sequence, int64_t s, int64_t t) const {
    const int64_t end = smaller(t + kChunk, sequence.end);
    for (; t < end; ++t) {
      fetch_row(row_of<T>(p_.k, sequence.b, t, s * p_.k.heads / p_.states), p_.dk);
      fetch_row(row_of<T>(p_.v, sequence.b, t, s * p_.v.heads / p_.states), p_.dv);
      for (int64_t h = 0; h < size_.per_state; ++h)
        fetch_row(row_of<T>(p_.q, sequence.b, t, s * size_.per_state + h), p_.dk);
      if (p_.gate != GateKind::kChannel) continue;
      const int64_t gate_head = s * p_.g.heads / p_.states;
      if (p_.gate_is_float) {
        fetch_row(row_of<float>(p_.g, sequence.b, t, gate_head), p_.dk);
      } else {
        fetch_row(row_of<T>(p_.g, sequence.b, t, gate_head), p_.dk);
      }
    }
  }

  template <class E>
  static void fetch_row(const E* row, int64_t n) {
    for (int64_t i = 0; i < n; i += static_cast<int64_t>(64 / sizeof(E))) prefetch(row + i);
  }

  void scale_rows(float* x, const float* by, float factor) const {
    const int64_t n = rows * size_.k;
    const Vec f = vec_set(factor);
    if (by == nullptr) {
      for (int64_t i = 0; i < n; i += kLanes) vec_store(x + i, vec_mul(vec_load(x + i), f));
    } else {
      for (int64_t i = 0; i < n; i += kLanes) vec_store(x + i, vec_mul(vec_mul(vec_load(x + i), f), vec_load(by + i)));
    }
  }

  void load_gate_row(int64_t b, int64_t s, int64_t t, float* dst) const {
    const int64_t gate_head = s * p_.g.heads / p_.states;
    if (p_.gate == GateKind::kChannel) {
      if (p_.gate_is_float) {
        widen_row(row_of<float>(p_.g, b, t, gate_head), p_.dk, size_.k, dst);
      } else {
        widen_row(row_of<T>(p_.g, b, t, gate_head), p_.dk, size_.k, dst);
      }
      return;
    }
    const float gate =
        p_.gate_is_float ? *row_of<float>(p_.g, b, t, gate_head) : to_float(*row_of<T>(p_.g, b, t, gate_head));
    for (int64_t c = 0; c < size_.k; ++c) dst[c] = gate;
  }

  /// False when an exponent is too large (or NaN).
  bool load_gates(int64_t b, int64_t s, int64_t t, int64_t n) {
    const int64_t width = size_.k;
    decays_ = p_.gate != GateKind::kNone;
    if (!decays_) {
      for (int64_t c = 0; c < width; ++c) head[c] = tail[c] = 1.0f;
      return true;
    }
    const Vec log2e = vec_set(kLog2E);
    load_gate_row(b, s, t, head);
    for (int64_t c = 0; c < width; c += kLanes) vec_store(up + c, vec_zero());
    for (int64_t i = 1; i < n; ++i) {
      float *row = up + i * width, *before = row - width;
      load_gate_row(b, s, t + i, row);
      for (int64_t c = 0; c < width; c += kLanes)
        vec_store(row + c, vec_fma(vec_load(row + c), log2e, vec_load(before + c)));
    }
    const float* middle = up + (n - 1) / 2 * width;
    for (int64_t c = 0; c < width; c += kLanes) vec_store(tail + c, vec_load(middle + c));
    const Vec minus = vec_set(-1.0f);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < width; c += kLanes)
        vec_store(up + i * width + c, vec_fma(vec_load(tail + c), minus, vec_load(up + i * width + c)));
    if (!all_below(up, n * width, kHalfRange)) return false;
    for (int64_t c = 0; c < width; c += kLanes) {
      const Vec first = decay_of(vec_mul(vec_load(head + c), log2e));
      for (int64_t i = c; i < c + kLanes; ++i) growth_[i - c] = head[i] * kLog2E > 126.0f ? INFINITY : 1.0f;
      vec_store(head + c, vec_mul(vec_mul(first, vec_load(growth_)), decay_of(vec_load(tail + c))));
    }
    if (p_.gate == GateKind::kChannel) {
      for (int64_t i = 0; i < n * width; i += kLanes) {
        const Vec exponent = vec_load(up + i);
        vec_store(up + i, vec_exp2(exponent));
        vec_store(down + i, vec_exp2(vec_mul(exponent, minus)));
      }
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const Vec exponent = vec_set(up[i * width]);
        const Vec rise = vec_exp2(exponent), fall = vec_exp2(vec_mul(exponent, minus));
        for (int64_t c = 0; c < width; c += kLanes) {
          vec_store(up + i * width + c, rise);
          vec_store(down + i * width + c, fall);
        }
      }
    }
    std::memcpy(tail, up + (n - 1) * width, static_cast<size_t>(width) * sizeof(float));
    return true;
  }

  const GatedLinearAttentionParams& p_;
  Sizes size_;
  bool decays_ = false;
  float growth_[kLanes];
};

/// Scratch of the products within a chunk.
struct Pairs2D {
  Pairs2D(const Sizes& size, Arena& arena)
      : transposed(arena.take<float>(larger(size.k, size.v) * kChunk)), scores(arena.take<float>(kChunk * kChunk)) {}
  float *transposed, *scores;
};

/// scores[i, j] = a_i . b_j over `depth` elements: a [padded, stride], b transposed. Padding is never multiplied, since
/// zero times infinity is not zero.
inline void row_products(const float* a, int64_t stride, int64_t depth, const float* b_transposed, int64_t padded,
                         float* scores) {
  product<Floats>(padded, padded, depth, Left{a, stride, 1}, Block{const_cast<float*>(b_transposed), padded},
                  Block{scores, padded}, false);
}

/// scores[i, j] = 0 for j > i: by selection, what stood there may be infinite.
inline void keep_lower(float* scores, int64_t padded) {
  for (int64_t i = 0; i < padded; ++i)
    for (int64_t j = i + 1; j < padded; ++j) scores[i * padded + j] = 0.0f;
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

}  // namespace subquad::cpu::SUBQUAD_ISA
