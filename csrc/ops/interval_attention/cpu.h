// Interval attention on a CPU, forward and backward. Torch-free.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"
#include "ops/interval_attention/params.h"

namespace subquad::cpu {

/// Work is cut into items that touch no memory of each other; the cuts depend on shapes alone. `scratch` is private to
/// the caller, 64-byte aligned, of the size asked for.
struct IntervalAttentionKernels {
  /// Where the rows of a head are one tile, its keys are cut into ranges, whose sums are merged in their order, after
  /// the sinks. Where heads are few, each range is an item and leaves its sums in `parts`, of as many floats as asked
  /// for, and `merge_parts` makes the results of (head, row of the head) pairs [begin, end) of them. Where heads are
  /// many, an item takes all ranges of one head and merges them itself: the same bits. No part: the results are
  /// written.
  int64_t (*forward_items)(const IntervalAttentionParams&);
  int64_t (*part_floats)(const IntervalAttentionParams&);
  int64_t (*forward_scratch)(const IntervalAttentionParams&);
  void (*forward)(const IntervalAttentionParams&, int64_t item, float* parts, void* scratch);
  void (*merge_parts)(const IntervalAttentionParams&, float* parts, int64_t begin, int64_t end);

  /// grads.delta of (position, head) pairs [begin, end); before any `backward`.
  void (*delta)(const IntervalAttentionParams&, const IntervalAttentionGrads&, int64_t begin, int64_t end);

  /// The keys of a head are cut into ranges, whose shares of dq are summed in their order. Where heads are few, each
  /// range is an item and leaves its share in `parts`, of as many floats as asked for, and `sum_dq` makes dq of
  /// (position, head) pairs [begin, end) of them. Where heads are many, an item takes all ranges of one head and sums
  /// in one part: the same bits. No part: dq is written.
  int64_t (*backward_items)(const IntervalAttentionParams&);
  int64_t (*dq_floats)(const IntervalAttentionParams&);
  int64_t (*backward_scratch)(const IntervalAttentionParams&, const IntervalAttentionGrads&);
  void (*backward)(const IntervalAttentionParams&, const IntervalAttentionGrads&, int64_t item, float* parts,
                   void* scratch);
  void (*sum_dq)(const IntervalAttentionParams&, const IntervalAttentionGrads&, float* parts, int64_t begin,
                 int64_t end);
};

SQ_KERNELS_BY_ISA(IntervalAttentionKernels, interval_attention_kernels, DType dtype)

}  // namespace subquad::cpu
