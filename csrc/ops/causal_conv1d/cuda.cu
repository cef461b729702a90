// Binding of causal_conv1d_{fwd,bwd} and causal_conv1d_update_.
#include "ops/causal_conv1d/cuda.cuh"

#include <tuple>

#include "ops/causal_conv1d/cuda_binding.h"

namespace subquad::cuda {
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
  const Tensor y = empty_on(x, {p.batch, p.time, p.channels}, x.scalar_type());
  const Tensor final_state = output_final_state ? empty_on(x, {p.sequences, p.inputs, p.taps - 1}, x.scalar_type())
                                                : empty_on(x, {0}, x.scalar_type());
  const LaunchScope scope(x, weight, bias, initial_state, residual, cu_seqlens, sequence, y, final_state);
  p.y = y.mutable_data_ptr();
  if (output_final_state) p.final_state = final_state.mutable_data_ptr();
  dispatch_dtype(x, "x", [&](auto element) { causal_conv1d_forward<decltype(element)>(p, scope.stream()); });
  return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_bwd(
    const Tensor& grad_y, const OptionalTensor& grad_final, const Tensor& x, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
    const OptionalTensor& sequence, int64_t groups, int64_t head_dim, bool silu) {
  CausalConv1dParams p = conv_arguments(x, weight, bias, initial_state, cu_seqlens, sequence, groups, head_dim, silu);
  p.grad_y = packed_pointer(grad_y, "grad_y", {p.batch, p.time, p.channels}, x);
  const ConvGradients grads(p, grad_final, x, bias.has_value(), initial_state.has_value());
  const LaunchScope scope(x, weight, bias, initial_state, cu_seqlens, sequence, grad_y, grad_final, grads.dx,
                          grads.dweight, grads.dbias, grads.dstate, grads.partial);
  dispatch_dtype(x, "x", [&](auto element) {
    using T = decltype(element);
    causal_conv1d_backward<T, T>(p, scope.stream());
  });
  return {grads.dx, grads.dweight, grads.dbias, grads.dstate};
}

Tensor causal_conv1d_update_(const Tensor& x, const Tensor& conv_state, const Tensor& weight,
                             const OptionalTensor& bias, const OptionalTensor& residual,
                             const OptionalTensor& cache_seqlens, const OptionalTensor& conv_state_indices,
                             int64_t groups, int64_t head_dim, bool silu) {
  CausalConv1dUpdateParams p{};
  set_channels(p, x, weight, bias, groups, head_dim, silu);
  check_contiguous(x, "x");
  check_same_device(conv_state, "conv_state", x, "x");
  check_same_dtype(conv_state, "conv_state", x, "x");
  check_dims(conv_state, "conv_state", 3);
  p.tokens = x.size(1);
  p.x = x.const_data_ptr();
  p.states = conv_state.size(0);
  p.length = conv_state.size(2);
  check_shape(conv_state, "conv_state", {conv_state_indices.has_value() ? p.states : p.batch, p.inputs, p.length});
  STD_TORCH_CHECK(p.length < (int64_t{1} << 31), "conv_state: expected fewer than 2^31 columns");
  STD_TORCH_CHECK(p.length >= p.taps - 1, "conv_state: expected at least ", p.taps - 1, " columns, got ", p.length);
  p.state_stride_n = conv_state.stride(0), p.state_stride_c = conv_state.stride(1);
  p.state_stride_l = conv_state.stride(2);
  p.residual = packed_pointer(residual, "residual", {p.batch, p.tokens, p.channels}, x);
  p.seqlens = integers(cache_seqlens, "cache_seqlens", p.batch, x);
  p.indices = integers(conv_state_indices, "conv_state_indices", p.batch, x);
  const Tensor y = empty_on(x, {p.batch, p.tokens, p.channels}, x.scalar_type());
  const LaunchScope scope(x, conv_state, weight, bias, residual, cache_seqlens, conv_state_indices, y);
  p.y = y.mutable_data_ptr();
  p.state = conv_state.mutable_data_ptr();
  dispatch_dtype(x, "x", [&](auto element) { causal_conv1d_step<decltype(element)>(p, scope.stream()); });
  return y;
}

}  // namespace
}  // namespace subquad::cuda

SQ_REGISTER_OPS(m) {
  m.impl("causal_conv1d_fwd", TORCH_BOX(&subquad::cuda::causal_conv1d_fwd));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&subquad::cuda::causal_conv1d_bwd));
  m.impl("causal_conv1d_update_", TORCH_BOX(&subquad::cuda::causal_conv1d_update_));
}
