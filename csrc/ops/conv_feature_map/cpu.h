// Causal convolution and feature map in one pass, on a CPU. Torch-free.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"
#include "ops/conv_feature_map/params.h"

namespace subquad::cpu {

/// Work on one head of the result at a time. `packed` is that of CausalConv1dKernels; `scratch` has `scratch_bytes` and
/// belongs to the caller's thread.
struct ConvFeatureMapKernels {
  int64_t (*scratch_bytes)(const ConvFeatureMapParams&, bool backward);
  /// Rows [t0, t1) of one row of the batch.
  void (*forward)(const ConvFeatureMapParams&, const float* packed, int64_t b, int64_t t0, int64_t t1, int64_t head,
                  void* scratch);
  /// dy of one chunk of rows, and its sum of the matrix's gradient into `partials`.
  void (*backward)(const ConvFeatureMapParams&, const float* packed, int64_t chunk, int64_t head, void* scratch);
  /// dweight of one matrix from the partial sums, in their order.
  void (*reduce)(const ConvFeatureMapParams&, int64_t index);
};

SQ_KERNELS_BY_ISA(ConvFeatureMapKernels, conv_feature_map_kernels, DType dtype)

}  // namespace subquad::cpu
