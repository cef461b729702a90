// The sums of a softmax over keys that several blocks share, and how they become one: in the order of the shares.
#pragma once

#include <cstdint>

#include "common/exp.h"
#include "cuda/portable.cuh"

namespace subquad::cuda {

/// What the shares of a row hold, one after the other in scratch: each the sums of the dv values, then the largest
/// score, then the sum of the weights exp(score - largest). Members take what was found before and go on from there.
struct Shares {
  const float* first;
  int64_t count, dv;

  static __host__ __device__ int64_t floats(int64_t dv) { return dv + 2; }

  /// The largest score.
  __device__ __forceinline__ float top(float top) const {
    for (int64_t s = 0; s < count; ++s) top = fmaxf(top, sq::load_nc(first + s * floats(dv) + dv));
    return top;
  }

  /// The sum of the weights exp(score - shift).
  __device__ __forceinline__ float total(float shift, float total) const {
    for (int64_t s = 0; s < count; ++s) {
      const float* stats = first + s * floats(dv) + dv;
      total = fmaf(sq::load_nc(stats + 1), exp2f((sq::load_nc(stats) - shift) * kLog2e), total);
    }
    return total;
  }

  /// Column c of the values, with these weights.
  __device__ __forceinline__ float value(int64_t c, float shift, float sum) const {
    for (int64_t s = 0; s < count; ++s) {
      const float* values = first + s * floats(dv);
      sum = fmaf(sq::load_nc(values + c), exp2f((sq::load_nc(values + dv) - shift) * kLog2e), sum);
    }
    return sum;
  }
};

/// From what weights are counted: the largest score, or 0 where there is none.
__device__ __forceinline__ float shift_of(float top) { return top == -INFINITY ? 0.0f : top; }

/// exp(score - shift), 0 where there is no score.
__device__ __forceinline__ float weight_of(float score, float shift) {
  return score == -INFINITY ? 0.0f : exp2f((score - shift) * kLog2e);
}

/// A row's softmax: the sum of its weights is `total` times exp(shift).
struct RowTotal {
  float shift, total;

  __device__ bool empty() const { return total == 0.0f; }
};

/// One row by a block of kThreads threads: `out` is the mean of its dv values, 0 where nothing is seen. `sink` is one
/// score more, without a value, or -inf.
template <int kThreads, class T>
__device__ __forceinline__ RowTotal merge_shares(const Shares& shares, float sink, T* out) {
  const float shift = shift_of(shares.top(sink));
  const RowTotal row{shift, shares.total(shift, weight_of(sink, shift))};
  for (int64_t c = threadIdx.x; c < shares.dv; c += kThreads) {
    const float sum = shares.value(c, shift, 0.0f);
    sq::store(out + c, sq::from_float<T>(row.empty() ? 0.0f : sum / row.total));
  }
  return row;
}

}  // namespace subquad::cuda
