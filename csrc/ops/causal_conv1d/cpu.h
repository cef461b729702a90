// Causal depthwise convolution on a CPU, forward, backward and one decoding step. Torch-free.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"
#include "ops/causal_conv1d/params.h"

namespace subquad::cpu {

/// `packed` is [taps + 1, channels]: the weights in float, one row per tap, and the bias (or zeros).
struct CausalConv1dKernels {
  void (*pack)(const CausalConv1dParams&, float* packed);
  /// Rows [t0, t1) of one row of the batch, output channels [c0, c1). `scratch`: kConvMaxTaps floats per channel,
  /// needed with a state only.
  void (*forward)(const CausalConv1dParams&, const float* packed, float* scratch, int64_t b, int64_t t0, int64_t t1,
                  int64_t c0, int64_t c1);
  /// dx and the partial sums of one block of kConvBlock tokens, input channels [c0, c1) of one head.
  /// `scratch`: kConvMaxTaps + kConvTile floats per channel.
  void (*backward)(const CausalConv1dParams&, const float* packed, float* scratch, int64_t b, int64_t block, int64_t c0,
                   int64_t c1);
  /// dweight and dbias of channels [c0, c1) from all partial sums.
  void (*reduce)(const CausalConv1dParams&, int64_t c0, int64_t c1);
  void (*final_state)(const CausalConv1dParams&, int64_t n);
  void (*state_grad)(const CausalConv1dParams&, const float* packed, int64_t n);
  /// Input channels [c0, c1) of one head, at most kConvUpdateChannels, for rows [b0, b1). `scratch`: taps + 1 floats
  /// per output channel.
  void (*update)(const CausalConv1dUpdateParams&, float* scratch, int64_t b0, int64_t b1, int64_t c0, int64_t c1);
};

// Rows that a register window walks down before the next channels, and channels of one work item at most.
constexpr int64_t kConvRows = 8, kConvChannels = 2048;
constexpr int64_t kConvTile = 16, kConvBackChannels = 512;
constexpr int64_t kConvUpdateChannels = 256;

// wide_gradient: grad_y is float whatever the other elements are.
SQ_KERNELS_BY_ISA(CausalConv1dKernels, causal_conv1d_kernels, DType dtype, bool wide_gradient)

}  // namespace subquad::cpu
