// Thresholded activation and gated unit on a CPU, elementwise over [rows, cols]. Torch-free.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "ops/cats_activation/params.h"

namespace subquad::cpu {

/// One pass over rows [begin, end). `glu` selects h = a * u, with `u` and `out` of another element type than `z`.
struct CatsActivationKernels {
  void (*forward)(const CatsActivationParams&, int64_t begin, int64_t end);
  void (*backward)(const CatsActivationParams&, int64_t begin, int64_t end);
};

#define SQ_DECLARE(isa)                                            \
  namespace isa {                                                  \
  CatsActivationKernels cats_activation_kernels(DType z, DType u); \
  }
SQ_DECLARE(baseline)
SQ_DECLARE(v3)
SQ_DECLARE(v4)
SQ_DECLARE(v4_bf16)
#undef SQ_DECLARE

}  // namespace subquad::cpu
