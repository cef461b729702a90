// POD arguments of the gated MLP on quantised weights: what a binding fills in and a torch-free kernel reads.
#pragma once

#include <cstdint>

#include "common/activations.h"
#include "common/quantised.h"

namespace subquad {

constexpr int64_t kQuantisedCatsMaxTokens = 16;

/// One sparse call: y = (act(x Wg^T + bg) masked) * (x Wu^T + bu) Wd^T + bd. All three weights have a row for every
/// neuron: of `hidden` weights, its codes, scales and minima in one run of bytes. With down_scales a row of w_down is
/// its codes alone, and 32 neurons share a row of scales and, if the format has them, minima.
/// Tensors named `void*` share one element type (fp32, bf16 or fp16) and are contiguous.
struct QuantisedCatsMlpParams {
  const void* x;               // [tokens, hidden]
  const uint8_t* w_gate;       // [intermediate, row_bytes(gate)]
  const uint8_t* w_up;         // [intermediate, row_bytes(up)]
  const uint8_t* w_down;       // [intermediate, row_bytes(down), or the codes' bytes alone]
  const uint8_t* down_scales;  // [intermediate / 32, hidden fp16 scales, hidden fp16 minima], or null
  const float* threshold;      // threshold of neuron i at i * threshold_stride
  const void* b_gate;          // [intermediate] or null
  const void* b_up;            // [intermediate] or null
  const void* b_down;          // [hidden] or null
  void* y;                     // [tokens, hidden]
  bool* mask;                  // [tokens, intermediate]
  int64_t tokens;              // 0 .. kQuantisedCatsMaxTokens
  int64_t hidden;              // a multiple of 32
  int64_t intermediate;        // a multiple of 32 with down_scales
  int64_t threshold_stride;
  QuantisedFormat gate;
  QuantisedFormat up;
  QuantisedFormat down;
  Activation activation;
  bool inclusive;
  bool union_mask;

  SQ_HD int64_t groups() const { return hidden / kQuantisedGroup; }
  SQ_HD int64_t down_row_bytes() const {
    return groups() * (down_scales == nullptr ? group_bytes(down) : code_bytes(down));
  }
};

}  // namespace subquad
