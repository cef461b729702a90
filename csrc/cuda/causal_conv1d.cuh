// causal_conv1d on a GPU: torch-free device code and its launch.
#pragma once

#include "chunk.cuh"
#include "portable.cuh"

namespace subquad::cuda {

constexpr unsigned kCausalConv1dThreads = 256;

template <class T>
__global__ void __launch_bounds__(kCausalConv1dThreads) causal_conv1d_kernel(const T* x, const T* grad, T* out, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCausalConv1dThreads + threadIdx.x;
  if (i >= n) return;
  const float value = sq::to_float(sq::load_nc(x + i));
  const float result = grad == nullptr ? value * value : 2.0f * value * sq::to_float(sq::load_nc(grad + i));
  sq::store(out + i, sq::from_float<T>(result));
}

/// out = y in the forward pass (`grad` null), dx in the backward pass.
template <class T>
void causal_conv1d(const void* x, const void* grad, void* out, int64_t n, sq::stream_t stream) {
  if (n == 0) return;
  const int64_t blocks = ceil_div(n, kCausalConv1dThreads);
  const T *x_ = static_cast<const T*>(x), *grad_ = static_cast<const T*>(grad);
  SQ_LAUNCH(causal_conv1d_kernel<T>, blocks, kCausalConv1dThreads, 0, stream, x_, grad_, static_cast<T*>(out), n);
}

}  // namespace subquad::cuda
