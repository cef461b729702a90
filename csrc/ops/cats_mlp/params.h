// POD arguments of the gated MLP: what a binding fills in and a torch-free kernel reads. All strides are in elements.
#pragma once

#include <cstdint>

#include "common/activations.h"

namespace subquad {

constexpr int64_t kCatsMaxTokens = 16;

/// One sparse gated MLP call: y = (act(x Wg^T + bg) masked) * (x Wu^T + bu) Wd^T + bd.
/// Tensors named `void*` share one element type (fp32, bf16 or fp16), which the kernel template fixes.
struct CatsMlpParams {
  const void* x;           // [tokens, hidden], contiguous
  const void* w_gate;      // [intermediate, hidden], rows ld_gate apart
  const void* w_up;        // [intermediate, hidden], rows ld_up apart
  const void* w_down;      // [hidden, intermediate]: column i at i * ld_down if neuron_major, else row c at c * ld_down
  const float* threshold;  // threshold of neuron i at i * threshold_stride
  const void* b_gate;      // [intermediate] or null
  const void* b_up;        // [intermediate] or null
  const void* b_down;      // [hidden] or null
  void* y;                 // [tokens, hidden], contiguous
  int64_t tokens;          // 0 .. kCatsMaxTokens
  int64_t hidden;
  int64_t intermediate;
  int64_t ld_gate;
  int64_t ld_up;
  int64_t ld_down;
  int64_t threshold_stride;
  Activation activation;
  bool inclusive;
  bool union_mask;
  bool neuron_major;
};

}  // namespace subquad
