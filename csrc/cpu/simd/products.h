// Dense products of a few weight rows with all tokens, cut so that the tokens' slices stay in L1. One instruction set.
#pragma once

#include "cpu/simd/dot.h"

namespace subquad::cpu::SUBQUAD_ISA::products {

constexpr int kRows = 4;                       // weight rows in flight: enough streams to reach memory bandwidth
constexpr int kTokens = kLanes == 16 ? 4 : 2;  // tokens per tile of rows; bounded by registers
constexpr int kWide = kLanes == 16 ? 8 : 4;    // tokens per tile of a single row
constexpr int kGroup = 16;                     // neurons per round of the batched paths: their rows stay in L2
constexpr int kMaxTokens = 16;                 // tokens that share the sums of a group

constexpr int64_t kSlice = 2048;  // elements of the inner dimension per pass, bounded by the cache

template <class T>
inline const T* row(const void* base, int64_t index, int64_t ld) {
  return static_cast<const T*>(base) + index * ld;
}

template <class W>
inline float bias(const void* b, int64_t index) {
  return b == nullptr ? 0.0f : to_float(static_cast<const W*>(b)[index]);
}

/// acc[r * kMaxTokens + t] += rows[r] . x[t] over [0, n) for R rows and up to kMaxTokens tokens.
template <class W, int R, class X>
inline void tile_row_block(const W* const* rows, const W* const* next, const X* x, int64_t ldx, int tokens, int64_t n,
                           Vec* acc) {
  const X* at[kTokens];
  const int wide = tokens / kTokens, tiles = wide + tokens % kTokens;
  for (int j = 0; j < tiles; ++j) {
    const int t = j < wide ? j * kTokens : wide * kTokens + j - wide;
    for (int i = 0; i < (j < wide ? kTokens : 1); ++i) at[i] = x + (t + i) * ldx;
    if (j < wide) {
      dot_tile<W, R, kTokens>(rows, next, at, n, acc + t, kMaxTokens, {j, tiles});
    } else {
      dot_tile<W, R, 1>(rows, next, at, n, acc + t, kMaxTokens, {j, tiles});
    }
  }
}

/// Rows of a weight, `count` to use and `ahead` that will be used next: their beginnings are fetched meanwhile.
template <class W>
struct Rows {
  const W* at[2 * kGroup];
  int count, ahead;

  /// `count` <= kGroup consecutive rows of `weight` from row `first` on, and up to kGroup more below `end`.
  static Rows consecutive(const void* weight, int64_t ld, int64_t first, int count, int64_t end) {
    Rows rows;
    rows.count = count;
    rows.ahead = static_cast<int>(end - first - count < kGroup ? end - first - count : kGroup);
    for (int r = 0; r < count + rows.ahead; ++r) rows.at[r] = row<W>(weight, first + r, ld);
    return rows;
  }
};

/// out[r * kMaxTokens + t] = rows[r] . x[t] for up to kMaxTokens tokens.
template <class W, class X>
inline void dense_products(const Rows<W>& rows, const X* x, int64_t ldx, int tokens, int64_t n, float* out) {
  Vec acc[kGroup * kMaxTokens];
  const int count = rows.count, known = count + rows.ahead;
  for (int r = 0; r < count; ++r)
    for (int t = 0; t < tokens; ++t) acc[r * kMaxTokens + t] = vec_zero();
  const int64_t slice = tokens == 1 ? n : kSlice;
  for (int64_t k = 0; k < n; k += slice) {
    const int64_t length = n - k < slice ? n - k : slice;
    const bool last = k + length == n;
    for (int r = 0; r < count;) {
      const int here = count - r >= kRows ? kRows : 1;
      const int step = tokens == 1 ? here : count;  // one token walks down the rows, several walk along them
      const W *now[kRows], *next[kRows];
      for (int j = 0; j < here; ++j) {
        now[j] = rows.at[r + j] + k;
        next[j] = !last ? now[j] + slice : rows.at[r + j + step < known ? r + j + step : r + j];
      }
      Vec* sums = acc + r * kMaxTokens;
      if (here == kRows) {
        tile_row_block<W, kRows>(now, next, x + k, ldx, tokens, length, sums);
      } else {
        tile_row_block<W, 1>(now, next, x + k, ldx, tokens, length, sums);
      }
      r += here;
    }
  }
  for (int r = 0; r < count; ++r) {
    if (tokens == kMaxTokens) {
      vec_sums(acc + r * kMaxTokens, out + r * kMaxTokens);
    } else {
      for (int t = 0; t < tokens; ++t) out[r * kMaxTokens + t] = vec_sum(acc[r * kMaxTokens + t]);
    }
  }
}

}  // namespace subquad::cpu::SUBQUAD_ISA::products
