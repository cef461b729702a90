// A streaming cache's step on a CPU. Torch-free.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"
#include "ops/sink_attention_step/params.h"

namespace subquad::cpu {

/// Every function is called for all its items before the next one is. Items touch no memory of each other, and how the
/// work is cut depends on shapes alone. `shared` is one piece of floats for all; `scratch` is private to the caller and
/// 64-byte aligned. Both have the sizes asked for.
struct SinkAttentionStepKernels {
  int64_t (*shared_floats)(const SinkAttentionStepParams&);
  void (*prepare)(const SinkAttentionStepParams&, float* shared);

  int64_t (*scratch_bytes)(const SinkAttentionStepParams&);
  int64_t (*items)(const SinkAttentionStepParams&);
  void (*attend)(const SinkAttentionStepParams&, float* shared, int64_t item, void* scratch);

  /// An item of these is a key head of a row: the shares of its keys become results (no items where there is one
  /// share),
  int64_t (*merges)(const SinkAttentionStepParams&);
  void (*merge)(const SinkAttentionStepParams&, const float* shared, int64_t item);

  /// and the new tokens enter the cache. Counters are left alone.
  void (*write)(const SinkAttentionStepParams&, int64_t item);
};

SQ_KERNELS_BY_ISA(SinkAttentionStepKernels, sink_attention_step_kernels, DType dtype, RingKind kind)

}  // namespace subquad::cpu
