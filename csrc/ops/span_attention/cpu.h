// Attention to spans on a CPU, forward and backward. Torch-free.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"
#include "ops/span_attention/params.h"

namespace subquad::cpu {

/// Work is cut into items that touch no memory of each other. The bits of a row do not depend on the cuts. `scratch` is
/// private to the caller, 64-byte aligned, of the size asked for.
struct SpanAttentionForward {
  /// Many rows per key head: an item is `item_queries` consecutive queries with the heads that share a key head, of
  /// which there are B * Hkv * ceil(T / item_queries).
  int64_t (*item_queries)(const SpanAttentionParams&, int64_t threads);
  int64_t (*scratch)(const SpanAttentionParams&, int64_t queries);
  void (*run)(const SpanAttentionParams&, int64_t queries, int64_t item, void* scratch);

  /// Few rows: every span is cut into pieces, from `begin` on, whose sums are left in `parts` and merged in their
  /// order. `is_few`: which of the two. `piece_count` of a slot (of all B * T * H * spans), whose pieces follow those
  /// of the slots before it: `first_piece` has where each begins, and at its end how many there are.
  bool (*is_few)(const SpanAttentionParams&);
  int64_t (*piece_count)(const SpanAttentionParams&, int64_t slot);
  int64_t (*part_floats)(const SpanAttentionParams&);
  void (*run_piece)(const SpanAttentionParams&, int64_t slot, int64_t piece, float* part);
  void (*merge_pieces)(const SpanAttentionParams&, const int64_t* first_piece, const float* parts, int64_t row);
};

/// An item is `item_queries` consecutive queries with the heads that share a key head, B * Hkv * ceil(T / item_queries)
/// in all, or `item_keys` keys of a key head, B * Hkv * ceil(N / item_keys). Items of queries write dq, dgate,
/// dbase_out and dbase_lse, and of each softmax two terms, [B, T, H, softmaxes, 2]: by what the weights e^(score - lse)
/// are multiplied to sum up to 1, since a large lse is not exact, and c of params.h. Items of keys, which need all
/// terms and the lists of pairs of all key heads, write dk and dv.
struct SpanAttentionBackward {
  int64_t (*item_queries)(const SpanAttentionParams&, int64_t threads);
  int64_t (*query_scratch)(const SpanAttentionParams&, int64_t queries);
  void (*run_queries)(const SpanAttentionParams&, const SpanAttentionGrads&, float* terms, int64_t queries,
                      int64_t item, void* scratch);

  int64_t (*list_ints)(const SpanAttentionParams&);  // of one of the B * Hkv heads
  void (*fill_list)(const SpanAttentionParams&, int32_t* lists, int64_t head);
  int64_t (*item_keys)(const SpanAttentionParams&, int64_t threads);
  int64_t (*key_scratch)(const SpanAttentionParams&, int64_t keys);
  void (*run_keys)(const SpanAttentionParams&, const SpanAttentionGrads&, const float* terms, int32_t* lists,
                   int64_t keys, int64_t item, void* scratch);
};

SQ_KERNELS_BY_ISA(SpanAttentionForward, span_attention_forward_kernels, DType dtype)
SQ_KERNELS_BY_ISA(SpanAttentionBackward, span_attention_backward_kernels, DType dtype)

}  // namespace subquad::cpu
