// LAWCAT's decoding step on a CPU. Torch-free.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "ops/lawcat_decode_step/params.h"

namespace subquad::cpu {

/// Key head `item / batch` of row `item % batch`, with all states and queries that hang on it: rows that share the
/// weights of a head come one after the other.
using LawcatDecodeStepKernel = void (*)(const LawcatDecodeStepParams&, int64_t item);

#define SQ_DECLARE(isa)                                          \
  namespace isa {                                                \
  LawcatDecodeStepKernel lawcat_decode_step_kernel(DType dtype); \
  }
SQ_DECLARE(baseline)
SQ_DECLARE(v3)
SQ_DECLARE(v4)
SQ_DECLARE(v4_bf16)
#undef SQ_DECLARE

}  // namespace subquad::cpu
