// Scores of a tile of keys and weighted sums of its values, for some query rows at once. One instruction set.
//
// Every score and every element of a sum has an accumulator of its own, whatever is computed beside it: the same bits
// for any number of rows.
#pragma once

#include "common/integers.h"
#include "ops/sink_attention_step/cpu_rows.h"

namespace subquad::cpu::SUBQUAD_ISA::sink {

constexpr int kSums = kLanes == 16 ? 16 : 8;   // vectors of sums in registers
constexpr int64_t kTile = 128;                 // keys of a tile: for each, queries are rotated anew
constexpr int64_t kQueryStride = kSinkMaxDim;  // floats from a query to the next

/// fn.template operator()<R>(row) for rows [begin, end), R of them at a time.
template <class Fn>
inline void by_rows(int64_t begin, int64_t end, const Fn& fn) {
  int64_t row = begin;
  for (; row + 4 <= end; row += 4) fn.template operator()<4>(row);
  if (row + 2 <= end) fn.template operator()<2>(row), row += 2;
  if (row < end) fn.template operator()<1>(row);
}

/// What memory is asked for while rows are used: as many elements as they have, and at most `left`.
template <class E>
struct Ahead {
  const E* rows;
  int64_t left;
};

/// Asks for elements [begin, end) of those ahead. Inlined by order: a call of a function that does nothing else is
/// taken for one without effect by GCC, and left out.
template <class E>
inline __attribute__((always_inline)) void fetch(const Ahead<E>& ahead, int64_t begin, int64_t end) {
  constexpr int64_t kLine = 64 / sizeof(E);
  for (const int64_t stop = smaller(end, ahead.left); begin < stop; begin += kLine)
    __builtin_prefetch(ahead.rows + begin, 0, 3);
}

/// Keys of a tile, `stride` elements apart.
template <class E, class Table = float>
struct Keys {
  const E* rows;
  int64_t stride, words;  // the second is a multiple of kLanes
  int64_t pairs;          // of elements (f, f + pairs), a multiple of kLanes; they are added pair by pair
  const Table* table;     // the cosines and sines that rotate the pairs of the first key, then the second, ...
  Ahead<E> ahead;
};

/// scores[r * kTile + k] = the sum of sums[r * K + k].
template <int R>
inline void store_sums(const Vec* sums, float* scores) {
  constexpr int K = kSums / R;
  float found[16];
  if constexpr (kSums == 16) {
    vec_sums(sums, found);
  } else {
    for (int i = 0; i < kSums; ++i) found[i] = vec_sum(sums[i]);
  }
  for (int r = 0; r < R; ++r) std::memcpy(scores + r * kTile, found + r * K, K * sizeof(float));
}

/// scores[r * kTile + j] = q[r] . keys[j] for R rows of q and n keys.
template <int R, bool kTurn, class E>
__attribute__((noinline)) void dot_keys(const float* q, const Keys<E>& keys, int64_t n, float* scores) {
  constexpr int K = kSums / R;
  const int64_t pairs = keys.pairs;
  for (int64_t j = 0; j < n; j += K) {
    const E* at[K];
    const float* turn[K];
    for (int k = 0; k < K; ++k) {
      at[k] = keys.rows + smaller(j + k, n - 1) * keys.stride;
      if constexpr (kTurn) turn[k] = keys.table + (j + k) * 2 * pairs;
    }
    fetch(keys.ahead, j * keys.stride, (j + K) * keys.stride);
    Vec sums[16] = {};
    for (int64_t f = 0; f < pairs; f += kLanes) {
      Vec x[R], y[R];
      for (int r = 0; r < R; ++r)
        x[r] = vec_load(q + r * kQueryStride + f), y[r] = vec_load(q + r * kQueryStride + pairs + f);
      for (int k = 0; k < K; ++k) {
        Vec a = vec_load(at[k] + f), b = vec_load(at[k] + pairs + f);
        if constexpr (kTurn) {
          const Vec c = vec_load(turn[k] + f), s = vec_load(turn[k] + pairs + f), turned = a * c - b * s;
          b = b * c + a * s, a = turned;
        }
        for (int r = 0; r < R; ++r) sums[r * K + k] = vec_fma(x[r], a, sums[r * K + k]);
        for (int r = 0; r < R; ++r) sums[r * K + k] = vec_fma(y[r], b, sums[r * K + k]);
      }
    }
    for (int64_t c = 2 * pairs; c < keys.words; c += kLanes) {
      Vec x[R];
      for (int r = 0; r < R; ++r) x[r] = vec_load(q + r * kQueryStride + c);
      for (int k = 0; k < K; ++k) {
        const Vec a = vec_load(at[k] + c);
        for (int r = 0; r < R; ++r) sums[r * K + k] = vec_fma(x[r], a, sums[r * K + k]);
      }
    }
    store_sums<R>(sums, scores + j);
  }
}

/// Values [begin, stop) of a tile, `stride` elements apart.
template <class E>
struct Values {
  const E* rows;
  int64_t stride, begin, stop, columns;  // the last is a multiple of kLanes
  Ahead<E> ahead;
};

template <int R, int C, class E>
__attribute__((noinline)) void add_columns(const float* weights, const Values<E>& v, int64_t column, float* out,
                                           int64_t out_stride) {
  for (; column + C * kLanes <= v.columns; column += C * kLanes) {
    Vec sums[R][C];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sums[r][c] = vec_load(out + r * out_stride + column + c * kLanes);
    for (int64_t j = v.begin; j < v.stop; ++j) {
      if (column == 0) fetch(v.ahead, j * v.stride, (j + 1) * v.stride);
      Vec value[C];
      for (int c = 0; c < C; ++c) value[c] = vec_load(v.rows + j * v.stride + column + c * kLanes);
      for (int r = 0; r < R; ++r) {
        const Vec weight = vec_set(weights[r * kTile + j]);
        for (int c = 0; c < C; ++c) sums[r][c] = vec_fma(weight, value[c], sums[r][c]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) vec_store(out + r * out_stride + column + c * kLanes, sums[r][c]);
  }
  if constexpr (C > 1) add_columns<R, C / 2>(weights, v, column, out, out_stride);
}

/// out[r] += weights[r * kTile + j] * row j of the values, in the order of j, for R rows.
template <int R, class E>
inline void add_values(const float* weights, const Values<E>& v, float* out, int64_t out_stride) {
  constexpr int C = kSums / R < 8 ? kSums / R : 8;
  add_columns<R, C>(weights, v, 0, out, out_stride);
}

/// What is known of one row's softmax besides the weighted sum of values.
struct Softmax {
  float top;  // the largest score; NaN is passed over
  float sum;  // of exp(score - top)
};

/// The products x of one row become weights where the row sees keys [begin, end), 0 elsewhere below `count`, a multiple
/// of kLanes; what was summed before is scaled to the new maximum. Score j is product j times factors[j] and `factor`.
inline void soften(float* x, int64_t begin, int64_t end, int64_t count, const float* factors, float factor,
                   Softmax& state, float* out, int64_t columns) {
  for (int64_t j = 0; j < count; j += kLanes) {
    const Vec score = vec_load(x + j) * factor * vec_load(factors + j);
    vec_store(x + j, score + (score - score));  // NaN where it is infinite
  }
  for (int64_t j = 0; j < begin; ++j) x[j] = -__builtin_inff();
  for (int64_t j = end; j < count; ++j) x[j] = -__builtin_inff();
  Vec found = vec_set(state.top);
  for (int64_t j = 0; j < count; j += kLanes) found = vec_max(vec_load(x + j), found);
  const float top = vec_max_all(found), shift = top == -__builtin_inff() ? 0.0f : top;
  if (top != state.top) {
    float fade[kLanes];
    vec_store(fade, vec_exp2(vec_set((state.top - shift) * kLog2e)));
    state.sum *= fade[0];
    for (int64_t c = 0; c < columns; c += kLanes) vec_store(out + c, vec_mul(vec_load(out + c), vec_set(fade[0])));
    state.top = top;
  }
  Vec sum = vec_zero();
  for (int64_t j = 0; j < count; j += kLanes) {
    const Vec e = vec_exp2(vec_mul(vec_add(vec_load(x + j), vec_set(-shift)), vec_set(kLog2e)));
    sum = vec_add(sum, e);
    vec_store(x + j, e);
  }
  state.sum += vec_sum(sum);
}

}  // namespace subquad::cpu::SUBQUAD_ISA::sink
