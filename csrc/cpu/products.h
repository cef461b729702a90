// Dense products of a few weight rows with all tokens, cut so that the tokens' slices stay in L1. One instruction set.
#pragma once

#include "common/cats_params.h"
#include "cpu/dot.h"

namespace subquad::cpu::SUBQUAD_ISA {

constexpr int kRows = 4;                            // weight rows in flight: enough streams to reach memory bandwidth
constexpr int kTokens = Vec::kLanes == 16 ? 4 : 2;  // tokens per tile of rows; bounded by registers
constexpr int kWide = Vec::kLanes == 16 ? 8 : 4;    // tokens per tile of a single row
constexpr int kGroup = 16;                          // neurons per round of the batched paths: their rows stay in L2
constexpr int kMaxTokens = static_cast<int>(kCatsMaxTokens);

constexpr int64_t kSlice = 2048;                    // elements of the inner dimension per pass, bounded by the cache

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
inline void tile_row_block(const W* const* rows, const W* const* next, const X* x, int64_t ldx, int tokens, int64_t n, Vec* acc) {
  const X* at[kTokens];
  int t = 0;
  for (; t + kTokens <= tokens; t += kTokens) {
    for (int j = 0; j < kTokens; ++j) at[j] = x + (t + j) * ldx;
    if (t == 0) {
      dot_tile<W, R, kTokens, true>(rows, next, at, n, acc, kMaxTokens);
    } else {
      dot_tile<W, R, kTokens, false>(rows, next, at, n, acc + t, kMaxTokens);
    }
  }
  for (; t < tokens; ++t) {
    at[0] = x + t * ldx;
    if (t == 0) {
      dot_tile<W, R, 1, true>(rows, next, at, n, acc, kMaxTokens);
    } else {
      dot_tile<W, R, 1, false>(rows, next, at, n, acc + t, kMaxTokens);
    }
  }
}

/// out[r * kMaxTokens + t] = row r . x[t] for `count` <= kGroup rows of `base` and up to kMaxTokens tokens.
/// `following`: how many more rows will be asked for next; they are fetched ahead.
template <class W, class X>
inline void dense_products(const W* base, int64_t ld, int count, int following, const X* x, int64_t ldx, int tokens, int64_t n,
                           float* out) {
  Vec acc[kGroup * kMaxTokens];
  for (int r = 0; r < count; ++r)
    for (int t = 0; t < tokens; ++t) acc[r * kMaxTokens + t] = vec_zero();
  const int64_t slice = tokens == 1 ? n : kSlice;
  for (int64_t k = 0; k < n; k += slice) {
    const int64_t length = n - k < slice ? n - k : slice;
    const bool last = k + length == n;
    for (int r = 0; r < count;) {
      const int here = count - r >= kRows ? kRows : 1;
      const W *rows[kRows], *next[kRows];
      for (int j = 0; j < here; ++j) {
        rows[j] = base + (r + j) * ld + k;
        const int step = tokens == 1 ? here : count;  // one token walks down the rows, several walk along them
        const int ahead = r + j + step < count + following ? r + j + step : r + j;
        next[j] = last ? base + ahead * ld : rows[j] + slice;
      }
      Vec* sums = acc + r * kMaxTokens;
      if (here == kRows) {
        tile_row_block<W, kRows>(rows, next, x + k, ldx, tokens, length, sums);
      } else {
        tile_row_block<W, 1>(rows, next, x + k, ldx, tokens, length, sums);
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

}  // namespace subquad::cpu::SUBQUAD_ISA
