// POD arguments of the feature map kernels. All strides are in elements.
#pragma once

#include <cstdint>

namespace subquad {

/// Codes of `kind`, in the order of subquad.reference.feature_map.KINDS.
enum class FeatureKind : int { kSoftmax = 0, kExp = 1, kRelu = 2, kElu1 = 3, kHedgehog2 = 4 };

constexpr int64_t kFeatureKindCount = 5;
constexpr int64_t kFeatureMaxDim = 256;  // of d and of f
constexpr int64_t kFeatureTile = 32;     // chunks of time are multiples of it

/// One call over rows = batch * time tokens. Tensors named `void*` share one element type, which the kernel fixes.
struct FeatureMapParams {
  const void* x;         // [batch, time, heads, d], elements of a row contiguous, the other strides below
  const void* weight;    // [heads / sharing, d, f] contiguous; null: y is x, and f is d
  const void* grad_out;  // [batch, time, heads, features] contiguous, backward only
  void* out;             // likewise, forward only
  void* dx;              // [batch, time, heads, d] contiguous, backward only
  void* dweight;         // like weight, backward with a weight only
  float* partials;       // [chunks, heads, d, f], backward with a weight only
  int64_t rows;
  int64_t time;
  int64_t heads;
  int64_t sharing;  // heads in a row that use one matrix
  int64_t d;
  int64_t f;
  int64_t features;  // 2 f with both halves, else f
  int64_t x_batch;
  int64_t x_time;
  int64_t x_head;
  int64_t chunk;   // rows that one partial sum of the weight's gradient covers
  int64_t chunks;  // how many of them
  FeatureKind kind;
  bool fullspace;
  float eps;  // -inf where nothing is clamped
};

/// Rows per partial sum: a function of the shape alone, so that the order of additions is too. At most 16 sums.
constexpr int64_t feature_map_chunk(int64_t rows) {
  const int64_t sixteenth = (rows + 15) / 16, least = sixteenth < 256 ? 256 : sixteenth;
  return (least + kFeatureTile - 1) / kFeatureTile * kFeatureTile;
}

}  // namespace subquad
