// Causal convolution and feature map in one pass, on a CPU. Torch-free.
#pragma once

#include <cstdint>

#include "common/conv_feature_map_params.h"
#include "cpu/dtype.h"

namespace subquad::cpu {

/// `packed` is that of CausalConv1dKernels.
struct ConvFeatureMapKernels {
  int64_t (*scratch_bytes)(const ConvFeatureMapParams&);
  /// Rows [t0, t1) of one row of the batch and one head of the result.
  void (*forward)(const ConvFeatureMapParams&, const float* packed, int64_t b, int64_t t0, int64_t t1, int64_t head,
                  void* scratch);
};

#define SQ_DECLARE(isa)                                        \
  namespace isa {                                              \
  ConvFeatureMapKernels conv_feature_map_kernels(DType dtype); \
  }
SQ_DECLARE(baseline)
SQ_DECLARE(v3)
SQ_DECLARE(v4)
SQ_DECLARE(v4_bf16)
#undef SQ_DECLARE

}  // namespace subquad::cpu
