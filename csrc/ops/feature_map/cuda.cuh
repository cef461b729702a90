// Feature maps of linear attention, forward and backward. A block takes a tile of tokens of one head: the tile times
// the head's weight into shared memory, then one warp per row. For decoding and for checks: no matrix units.
#pragma once

#include <algorithm>

#include "cuda/chunk.cuh"
#include "cuda/portable.cuh"
#include "ops/feature_map/params.h"

namespace subquad::cuda {

constexpr int kMapRows = 16;  // tokens of a tile
constexpr int kMapThreads = 128;
constexpr int kMapSlots = static_cast<int>(kFeatureMaxDim) / kWarp;  // columns of a row that a lane owns
constexpr float kMapInf = INFINITY;

/// x[r * d + k] of rows first + r < end, 0 beyond.
template <class T>
__device__ __forceinline__ void load_tile(const FeatureMapParams& p, int64_t head, int64_t first, int64_t end,
                                          float* x) {
  const int d = static_cast<int>(p.d);
  const int64_t first_batch = first / p.time, first_time = first - first_batch * p.time;
  for (int i = static_cast<int>(threadIdx.x); i < kMapRows * d; i += kMapThreads) {
    const int r = i / d;
    float value = 0.0f;
    if (first + r < end) {
      int64_t b = first_batch,
              t = first_time + r;  // counted on: a 64-bit division is a call, around which values spill
      for (; t >= p.time; ++b) t -= p.time;
      const int64_t offset = b * p.x_batch + t * p.x_time + head * p.x_head + (i - r * d);
      value = sq::to_float(sq::load_nc(static_cast<const T*>(p.x) + offset));
    }
    x[i] = value;
  }
}

/// y = x weight; a thread owns columns.
template <class T>
__device__ __forceinline__ void project_tile(const FeatureMapParams& p, const T* weight, const float* x, float* y) {
  const int d = static_cast<int>(p.d), f = static_cast<int>(p.f);
  for (int j = static_cast<int>(threadIdx.x); j < f; j += kMapThreads) {
    float sum[kMapRows] = {};
    for (int k = 0; k < d; ++k) {
      const float w = sq::to_float(sq::load_nc(weight + static_cast<int64_t>(k) * f + j));
      SQ_UNROLL
      for (int r = 0; r < kMapRows; ++r) sum[r] = fmaf(x[r * d + k], w, sum[r]);
    }
    SQ_UNROLL
    for (int r = 0; r < kMapRows; ++r) y[r * f + j] = sum[r];
  }
}

__device__ __forceinline__ float map_value(FeatureKind kind, float y) {
  if (kind == FeatureKind::kRelu) return y <= 0.0f ? 0.0f : y;
  return kind == FeatureKind::kElu1 && y > 0.0f ? y + 1.0f : expf(y);
}

__device__ __forceinline__ float map_slope(FeatureKind kind, float y, float value) {
  if (kind == FeatureKind::kRelu) return y <= 0.0f ? 0.0f : 1.0f;
  return kind == FeatureKind::kElu1 && y > 0.0f ? 1.0f : value;
}

/// The map of a row and of its negative, not clamped; lane l owns columns l, l + 32, ... Columns beyond f mean nothing,
/// but are 0 with a softmax.
__device__ __forceinline__ void map_row(const FeatureMapParams& p, const float* y, float (&up)[kMapSlots],
                                        float (&down)[kMapSlots]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, f = static_cast<int>(p.f);
  const bool joint = p.kind == FeatureKind::kHedgehog2;
  if (!joint && p.kind != FeatureKind::kSoftmax) {
    SQ_UNROLL
    for (int i = 0; i < kMapSlots; ++i) {
      const float value = lane + i * kWarp < f ? y[lane + i * kWarp] : 0.0f;
      up[i] = map_value(p.kind, value);
      down[i] = map_value(p.kind, -value);
    }
    return;
  }
  float top_up = -kMapInf, top_down = -kMapInf, sum_up = 0.0f, sum_down = 0.0f;
  SQ_UNROLL
  for (int i = 0; i < kMapSlots; ++i) {
    const bool inside = lane + i * kWarp < f;
    const float value = inside ? y[lane + i * kWarp] : 0.0f;
    up[i] = inside ? value : -kMapInf;
    down[i] = inside ? -value : -kMapInf;
    top_up = fmaxf(top_up, up[i]);
    top_down = fmaxf(top_down, down[i]);
  }
  top_up = warp_max(top_up);
  top_down = warp_max(top_down);
  if (joint) top_up = top_down = fmaxf(top_up, top_down);
  SQ_UNROLL
  for (int i = 0; i < kMapSlots; ++i) {
    up[i] = expf(up[i] - top_up);
    down[i] = expf(down[i] - top_down);
    sum_up += up[i];
    sum_down += down[i];
  }
  sum_up = warp_sum(sum_up);
  sum_down = warp_sum(sum_down);
  if (joint) sum_up = sum_down = sum_up + sum_down;
  const float scale_up = reciprocal(sum_up), scale_down = reciprocal(sum_down);
  SQ_UNROLL
  for (int i = 0; i < kMapSlots; ++i) {
    up[i] *= scale_up;
    down[i] *= scale_down;
  }
}

__device__ __forceinline__ float clamped(float value, float eps) { return value < eps ? eps : value; }

/// Features of the first `count` rows of y, one warp a row, where token `first` of the head begins.
template <class T>
__device__ __forceinline__ void store_tile(const FeatureMapParams& p, int64_t head, int64_t first, int64_t count,
                                           const float* y) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, f = static_cast<int>(p.f);
  for (int r = static_cast<int>(threadIdx.x) / kWarp; r < kMapRows && r < count; r += kMapThreads / kWarp) {
    float up[kMapSlots], down[kMapSlots];
    map_row(p, y + r * f, up, down);
    T* out = static_cast<T*>(p.out) + ((first + r) * p.heads + head) * p.features;
    SQ_UNROLL
    for (int i = 0; i < kMapSlots; ++i) {
      const int j = lane + i * kWarp;
      if (j < f) {
        sq::store(out + j, sq::from_float<T>(clamped(up[i], p.eps)));
        if (p.fullspace) sq::store(out + f + j, sq::from_float<T>(clamped(down[i], p.eps)));
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kMapThreads) feature_map_fwd_kernel(FeatureMapParams p) {
  SQ_DYNAMIC_SHARED(float, x);
  float* y = p.weight == nullptr ? x : x + kMapRows * p.d;
  const int64_t head = static_cast<int64_t>(blockIdx.x) % p.heads, first = blockIdx.x / p.heads * kMapRows;
  load_tile<T>(p, head, first, p.rows, x);
  __syncthreads();
  if (p.weight != nullptr) {
    project_tile<T>(p, static_cast<const T*>(p.weight) + head * p.d * p.f, x, y);
    __syncthreads();
  }
  store_tile<T>(p, head, first, p.rows - first, y);
}

/// A row of y becomes its gradient.
template <class T>
__device__ __forceinline__ void backward_row(const FeatureMapParams& p, const T* grad, float* y) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const bool joint = p.kind == FeatureKind::kHedgehog2;
  float up[kMapSlots], down[kMapSlots], grad_up[kMapSlots], grad_down[kMapSlots];
  map_row(p, y, up, down);
  int f = again(static_cast<int>(p.f));
  float dot_up = 0.0f, dot_down = 0.0f;
  SQ_UNROLL
  for (int i = 0; i < kMapSlots; ++i) {
    const int j = lane + i * kWarp;
    grad_up[i] = grad_down[i] = 0.0f;
    if (j < f) {
      if (!(up[i] < p.eps)) grad_up[i] = sq::to_float(sq::load_nc(grad + j));
      if (p.fullspace && !(down[i] < p.eps)) grad_down[i] = sq::to_float(sq::load_nc(grad + f + j));
    }
    dot_up = fmaf(up[i], grad_up[i], dot_up);
    dot_down = fmaf(down[i], grad_down[i], dot_down);
  }
  dot_up = warp_sum(dot_up);
  dot_down = warp_sum(dot_down);
  if (joint) dot_up = dot_down = dot_up + dot_down;
  f = again(f);
  SQ_UNROLL
  for (int i = 0; i < kMapSlots; ++i) {
    const int j = lane + i * kWarp;
    if (j < f) {
      float gradient = 0.0f, other = 0.0f;
      if (joint || p.kind == FeatureKind::kSoftmax) {
        gradient = up[i] * (grad_up[i] - dot_up);
        if (p.fullspace) other = down[i] * (grad_down[i] - dot_down);
      } else {  // a select, so that an infinite slope is not multiplied by the 0 of a clamped entry
        gradient = up[i] < p.eps ? 0.0f : grad_up[i] * map_slope(p.kind, y[j], up[i]);
        if (p.fullspace) other = down[i] < p.eps ? 0.0f : grad_down[i] * map_slope(p.kind, -y[j], down[i]);
      }
      y[j] = gradient - other;
    }
  }
}

/// The first `count` rows of y become their gradient; that of x goes to dx, which begins with token `first` of the
/// head; that of the weight is added to `partial`, or begins it.
template <class T, class X>
__device__ __forceinline__ void backward_tile(const FeatureMapParams& p, int64_t head, int64_t first, int count,
                                              int begins, const T* weight, const float* x, float* y, X* dx,
                                              float* partial) {
  const int d = static_cast<int>(p.d), f = static_cast<int>(p.f), thread = static_cast<int>(threadIdx.x);
  for (int r = thread / kWarp; r < count; r += kMapThreads / kWarp) {
    const T* grad = static_cast<const T*>(p.grad_out) + ((first + r) * p.heads + head) * p.features;
    backward_row(p, grad, y + r * f);
  }
  weight = running_pointer(weight);
  begins = again(begins);
  __syncthreads();
  for (int k = thread; k < d; k += kMapThreads) {
    for (int r = 0; r < count; ++r) {
      float sum = weight == nullptr ? y[r * f + k] : 0.0f;
      for (int j = 0; weight != nullptr && j < f; ++j) {
        sum = fmaf(y[r * f + j], sq::to_float(sq::load_nc(weight + static_cast<int64_t>(k) * f + j)), sum);
      }
      sq::store(dx + ((first + r) * p.heads + head) * p.d + k, sq::from_float<X>(sum));
    }
  }
  for (int i = thread; weight != nullptr && i < d * f; i += kMapThreads) {
    float sum = begins ? 0.0f : sq::load(partial + i);
    for (int r = 0; r < count; ++r) sum = fmaf(x[r * d + i / f], y[r * f + i % f], sum);
    sq::store(partial + i, sum);
  }
}

/// One block per head and chunk of rows. It alone writes its partial sum of the weight's gradient, tile after tile.
template <class T>
__global__ void __launch_bounds__(kMapThreads) feature_map_bwd_kernel(FeatureMapParams p) {
  SQ_DYNAMIC_SHARED(float, x);
  const bool weighted = p.weight != nullptr;
  float* y = weighted ? x + kMapRows * p.d : x;
  const int64_t head = static_cast<int64_t>(blockIdx.x) % p.heads, chunk = blockIdx.x / p.heads;
  const int64_t begin = chunk * p.chunk, end = begin + p.chunk < p.rows ? begin + p.chunk : p.rows;
  const T* weight = weighted ? static_cast<const T*>(p.weight) + head * p.d * p.f : nullptr;
  float* partial = p.partials + (weighted ? (chunk * p.heads + head) * p.d * p.f : 0);
  for (int64_t first = begin; first < end; first += kMapRows) {
    __syncthreads();
    load_tile<T>(p, head, first, end, x);
    __syncthreads();
    weight = running_pointer(weight);
    if (weight != nullptr) {
      project_tile<T>(p, weight, x, y);
      __syncthreads();
    }
    const int count = static_cast<int>(end - first < kMapRows ? end - first : kMapRows);
    backward_tile(p, head, first, count, first == begin, weight, x, y, static_cast<T*>(p.dx), partial);
  }
}

/// dweight from the partial sums of the heads that share it, in their order; `blocks` blocks per matrix.
template <class T>
__global__ void __launch_bounds__(kMapThreads) feature_map_reduce_kernel(FeatureMapParams p, unsigned blocks) {
  const int64_t size = p.d * p.f, index = blockIdx.x / blocks;
  const int64_t i = static_cast<int64_t>(blockIdx.x % blocks) * kMapThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0.0f;
  for (int64_t head = index * p.sharing; head < (index + 1) * p.sharing; ++head) {
    for (int64_t c = 0; c < p.chunks; ++c) sum += sq::load_nc(p.partials + (c * p.heads + head) * size + i);
  }
  sq::store(static_cast<T*>(p.dweight) + index * size + i, sq::from_float<T>(sum));
}

inline std::size_t feature_map_shared(const FeatureMapParams& p) {
  const int64_t columns = p.weight == nullptr ? p.d : p.d + p.f;
  return static_cast<std::size_t>(kMapRows * columns) * sizeof(float);
}

template <class T>
void feature_map_forward(const FeatureMapParams& p, sq::stream_t stream) {
  if (p.rows == 0 || p.heads == 0) return;
  SQ_LAUNCH((feature_map_fwd_kernel<T>), ceil_div(p.rows, kMapRows) * p.heads, kMapThreads, feature_map_shared(p),
            stream, p);
}

template <class T>
void feature_map_reduce(const FeatureMapParams& p, sq::stream_t stream) {
  const int64_t blocks = ceil_div(p.d * p.f, kMapThreads);
  SQ_LAUNCH((feature_map_reduce_kernel<T>), p.heads / p.sharing * blocks, kMapThreads, 0, stream, p,
            static_cast<unsigned>(blocks));
}

template <class T>
void feature_map_backward(const FeatureMapParams& p, sq::stream_t stream) {
  if (p.heads == 0) return;
  if (p.rows > 0) {
    SQ_LAUNCH((feature_map_bwd_kernel<T>), p.chunks * p.heads, kMapThreads, feature_map_shared(p), stream, p);
  }
  if (p.weight != nullptr) feature_map_reduce<T>(p, stream);
}

}  // namespace subquad::cuda
