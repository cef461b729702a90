// The product with quantised weights on a CPU: what the binding and the kernels per instruction set agree on.
// Torch-free.
//
// A few tokens are bound by reading the codes: rows are streamed and widened in registers, and a token's result does
// not depend on the others. More tokens, and gradients, are bound by arithmetic: blocks of rows are dequantised into
// the cache and meet a panel of tokens there. Every element of a result has one order of additions, whoever computes
// it.
#pragma once

#include "common/dtype.h"
#include "cpu/isa.h"
#include "ops/quantised_linear/params.h"

namespace subquad::cpu {

constexpr int64_t kPanelTokens = 512;

/// The left operand of a call as floats.
struct QuantisedLinearScratch {
  float* x;       // [round_up(tokens, 4), ld_x], zeros behind the tokens
  float* planes;  // [round_up(tokens, 4), ld_planes], for `few` where codes have four bits, else null
  int64_t ld_x, ld_planes;
};

/// Calls on disjoint tokens or items may run concurrently.
struct QuantisedLinearKernels {
  using Pack = void (*)(const QuantisedLinearParams&, const QuantisedLinearScratch&, int64_t width, int64_t token);
  using Items = int64_t (*)(const QuantisedLinearParams&);
  using Run = void (*)(const QuantisedLinearParams&, const QuantisedLinearScratch&, int64_t item, void* own);
  Pack pack;  // a token, `width` elements of x, to floats, and planes
  Items few_items, items, gradient_items;
  Run few, many, gradient;
  int64_t (*planes_floats)(int64_t groups);  // of a token
  int64_t own_bytes;                         // of a thread, for `many` and `gradient`
};

SQ_KERNELS_BY_ISA(QuantisedLinearKernels, quantised_linear_kernels, DType dtype)

}  // namespace subquad::cpu
