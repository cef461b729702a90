// POD arguments of the product with quantised weights: what a binding fills in and a torch-free kernel reads.
#pragma once

#include <cstdint>

#include "common/quantised.h"

namespace subquad {

constexpr int64_t kQuantisedFewTokens = 16;  // up to which codes are streamed; contract/quantised_linear.py

/// Forward: y = x W^T + bias. Backward: y = x W with x the gradient [tokens, rows] and y that of the input [tokens,
/// columns]. Tensors named `void*` share one element type and are contiguous.
struct QuantisedLinearParams {
  const void* x;
  const uint8_t* weight;  // [rows, columns / 32 * group_bytes(format)]
  const void* bias;       // [rows] or null
  void* y;
  int64_t tokens;
  int64_t rows;
  int64_t columns;  // a multiple of 32
  QuantisedFormat format;

  SQ_HD int64_t row_bytes() const { return columns / kQuantisedGroup * group_bytes(format); }
};

}  // namespace subquad
