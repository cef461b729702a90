// Gated linear attention on a CPU, forward, backward and one decoding step. Torch-free.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"
#include "ops/gated_linear_attention/params.h"

namespace subquad::cpu {

/// Work is cut into items that touch no memory of each other; the cuts depend on shapes alone. `scratch` is private to
/// the caller, 64-byte aligned, of the size asked for.
struct GatedLinearAttentionKernels {
  int64_t (*forward_items)(const GatedLinearAttentionParams&);
  int64_t (*forward_scratch)(const GatedLinearAttentionParams&);
  void (*forward)(const GatedLinearAttentionParams&, int64_t item, void* scratch);

  /// The states p.s0 and p.z0 into what `forward` with p.local left: q and gates alone are read, o, sums and den
  /// changed.
  int64_t (*enter_items)(const GatedLinearAttentionParams&);
  int64_t (*enter_scratch)(const GatedLinearAttentionParams&);
  void (*enter)(const GatedLinearAttentionParams&, int64_t item, void* scratch);

  int64_t (*backward_items)(const GatedLinearAttentionParams&);
  int64_t (*backward_scratch)(const GatedLinearAttentionParams&);
  void (*backward)(const GatedLinearAttentionParams&, const GatedLinearAttentionGrads&, int64_t item, void* scratch);

  /// Columns [first, first + count) of state head `item % states` of row `item / states`, and z. Where others do other
  /// columns of it, `step_totals` first moves z and leaves 1 / denominators in `inverses` [B, Hq]; else those are null.
  void (*step_totals)(const GlaStepParams&, int64_t item, float* inverses);
  void (*step)(const GlaStepParams&, int64_t item, int64_t first, int64_t count, const float* inverses);
};

SQ_KERNELS_BY_ISA(GatedLinearAttentionKernels, gated_linear_attention_kernels, DType dtype)

}  // namespace subquad::cpu
