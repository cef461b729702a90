// Feature maps of linear attention on a CPU. Torch-free.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
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

#define SQ_DECLARE(isa)                               \
  namespace isa {                                     \
  FeatureMapKernels feature_map_kernels(DType dtype); \
  }
SQ_DECLARE(baseline)
SQ_DECLARE(v3)
SQ_DECLARE(v4)
SQ_DECLARE(v4_bf16)
#undef SQ_DECLARE

}  // namespace subquad::cpu
