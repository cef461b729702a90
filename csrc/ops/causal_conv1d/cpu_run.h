// The work of the causal convolution in items for threads, for the bindings of the ops that have it.
#pragma once

#include <algorithm>

#include "common/integers.h"
#include "cpu/threads.h"
#include "ops/causal_conv1d/cpu.h"

namespace subquad::cpu {

constexpr int64_t kConvSmall = 1 << 14;  // elements: waking other threads would take as long as the work
constexpr int64_t kFloatBytes = sizeof(float);

inline CausalConv1dKernels conv_kernels(DType dtype, bool wide_gradient = false) {
  return SQ_DISPATCH_ISA(causal_conv1d_kernels, dtype, wide_gradient);
}

/// Floats of `packed`.
inline int64_t packed_size(const CausalConv1dParams& p) { return (p.taps + 1) * p.channels; }

inline void conv_final_states(const CausalConv1dParams& p, const CausalConv1dKernels& kernels) {
  const int64_t elements = p.sequences * p.inputs * (p.taps - 1);
  if (p.final_state == nullptr || elements == 0) return;
  parallel_items(p.sequences, elements < kConvSmall, [&](int64_t n) { kernels.final_state(p, n); });
}

/// Gradients of a call whose arguments and pointers are set.
inline void conv_backward(const CausalConv1dParams& p, const CausalConv1dKernels& kernels, const float* packed,
                          int64_t element_size) {
  advise_huge_pages(p.dx, p.batch * p.time * p.inputs * element_size);
  const int64_t elements = p.batch * p.time * p.channels;
  const bool small = elements < kConvSmall;
  if (elements > 0) {
    const int64_t width = p.groups == 1 ? p.inputs : p.head_dim, slices = ceil_div(width, kConvBackChannels);
    const int64_t heads = p.inputs / width, rows = p.blocks(), items = p.batch * rows * heads * slices;
    const int64_t bytes = (kConvMaxTaps + kConvTile) * std::min(kConvBackChannels, width) * kFloatBytes;
    parallel_items_with_scratch(items, small, bytes, [&](int64_t i, void* scratch) {
      const int64_t slice = i % slices, head = i / slices % heads, block = i / slices / heads % rows;
      const int64_t c0 = head * width + slice * kConvBackChannels;
      kernels.backward(p, packed, static_cast<float*>(scratch), i / slices / heads / rows, block, c0,
                       std::min((head + 1) * width, c0 + kConvBackChannels));
    });
  }
  constexpr int64_t kSlice = 128;
  parallel_items(ceil_div(p.channels, kSlice), small,
                 [&](int64_t i) { kernels.reduce(p, i * kSlice, std::min(p.channels, (i + 1) * kSlice)); });
  const int64_t state = p.sequences * p.inputs * (p.taps - 1);
  if (p.dstate == nullptr || state == 0) return;
  parallel_items(p.sequences, state < kConvSmall / 4, [&](int64_t n) { kernels.state_grad(p, packed, n); });
}

}  // namespace subquad::cpu
