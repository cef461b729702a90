// The running softmax of query rows: where it begins, how the sums over two sets of keys become one, and the result.
#pragma once

#include <math.h>

#include "ops/interval_attention/cpu_rows.h"

namespace subquad::cpu::SUBQUAD_ISA::interval {

/// Sums of rows over keys: of the weights e^(score - top), and of the values times their weights.
struct RowSums {
  float* out;  // [rows, cols]
  float* top;  // [rows]: the largest score
  float* sum;  // [rows]
  int64_t cols;

  static int64_t columns(const IntervalAttentionParams& p) { return round_up(p.dv, 16); }
  static constexpr int64_t floats(int64_t rows, int64_t cols) { return round_up(rows * (cols + 2), 16); }
  static RowSums in(float* memory, int64_t rows, int64_t cols) {
    return {memory, memory + rows * cols, memory + rows * (cols + 1), cols};
  }
  RowSums from(int64_t row) const { return {out + row * cols, top + row, sum + row, cols}; }
};

/// The first `count` rows have seen nothing yet.
inline void clear(const RowSums& sums, int64_t count) {
  for (int64_t row = 0; row < count; ++row) {
    sums.top[row] = -__builtin_inff();
    sums.sum[row] = 0.0f;
  }
  zero_words(sums.out, count * sums.cols);
}

/// The rows of a tile have seen their sinks and nothing else.
inline void start(const IntervalAttentionParams& p, const RowTile& rows, const RowSums& sums) {
  clear(sums, rows.padded());
  if (p.sink_logits == nullptr) return;
  for (int64_t row = 0; row < rows.count; ++row) {
    const float sink = p.sink_logits[rows.head(row)];
    sums.top[row] = sink;
    sums.sum[row] = sink == -__builtin_inff() ? 0.0f : 1.0f + (sink - sink);  // NaN beside infinity
  }
}

/// The first row of `total` has seen the keys of the first row of `part` as well. Compiled once, for the same bits.
__attribute__((noinline)) inline void merge(const RowSums& total, const RowSums& part) {
  const float top = *part.top > *total.top ? *part.top : *total.top;
  const float shift = top == -__builtin_inff() ? 0.0f : top;
  const Vec old = vec_exp2(vec_set((*total.top - shift) * kLog2e));
  const Vec more = vec_exp2(vec_set((*part.top - shift) * kLog2e));
  for (int64_t c = 0; c < total.cols; c += kLanes)
    vec_store(total.out + c, vec_fma(vec_load(part.out + c), more, vec_mul(vec_load(total.out + c), old)));
  *total.sum = *total.sum * old[0] + *part.sum * more[0];
  *total.top = top;
}

/// out, lse and stats of rows that have seen everything.
template <class T>
inline void store(const IntervalAttentionParams& p, const RowTile& rows, const RowSums& sums) {
  for (int64_t row = 0; row < rows.count; ++row) {
    const int64_t at = (rows.b * p.mask.tq + rows.position(row)) * p.heads + rows.head(row);
    const bool empty = sums.sum[row] == 0.0f;
    const float total = empty ? 1.0f : sums.sum[row];
    T* out = static_cast<T*>(p.out) + at * p.dv;
    const float* values = sums.out + row * sums.cols;
    for (int64_t c = 0; c < p.dv; ++c) out[c] = from_float<T>(values[c] / total);
    const float top = sums.top[row] == -__builtin_inff() ? 0.0f : sums.top[row], log_sum = logf(total);
    p.lse[at] = empty ? -__builtin_inff() : top + log_sum;
    p.stats[2 * at] = top;
    p.stats[2 * at + 1] = empty ? __builtin_inff() : log_sum;
  }
}

}  // namespace subquad::cpu::SUBQUAD_ISA::interval
