// Products of weight rows with packed activations, the two inner loops of a sparse layer. One instruction set; see vec.h.
#pragma once

#include "cpu/vec.h"

namespace subquad::cpu::SUBQUAD_ISA {

/// The last, incomplete block of a row, zero-padded.
template <class W>
inline void widen_tail(const W* p, int64_t count, Vec& a, Vec& b) {
  W padded[kBlock] = {};
  std::memcpy(padded, p, static_cast<size_t>(count) * sizeof(W));
  widen(padded, a, b);
}

/// acc[r * ld + t] += rows[r][0:n] . x[t][0:n]. `x` is packed and padded to a whole block, `rows` is not.
/// With kPrefetch, next[r][0:n] is fetched into the cache meanwhile.
/// One accumulator per (row, token) whatever R and T are: a dot product has the same bits in every tile shape.
template <class W, int R, int T, bool kPrefetch>
inline void dot_tile(const W* const* rows, const W* const* next, const float* const* x, int64_t n, Vec* acc, int ld) {
  constexpr int64_t kLine = 64 / sizeof(W);
  Vec sum[R][T];
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) sum[r][t] = acc[r * ld + t];
  const int64_t whole = n / kBlock * kBlock;
  int64_t k = 0;
  for (; k < whole; k += kBlock) {
    Vec x0[T], x1[T];
    for (int t = 0; t < T; ++t) x0[t] = vec_load(x[t] + k), x1[t] = vec_load(x[t] + k + Vec::kLanes);
    for (int r = 0; r < R; ++r) {
      if (kPrefetch && k % kLine == 0) {
        for (int64_t line = 0; line < kBlock; line += kLine) prefetch(next[r] + k + line);
      }
      Vec w0, w1;
      widen(rows[r] + k, w0, w1);
      for (int t = 0; t < T; ++t) sum[r][t] = vec_fma(w1, x1[t], vec_fma(w0, x0[t], sum[r][t]));
    }
  }
  if (k < n) {
    for (int r = 0; r < R; ++r) {
      Vec w0, w1;
      widen_tail(rows[r] + k, n - k, w0, w1);
      for (int t = 0; t < T; ++t) {
        sum[r][t] = vec_fma(w1, vec_load(x[t] + k + Vec::kLanes), vec_fma(w0, vec_load(x[t] + k), sum[r][t]));
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) acc[r * ld + t] = sum[r][t];
}

/// y[0:n] += sum over r, in order, of h[r] * rows[r][0:n]; `y` is packed and padded.
template <class W, int R, bool kPrefetch>
inline void axpy_rows(const W* const* rows, const W* const* next, const float* h, float* y, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(W);
  Vec factor[R];
  for (int r = 0; r < R; ++r) factor[r] = vec_set(h[r]);
  const int64_t whole = n / kBlock * kBlock;
  for (int64_t k = 0; k < whole; k += kBlock) {
    Vec y0 = vec_load(y + k), y1 = vec_load(y + k + Vec::kLanes);
    for (int r = 0; r < R; ++r) {
      if (kPrefetch && k % kLine == 0) {
        for (int64_t line = 0; line < kBlock; line += kLine) prefetch(next[r] + k + line);
      }
      Vec w0, w1;
      widen(rows[r] + k, w0, w1);
      y0 = vec_fma(w0, factor[r], y0);
      y1 = vec_fma(w1, factor[r], y1);
    }
    vec_store(y + k, y0);
    vec_store(y + k + Vec::kLanes, y1);
  }
  if (whole < n) {
    Vec y0 = vec_load(y + whole), y1 = vec_load(y + whole + Vec::kLanes);
    for (int r = 0; r < R; ++r) {
      Vec w0, w1;
      widen_tail(rows[r] + whole, n - whole, w0, w1);
      y0 = vec_fma(w0, factor[r], y0);
      y1 = vec_fma(w1, factor[r], y1);
    }
    vec_store(y + whole, y0);
    vec_store(y + whole + Vec::kLanes, y1);
  }
}

}  // namespace subquad::cpu::SUBQUAD_ISA
