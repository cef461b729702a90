// The search for spans on a CPU, forward and backward. Torch-free.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"
#include "ops/span_search/params.h"

namespace subquad::cpu {

/// Work is cut into items that touch no memory of each other. The bits of a row do not depend on the cuts. `scratch` is
/// private to the caller, 64-byte aligned, of the size asked for.
struct SpanSearchKernels {
  /// An item is some consecutive queries of the heads that share a key head and all stripes, or where that is few
  /// items, a range of the stripes: it leaves what it found in `parts`, of as many floats as asked for, and `merge`
  /// makes the results of (b, t, h) [begin, end) of them. No part: the results are written.
  int64_t (*items)(const SpanSearchParams&);
  int64_t (*part_floats)(const SpanSearchParams&);
  int64_t (*scratch)(const SpanSearchParams&);
  void (*run)(const SpanSearchParams&, int64_t item, float* parts, void* scratch);
  void (*merge)(const SpanSearchParams&, const float* parts, int64_t begin, int64_t end);

  /// dq of (b, t, h) [begin, end).
  void (*dq)(const SpanSearchGrads&, int64_t begin, int64_t end);
  /// Of one (batch entry, key head) `sequence`: `pairs`, the (t, head of the group, slot) that chose a key, sorted by
  /// the key and where that is the same in their own order, T * H / Hkv * spans of them at most; those of key j end
  /// where ends[j] says.
  void (*sort)(const SpanSearchGrads&, int64_t sequence, int64_t* pairs, int64_t* ends);
  /// dk of keys [begin, end) of a sequence, from its sorted pairs.
  void (*dk)(const SpanSearchGrads&, int64_t sequence, const int64_t* pairs, const int64_t* ends, int64_t begin,
             int64_t end);
};

SQ_KERNELS_BY_ISA(SpanSearchKernels, span_search_kernels, DType dtype)

}  // namespace subquad::cpu
