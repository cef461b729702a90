// Feature maps of linear attention on a CPU. Torch-free.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"
#include "ops/feature_map/params.h"

namespace subquad::cpu {

/// Work on one head at a time; `scratch` has `scratch_bytes` and belongs to the caller's thread.
struct FeatureMapKernels {
  int64_t (*scratch_bytes)(const FeatureMapParams&, bool backward);
  void (*forward)(const FeatureMapParams&, int64_t head, int64_t begin, int64_t end, void* scratch);
  /// dx of one chunk of rows, and its sum of the weight's gradient into `partials`.
  void (*backward)(const FeatureMapParams&, int64_t head, int64_t chunk, void* scratch);
  /// dweight of one matrix from the partial sums, in their order.
  void (*reduce)(const FeatureMapParams&, int64_t index);
};

SQ_KERNELS_BY_ISA(FeatureMapKernels, feature_map_kernels, DType dtype)

}  // namespace subquad::cpu
