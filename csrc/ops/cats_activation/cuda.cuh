// Thresholded activation and thresholded GLU, elementwise over [rows, cols], forward and backward (training, prefill).
//
//   activation   a = m act(z)            dz = (m or straight_through) grad act'(z)
//   glu          h = m act(z) u          dz = (m or straight_through) grad u act'(z),   du = m grad act(z)
//
// with m = not (|act(z)| <= threshold of the column), every product in fp32 and every dead entry selected to exactly 0.
#pragma once

#include <algorithm>

#include "cuda/chunk.cuh"
#include "cuda/portable.cuh"
#include "ops/cats_activation/params.h"

namespace subquad::cuda {

constexpr unsigned kActivationBlockCols = 64;  // threads along the columns of a block
constexpr unsigned kActivationBlockRows = 4;

/// Elements a thread handles at once: 16 bytes of the wider of the two types.
template <class Z, class U>
constexpr int kActivationChunk = std::min(kVecElems<Z>, kVecElems<U>);

/// Blocks side by side.
SQ_HD int64_t activation_columns(const CatsActivationParams& p, int chunk) {
  return ceil_div(p.cols, kActivationBlockCols * chunk);
}

/// Calls fn(offset, count, t) for the chunk of the thread, t holding the thresholds of its columns.
template <int K, class Fn>
__device__ __forceinline__ void with_chunk(const CatsActivationParams& p, Fn&& fn) {
  const unsigned columns = static_cast<unsigned>(activation_columns(p, K));
  const int64_t col = (int64_t{blockIdx.x % columns} * kActivationBlockCols + threadIdx.x) * K, count = p.cols - col;
  const int64_t row = int64_t{blockIdx.x / columns} * kActivationBlockRows + threadIdx.y;
  if (count <= 0 || row >= p.rows) return;
  float t[K];
  SQ_UNROLL
  for (int j = 0; j < K; ++j) t[j] = j < count ? sq::load_nc(p.threshold + (col + j) * p.threshold_stride) : 0.0f;
  fn(row * p.cols + col, count, t);
}

template <bool kAligned, int K, class T>
__device__ __forceinline__ void read_chunk(const void* base, int64_t offset, int64_t count, float (&out)[K]) {
  to_floats(load_chunk<Reuse::kStream, kAligned, K>(static_cast<const T*>(base) + offset, count), out);
}

template <class Z, class U, bool kGated, bool kAligned>
__global__ void __launch_bounds__(kActivationBlockCols* kActivationBlockRows)
    cats_activation_fwd_kernel(CatsActivationParams p) {
  constexpr int K = kActivationChunk<Z, U>;
  with_chunk<K>(p, [&](int64_t offset, int64_t count, const float (&t)[K]) {
    float z[K], u[K], out[K];
    read_chunk<kAligned, K, Z>(p.z, offset, count, z);
    if constexpr (kGated) read_chunk<kAligned, K, U>(p.u, offset, count, u);
    SQ_UNROLL
    for (int j = 0; j < K; ++j) {
      const float s = activate(p.activation, z[j]);
      const float value = kGated ? s * u[j] : s;
      out[j] = is_active(s, t[j], p.inclusive) ? value : 0.0f;
    }
    store_chunk<kAligned>(static_cast<U*>(p.out) + offset, count, out);
  });
}

template <class Z, class U, bool kGated, bool kAligned>
__global__ void __launch_bounds__(kActivationBlockCols* kActivationBlockRows)
    cats_activation_bwd_kernel(CatsActivationParams p) {
  constexpr int K = kActivationChunk<Z, U>;
  with_chunk<K>(p, [&](int64_t offset, int64_t count, const float (&t)[K]) {
    float z[K], u[K], grad[K], du[K];
    read_chunk<kAligned, K, Z>(p.z, offset, count, z);
    read_chunk<kAligned, K, U>(p.grad, offset, count, grad);
    if constexpr (kGated) read_chunk<kAligned, K, U>(p.u, offset, count, u);
    SQ_UNROLL
    for (int j = 0; j < K; ++j) {
      const float s = activate(p.activation, z[j]);
      const bool active = is_active(s, t[j], p.inclusive);
      const float ds = kGated ? grad[j] * u[j] : grad[j];
      if constexpr (kGated) du[j] = active ? grad[j] * s : 0.0f;
      z[j] = active || p.straight_through ? ds * activate_grad(p.activation, z[j]) : 0.0f;
    }
    store_chunk<kAligned>(static_cast<Z*>(p.dz) + offset, count, z);
    if constexpr (kGated) store_chunk<kAligned>(static_cast<U*>(p.du) + offset, count, du);
  });
}

enum class CatsActivationPass { kForward, kBackward };

/// Element types: Z of z and dz, U of u, du, grad and out. kGated selects cats_glu_*. Launches nothing when empty.
template <class Z, class U, bool kGated>
void cats_activation(CatsActivationPass pass, const CatsActivationParams& p, sq::stream_t stream) {
  if (p.rows == 0 || p.cols == 0) return;
  constexpr int K = kActivationChunk<Z, U>;
  bool aligned = p.cols % K == 0;
  for (const void* tensor : {p.z, p.u, p.grad, static_cast<const void*>(p.out), static_cast<const void*>(p.dz),
                             static_cast<const void*>(p.du)}) {
    aligned = aligned && is_aligned16(tensor);
  }
  const dim3 block(kActivationBlockCols, kActivationBlockRows);
  const int64_t grid = activation_columns(p, K) * ceil_div(p.rows, kActivationBlockRows);
  const auto launch = [&](auto flag) {
    if (pass == CatsActivationPass::kForward) {
      SQ_LAUNCH((cats_activation_fwd_kernel<Z, U, kGated, flag>), grid, block, 0, stream, p);
    } else {
      SQ_LAUNCH((cats_activation_bwd_kernel<Z, U, kGated, flag>), grid, block, 0, stream, p);
    }
  };
  with_flag(aligned, launch);
}

}  // namespace subquad::cuda
