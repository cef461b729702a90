// Products of weight rows with activations, the inner loops of a gated MLP. One instruction set; see vec.h.
#pragma once

#include "cpu/simd/vec.h"

namespace subquad::cpu::SUBQUAD_ISA {

/// The last, incomplete block of a row, zero-padded.
template <class W>
struct Tail {
  W values[kBlock] = {};
  Tail(const W* p, int64_t count) { std::memcpy(values, p, static_cast<size_t>(count) * sizeof(W)); }
};

template <class W>
inline void prefetch_block(const W* p, int64_t k) {
  constexpr int64_t kLine = 64 / sizeof(W);
  if (k % kLine != 0) return;
  for (int64_t i = 0; i < kBlock; i += kLine) prefetch(p + k + i);
}

/// sum[r][t] += one block of row r . one block of x[t].
template <class W, int R, int T>
inline void dot_block(const W* const (&w)[R], const float* const* x, int64_t k, Vec (&sum)[R][T]) {
  Vec x0[T], x1[T];
  for (int t = 0; t < T; ++t) x0[t] = vec_load(x[t] + k), x1[t] = vec_load(x[t] + k + kLanes);
  for (int r = 0; r < R; ++r) {
    Vec w0, w1;
    widen(w[r], w0, w1);
    for (int t = 0; t < T; ++t) sum[r][t] = vec_fma(w1, x1[t], vec_fma(w0, x0[t], sum[r][t]));
  }
}

#if defined(__AVX512BF16__)
template <class W, int R, int T>
inline void dot_block(const W* const (&w)[R], const BFloat16* const* x, int64_t k, Vec (&sum)[R][T]) {
  __m512bh pairs[T];
  for (int t = 0; t < T; ++t) pairs[t] = pairs_load(x[t] + k);
  for (int r = 0; r < R; ++r) {
    const __m512bh weights = pairs_load(w[r]);
    for (int t = 0; t < T; ++t) sum[r][t] = vec_dot(weights, pairs[t], sum[r][t]);
  }
}
#endif

/// Which blocks of the rows ahead a tile fetches.
struct Share {
  int first, of;
};

/// acc[r * ld + t] += rows[r][0:n] . x[t][0:n]. `x` is padded with zeros to a whole block, `rows` is not padded.
/// One accumulator per (row, token) whatever R and T are: a dot product has the same bits in every tile shape.
/// Meanwhile next[r][0:n] is fetched into the cache: every `share.of`-th block of it from block `share.first` on, so
/// that tiles which walk the same rows spread the fetches evenly over their arithmetic.
template <class W, int R, int T, class X>
inline void dot_tile(const W* const* rows, const W* const* next, const X* const* x, int64_t n, Vec* acc, int ld,
                     Share share = {0, 1}) {
  Vec sum[R][T];
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) sum[r][t] = acc[r * ld + t];
  const W* w[R];
  int64_t k = 0;
  int until_fetch = share.first;
  for (; k + kBlock <= n; k += kBlock) {
    for (int r = 0; r < R; ++r) w[r] = rows[r] + k;
    if (until_fetch-- == 0) {
      for (int r = 0; r < R; ++r) prefetch_block(next[r], k);
      until_fetch = share.of - 1;
    }
    dot_block<W, R, T>(w, x, k, sum);
  }
  if (k < n) {
    for (int r = 0; r < R; ++r) {
      const Tail<W> tail(rows[r] + k, n - k);
      const W* one[1] = {tail.values};
      Vec last[1][T];
      for (int t = 0; t < T; ++t) last[0][t] = sum[r][t];
      dot_block<W, 1, T>(one, x, k, last);
      for (int t = 0; t < T; ++t) sum[r][t] = last[0][t];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) acc[r * ld + t] = sum[r][t];
}

/// y[0:n] += sum over r, in order, of h[r] * rows[r][0:n]; `y` is packed and padded.
template <class W, int R>
inline void axpy_rows(const W* const* rows, const W* const* next, const float* h, float* y, int64_t n) {
  Vec factor[R];
  for (int r = 0; r < R; ++r) factor[r] = vec_set(h[r]);
  const auto block = [&](const W* const(&w)[R], int64_t k) {
    Vec y0 = vec_load(y + k), y1 = vec_load(y + k + kLanes);
    for (int r = 0; r < R; ++r) {
      Vec w0, w1;
      widen(w[r], w0, w1);
      y0 = vec_fma(w0, factor[r], y0);
      y1 = vec_fma(w1, factor[r], y1);
    }
    vec_store(y + k, y0);
    vec_store(y + k + kLanes, y1);
  };
  const W* w[R];
  int64_t k = 0;
  for (; k + kBlock <= n; k += kBlock) {
    for (int r = 0; r < R; ++r) {
      w[r] = rows[r] + k;
      prefetch_block(next[r], k);
    }
    block(w, k);
  }
  if (k < n) {
    W padded[R][kBlock];
    for (int r = 0; r < R; ++r) {
      std::memcpy(padded[r], Tail<W>(rows[r] + k, n - k).values, sizeof padded[r]);
      w[r] = padded[r];
    }
    block(w, k);
  }
}

/// y[0:V vectors] += sum over j < count, in order, of factor[j] * tile[list[j]]: rows already widened, ld apart.
template <int V>
inline void add_rows(const float* tile, int64_t ld, const int* list, const float* factor, int count, float* y) {
  Vec sum[V];
  for (int v = 0; v < V; ++v) sum[v] = vec_load(y + v * kLanes);
  for (int j = 0; j < count; ++j) {
    const float* w = tile + list[j] * ld;
    const Vec f = vec_set(factor[j]);
    for (int v = 0; v < V; ++v) sum[v] = vec_fma(vec_load(w + v * kLanes), f, sum[v]);
  }
  for (int v = 0; v < V; ++v) vec_store(y + v * kLanes, sum[v]);
}

/// y[t][0:V vectors] += sum over r < rows, in order, of h[t][r] * tile[r]: rows already widened, ld apart.
template <int V, int T>
inline void outer_tile(const float* tile, int64_t ld, int rows, const float* h, int64_t ldh, float* y, int64_t ldy) {
  Vec sum[T][V];
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v) sum[t][v] = vec_load(y + t * ldy + v * kLanes);
  for (int r = 0; r < rows; ++r) {
    Vec w[V];
    for (int v = 0; v < V; ++v) w[v] = vec_load(tile + r * ld + v * kLanes);
    for (int t = 0; t < T; ++t) {
      const Vec factor = vec_set(h[t * ldh + r]);
      for (int v = 0; v < V; ++v) sum[t][v] = vec_fma(w[v], factor, sum[t][v]);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v) vec_store(y + t * ldy + v * kLanes, sum[t][v]);
}

/// out[0:n] = row[0:n] widened, in packed order, zero-padded to whole blocks.
template <class W>
inline void widen_row(const W* row, int64_t n, float* out) {
  Vec low, high;
  int64_t k = 0;
  for (; k + kBlock <= n; k += kBlock) {
    widen(row + k, low, high);
    vec_store(out + k, low);
    vec_store(out + k + kLanes, high);
  }
  if (k < n) {
    widen(Tail<W>(row + k, n - k).values, low, high);
    vec_store(out + k, low);
    vec_store(out + k + kLanes, high);
  }
}

}  // namespace subquad::cpu::SUBQUAD_ISA
