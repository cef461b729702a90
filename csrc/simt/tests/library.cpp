// What test_simt.py calls through ctypes: a launch in a shared library, on whichever OS thread Python is on.
#include "../../cuda/portable.cuh"

namespace {

__global__ void scale(const float* x, float* y, float factor, int n) {
  SQ_SHARED(float, staged, 64);
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) staged[63 - threadIdx.x] = factor * sq::load(x + i);
  __syncthreads();
  if (i < n) sq::store(y + i, staged[63 - threadIdx.x]);
}

}  // namespace

/// y = factor * x, for n floats; 0, or 1 when the launch failed.
extern "C" __attribute__((visibility("default"))) int simt_test_scale(const float* x, float* y, float factor, int n) {
  try {
    SQ_LAUNCH(scale, (n + 63) / 64, 64, 0, nullptr, x, y, factor, n);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
