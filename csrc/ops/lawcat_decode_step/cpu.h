// LAWCAT's decoding step on a CPU. Torch-free.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"
#include "ops/lawcat_decode_step/params.h"

namespace subquad::cpu {

/// Key head `item / batch` of row `item % batch`, with all states and queries that hang on it: rows that share the
/// weights of a head come one after the other.
using LawcatDecodeStepKernel = void (*)(const LawcatDecodeStepParams&, int64_t item);

SQ_KERNELS_BY_ISA(LawcatDecodeStepKernel, lawcat_decode_step_kernel, DType dtype)

}  // namespace subquad::cpu
