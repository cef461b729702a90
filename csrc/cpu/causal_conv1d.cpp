// subquad::causal_conv1d_* on CPU tensors.
#include "cpu/causal_conv1d.h"

#include <algorithm>
#include <tuple>

#include "cpu/causal_conv1d_binding.h"
#include "cpu/isa.h"

namespace subquad::cpu {
namespace {

constexpr int64_t kSmall = 1 << 14;  // elements: waking other threads would take as long as the work

CausalConv1dKernels kernels_for(const Tensor& x) { return SQ_DISPATCH_ISA(causal_conv1d_kernels, dtype_of(x, "x")); }

constexpr int64_t kFloatBytes = sizeof(float);

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
  const CausalConv1dKernels kernels = kernels_for(x);
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
  if (grad_final.has_value()) {
    check_packed(*grad_final, "grad_final", {p.sequences, p.inputs, p.taps - 1}, x);
    p.grad_final = p.taps > 1 ? grad_final->const_data_ptr() : nullptr;
  }
  const ScalarType dtype = x.scalar_type();
  Tensor dx = empty({p.batch, p.time, p.inputs}, dtype), dweight = empty({p.channels, p.taps}, dtype);
  Tensor dbias = empty({bias.has_value() ? p.channels : 0}, dtype);
  Tensor dstate = initial_state.has_value() ? empty({p.sequences, p.inputs, p.taps - 1}, dtype) : empty({0}, dtype);
  const CausalConv1dKernels kernels = kernels_for(x);
  const Tensor weights = packed_weights(p, kernels);
  const auto* packed = static_cast<const float*>(weights.const_data_ptr());
  const Tensor partial = empty({p.batch, p.blocks(), p.taps + 1, p.channels}, ScalarType::Float);
  p.partial = static_cast<float*>(partial.mutable_data_ptr());
  advise_huge_pages(dx);
  p.dx = dx.mutable_data_ptr();
  p.dweight = dweight.mutable_data_ptr();
  if (bias.has_value()) p.dbias = dbias.mutable_data_ptr();
  const bool small = grad_y.numel() < kSmall;
  if (grad_y.numel() > 0) {
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
  if (dstate.numel() > 0) {
    p.dstate = dstate.mutable_data_ptr();
    parallel_items(p.sequences, dstate.numel() < kSmall / 4, [&](int64_t n) { kernels.state_grad(p, packed, n); });
  }
  return {dx, dweight, dbias, dstate};
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
  const CausalConv1dKernels kernels = kernels_for(x);
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
