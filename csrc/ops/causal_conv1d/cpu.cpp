// subquad::causal_conv1d_* on CPU tensors.
#include "ops/causal_conv1d/cpu.h"

#include <algorithm>
#include <tuple>

#include "cpu/isa.h"
#include "ops/causal_conv1d/cpu_binding.h"

namespace subquad::cpu {
namespace {

std::tuple<Tensor, Tensor> causal_conv1d_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                             const OptionalTensor& initial_state, const OptionalTensor& residual,
                                             const OptionalTensor& cu_seqlens, const OptionalTensor& sequence,
                                             int64_t groups, int64_t head_dim, bool silu, bool output_final_state) {
  CausalConv1dParams p = conv_arguments(x, weight, bias, initial_state, cu_seqlens, sequence, groups, head_dim, silu);
  if (residual.has_value()) {
    check_like(*residual, "residual", {p.batch, p.time, p.channels}, x);
    STD_TORCH_CHECK(residual->stride(2) == 1 || p.channels <= 1, "residual: expected a contiguous last dimension");
    p.residual = residual->const_data_ptr();
    p.residual_stride_b = residual->stride(0), p.residual_stride_t = residual->stride(1);
  }
  Tensor y = empty({p.batch, p.time, p.channels}, x.scalar_type());
  Tensor final_state =
      output_final_state ? empty({p.sequences, p.inputs, p.taps - 1}, x.scalar_type()) : empty({0}, x.scalar_type());
  const CausalConv1dKernels kernels = conv_kernels(x);
  if (y.numel() > 0) {
    const Tensor weights = packed_weights(p, kernels);
    const auto* packed = static_cast<const float*>(weights.const_data_ptr());
    advise_huge_pages(y);
    p.y = y.mutable_data_ptr();
    const int64_t rows = p.blocks(), slices = ceil_div(p.channels, kConvChannels), items = p.batch * rows * slices;
    const int64_t bytes = p.state == nullptr ? 0 : kConvMaxTaps * std::min(kConvChannels, p.channels) * kFloatBytes;
    parallel_items_with_scratch(items, y.numel() < kSmall, bytes, [&](int64_t i, void* scratch) {
      const int64_t slice = i % slices, t0 = i / slices % rows * kConvBlock, b = i / slices / rows;
      kernels.forward(p, packed, static_cast<float*>(scratch), b, t0, std::min(p.time, t0 + kConvBlock),
                      slice * kConvChannels, std::min(p.channels, (slice + 1) * kConvChannels));
    });
  }
  if (output_final_state && final_state.numel() > 0) {
    p.final_state = final_state.mutable_data_ptr();
    parallel_items(p.sequences, final_state.numel() < kSmall, [&](int64_t n) { kernels.final_state(p, n); });
  }
  return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_bwd(
    const Tensor& grad_y, const OptionalTensor& grad_final, const Tensor& x, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
    const OptionalTensor& sequence, int64_t groups, int64_t head_dim, bool silu) {
  CausalConv1dParams p = conv_arguments(x, weight, bias, initial_state, cu_seqlens, sequence, groups, head_dim, silu);
  check_packed(grad_y, "grad_y", {p.batch, p.time, p.channels}, x);
  p.grad_y = grad_y.const_data_ptr();
  set_grad_final(p, grad_final, x);
  const CausalConv1dKernels kernels = conv_kernels(x);
  const Tensor weights = packed_weights(p, kernels);
  return conv_backward(p, kernels, weights, x.scalar_type(), bias.has_value(), initial_state.has_value());
}

Tensor causal_conv1d_update_(const Tensor& x, const Tensor& conv_state, const Tensor& weight,
                             const OptionalTensor& bias, const OptionalTensor& residual,
                             const OptionalTensor& cache_seqlens, const OptionalTensor& conv_state_indices,
                             int64_t groups, int64_t head_dim, bool silu) {
  CausalConv1dUpdateParams p{};
  set_channels(p, x, weight, bias, groups, head_dim, silu);
  check_contiguous(x, "x");
  p.tokens = x.size(1);
  p.x = x.const_data_ptr();
  STD_TORCH_CHECK(conv_state.dim() == 3 && conv_state.scalar_type() == x.scalar_type() &&
                      conv_state.size(1) == p.inputs && conv_state.size(2) >= p.taps - 1,
                  "conv_state: expected shape [P, ", p.inputs, ", L >= ", p.taps - 1, "] in the dtype of x");
  p.states = conv_state.size(0);
  p.length = conv_state.size(2);
  STD_TORCH_CHECK(conv_state_indices.has_value() || p.states == p.batch, "conv_state: expected ", p.batch, " states");
  p.state_stride_n = conv_state.stride(0), p.state_stride_c = conv_state.stride(1);
  p.state_stride_l = conv_state.stride(2);
  p.seqlens = integers(cache_seqlens, "cache_seqlens", p.batch);
  p.indices = integers(conv_state_indices, "conv_state_indices", p.batch);
  if (residual.has_value()) {
    check_packed(*residual, "residual", {p.batch, p.tokens, p.channels}, x);
    p.residual = residual->const_data_ptr();
  }
  Tensor y = empty({p.batch, p.tokens, p.channels}, x.scalar_type());
  if (y.numel() == 0) return y;
  p.y = y.mutable_data_ptr();
  p.state = conv_state.mutable_data_ptr();
  const CausalConv1dKernels kernels = conv_kernels(x);
  constexpr int64_t kSlice = 512;
  const int64_t slices = ceil_div(p.inputs, kSlice);
  parallel_items(p.batch * slices, y.numel() < kSmall / 2, [&](int64_t i) {
    const int64_t c0 = i % slices * kSlice;
    kernels.update(p, i / slices, c0, std::min(p.inputs, c0 + kSlice));
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subquad, CPU, m) {
  m.impl("causal_conv1d_fwd", TORCH_BOX(&causal_conv1d_fwd));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&causal_conv1d_bwd));
  m.impl("causal_conv1d_update_", TORCH_BOX(&causal_conv1d_update_));
}

}  // namespace subquad::cpu
