// Forward pass of attention to spans, few rows: a piece of one span, whose keys and values are read once, where they
// lie. One instruction set.
#pragma once

#include "ops/span_attention/cpu_pairs.h"
#include "ops/span_attention/cpu_sums.h"

namespace subquad::cpu::SUBQUAD_ISA::spans {

constexpr int64_t kPieceKeys = 512, kMostPieces = 64;  // of a span

/// The keys of a piece: a span of any length has no more than kMostPieces.
inline int64_t piece_keys(const Span& span) {
  return larger(kPieceKeys, round_up(ceil_div(span.end - span.begin, kMostPieces), kKeys));
}

constexpr int kRowsAtOnce = 8;

/// x[j] = q . rows[j] for kRowsAtOnce rows of n elements; q is padded with zeros to whole vectors.
template <class T>
inline void dot_rows(const float* q, const T* const* rows, int64_t n, float* x) {
  Vec sums[kRowsAtOnce];
  for (Vec& sum : sums) sum = vec_zero();
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    const Vec left = vec_load(q + c);
    for (int r = 0; r < kRowsAtOnce; ++r) sums[r] = vec_fma(left, vec_load(rows[r] + c), sums[r]);
  }
  if (c < n) {
    const Vec left = vec_load(q + c);
    for (int r = 0; r < kRowsAtOnce; ++r) sums[r] = vec_fma(left, vec_load_part<false>(rows[r] + c, n - c), sums[r]);
  }
  for (int r = 0; r < kRowsAtOnce; ++r) x[r] = vec_sum(sums[r]);
}

/// out += sum over j < count, in order, of weights[j] * rows[j], rows of n elements; `out` is whole vectors.
template <int N, bool kWhole, class T>
inline void add_weighted_columns(const float* weights, const T* const* rows, int64_t count, int64_t col, int64_t n,
                                 float* out) {
  Vec sums[N];
  for (int i = 0; i < N; ++i) sums[i] = vec_load(out + col + i * kLanes);
  for (int64_t j = 0; j < count; ++j) {
    const Vec weight = vec_set(weights[j]);
    for (int i = 0; i < N; ++i)
      sums[i] = vec_fma(weight, vec_load_part<kWhole>(rows[j] + col + i * kLanes, n), sums[i]);
  }
  for (int i = 0; i < N; ++i) vec_store(out + col + i * kLanes, sums[i]);
}

template <class T>
inline void add_weighted_rows(const float* weights, const T* const* rows, int64_t count, int64_t n, float* out) {
  constexpr int kVecs = 8;
  int64_t c = 0;
  for (; c + kVecs * kLanes <= n; c += kVecs * kLanes)
    add_weighted_columns<kVecs, true>(weights, rows, count, c, kLanes, out);
  for (; c + kLanes <= n; c += kLanes) add_weighted_columns<1, true>(weights, rows, count, c, kLanes, out);
  if (c < n) add_weighted_columns<1, false>(weights, rows, count, c, n - c, out);
}

/// The softmax over keys [begin, end) of row `row`, of those that are not masked.
template <class T>
inline void attend_piece(const SpanAttentionParams& p, int64_t row, int64_t begin, int64_t end, Softmax& keys) {
  const int64_t h = row % p.heads, t = row / p.heads % p.tokens, b = row / p.heads / p.tokens;
  const int64_t kv_head = h / (p.heads / p.kv_heads);
  const T* query = static_cast<const T*>(p.q) + b * p.q_stride_b + t * p.q_stride_t + h * p.q_stride_h;
  alignas(64) float q[kSpanAttentionMaxDim] = {};
  for (int64_t c = 0; c < p.d; ++c) q[c] = to_float(query[c]);
  zero_words(keys.out, value_columns(p));
  keys.top = kNothing, keys.sum = 0.0f;
  for (int64_t key = begin; key < end; key += kKeys) {
    const T *k[kKeys], *v[kKeys];
    int64_t count = 0;
    for (int64_t j = key; j < smaller(end, key + kKeys); ++j) {
      if (p.key_mask != nullptr && !p.key_mask[b * p.keys + j]) continue;
      k[count] = static_cast<const T*>(p.k) + row_offset(p.keys_at, b, j, kv_head);
      v[count++] = static_cast<const T*>(p.v) + row_offset(p.values_at, b, j, kv_head);
    }
    if (count == 0) continue;
    alignas(64) float x[kKeys];
    const int64_t padded = round_up(count, 16);
    for (int64_t j = count; j < padded; ++j) k[j] = k[count - 1];
    for (int64_t j = 0; j < padded; j += kRowsAtOnce) dot_rows(q, k + j, p.d, x + j);
    for (int64_t j = count; j < padded; ++j) x[j] = kNothing;
    Vec highest = vec_set(kNothing);
    for (int64_t j = 0; j < padded; j += kLanes) {
      Vec s = vec_load(x + j);
      if (j + kLanes <= count) {
        s = vec_mul(s, vec_set(p.scale));
      } else {
        for (int64_t i = j; i < count; ++i) s[i - j] *= p.scale;
      }
      vec_store(x + j, s);
      highest = vec_max(s, highest);
    }
    const float found = vec_max_all(highest);
    if (found > keys.top) {
      const float factor = exp_of(keys.top - found);
      keys.sum *= factor, keys.top = found;
      scale_row(keys.out, value_columns(p), factor);
    }
    const Vec minus = vec_set(-shift_of(keys.top));
    Vec sum = vec_zero();
    for (int64_t j = 0; j < padded; j += kLanes) {
      const Vec weight = vec_exp2(vec_mul(vec_add(vec_load(x + j), minus), vec_set(kLog2e)));
      sum = vec_add(sum, weight);
      vec_store(x + j, weight);
    }
    keys.sum += vec_sum(sum);
    add_weighted_rows(x, v, count, p.dv, keys.out);
  }
}

}  // namespace subquad::cpu::SUBQUAD_ISA::spans
