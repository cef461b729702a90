// span_attention on a GPU: torch-free device code and its launch.
#pragma once

#include "cuda/chunk.cuh"
#include "cuda/portable.cuh"
#include "ops/span_attention/params.h"

namespace subquad::cuda {

constexpr unsigned kSpanAttentionThreads = 256;

template <class T>
__global__ void __launch_bounds__(kSpanAttentionThreads) span_attention_kernel(const T* x, const T* grad, T* out, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSpanAttentionThreads + threadIdx.x;
  if (i >= n) return;
  const float value = sq::to_float(sq::load_nc(x + i));
  const float result = grad == nullptr ? value * value : 2.0f * value * sq::to_float(sq::load_nc(grad + i));
  sq::store(out + i, sq::from_float<T>(result));
}

template <class T>
void span_attention(const SpanAttentionParams& p, sq::stream_t stream) {
  if (p.n == 0) return;
  const int64_t blocks = ceil_div(p.n, kSpanAttentionThreads);
  const T *x = static_cast<const T*>(p.x), *grad = static_cast<const T*>(p.grad);
  SQ_LAUNCH(span_attention_kernel<T>, blocks, kSpanAttentionThreads, 0, stream, x, grad, static_cast<T*>(p.out), p.n);
}

}  // namespace subquad::cuda
