// Thresholded activation and gated unit on a CPU, elementwise over [rows, cols]. Torch-free.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"
#include "ops/cats_activation/params.h"

namespace subquad::cpu {

/// One pass over rows [begin, end). `glu` selects h = a * u, with `u` and `out` of another element type than `z`.
struct CatsActivationKernels {
  void (*forward)(const CatsActivationParams&, int64_t begin, int64_t end);
  void (*backward)(const CatsActivationParams&, int64_t begin, int64_t end);
};

SQ_KERNELS_BY_ISA(CatsActivationKernels, cats_activation_kernels, DType z, DType u)

}  // namespace subquad::cpu
