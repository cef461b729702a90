// span_search on a GPU: torch-free device code and its launch.
#pragma once

#include "cuda/chunk.cuh"
#include "cuda/portable.cuh"
#include "ops/span_search/params.h"

namespace subquad::cuda {

constexpr unsigned kSpanSearchThreads = 256;

template <class T>
__global__ void __launch_bounds__(kSpanSearchThreads) span_search_kernel(const T* x, const T* grad, T* out, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSpanSearchThreads + threadIdx.x;
  if (i >= n) return;
  const float value = sq::to_float(sq::load_nc(x + i));
  const float result = grad == nullptr ? value * value : 2.0f * value * sq::to_float(sq::load_nc(grad + i));
  sq::store(out + i, sq::from_float<T>(result));
}

template <class T>
void span_search(const SpanSearchParams& p, sq::stream_t stream) {
  if (p.n == 0) return;
  const int64_t blocks = ceil_div(p.n, kSpanSearchThreads);
  const T *x = static_cast<const T*>(p.x), *grad = static_cast<const T*>(p.grad);
  SQ_LAUNCH(span_search_kernel<T>, blocks, kSpanSearchThreads, 0, stream, x, grad, static_cast<T*>(p.out), p.n);
}

}  // namespace subquad::cuda
