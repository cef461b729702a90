// Arguments and results of causal_conv1d_{fwd,bwd} and causal_conv1d_update_. `Device` has forward, backward and update
// as run(params, dtype, tensors...), where the tensors are all that it touches, x first.
#pragma once

#include <tuple>

#include "ops/causal_conv1d/params.h"
#include "torch/checks.h"
#include "torch/unshared.h"

namespace subquad {

/// What the arguments are called in messages.
struct ConvNames {
  const char *weight = "weight", *bias = "bias";
};

/// Shapes of x [B, ..., D / G], weight and bias, which all operators share.
template <class P>
void set_channels(P& p, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t groups,
                  int64_t head_dim, bool silu, ConvNames names = {}) {
  const Anchor like_x{x, "x"};
  const int64_t taps = taps_of(weight, names.weight);
  STD_TORCH_CHECK(taps >= 1 && taps <= kConvMaxTaps, names.weight, ": expected 1 to ", kConvMaxTaps, " taps, got ",
                  taps);
  STD_TORCH_CHECK(weight.size(0) < (int64_t{1} << 31), names.weight, ": expected fewer than 2^31 channels, got ",
                  weight.size(0));
  STD_TORCH_CHECK(groups >= 1, "groups: expected >= 1, got ", groups);
  p.batch = x.size(0);
  p.inputs = x.size(x.dim() - 1);
  p.channels = weight.size(0);
  p.taps = static_cast<int>(taps);
  p.groups = groups;
  p.head_dim = head_dim;
  p.silu = silu;
  STD_TORCH_CHECK(head_dim >= 1 && p.inputs % head_dim == 0 && p.channels == p.inputs * groups,
                  "head_dim: expected a divisor of the channels of x, and groups times as many in ", names.weight,
                  ", got ", head_dim, " for ", p.inputs, " channels, ", p.channels, " in ", names.weight);
  p.weight = taps_in(weight, names.weight, p.channels, taps, like_x);
  p.bias = data_of(bias, names.bias, {p.channels}, like_x);
}

inline CausalConv1dParams conv_arguments(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                         const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                                         const OptionalTensor& sequence, int64_t groups, int64_t head_dim, bool silu,
                                         ConvNames names = {}) {
  const Anchor like_x{x, "x"};
  CausalConv1dParams p{};
  check_dims(x, "x", 3);
  set_channels(p, x, weight, bias, groups, head_dim, silu, names);
  p.time = x.size(1);
  check_last_contiguous(x, "x");
  STD_TORCH_CHECK(p.time < (int64_t{1} << 31), "x: expected fewer than 2^31 tokens, got ", p.time);
  p.x = x.const_data_ptr();
  p.x_stride_b = x.stride(0), p.x_stride_t = x.stride(1);
  p.sequences = p.batch;
  STD_TORCH_CHECK(cu_seqlens.has_value() == sequence.has_value(), "sequence: expected together with cu_seqlens");
  if (cu_seqlens.has_value()) {
    STD_TORCH_CHECK(p.batch == 1, "cu_seqlens: expected a batch of 1, got ", p.batch);
    check_dims(*cu_seqlens, "cu_seqlens", 1);
    p.sequences = cu_seqlens->size(0) - 1;
    STD_TORCH_CHECK(p.sequences > 0 || (p.sequences == 0 && p.time == 0),
                    "cu_seqlens: expected shape [N + 1] with a sequence for every token, got ",
                    shape_text(cu_seqlens->sizes()));
    p.cu_seqlens = int32_of(cu_seqlens, "cu_seqlens", {p.sequences + 1}, like_x);
    p.sequence = int32_of(sequence, "sequence", {p.time}, like_x);
  }
  p.state = data_of(initial_state, "initial_state", {p.sequences, p.inputs, p.taps - 1}, like_x);
  if (p.taps == 1) p.state = nullptr;
  return p;
}

/// The states after the last tokens, for the next call; empty where nobody wants them.
inline Tensor conv_final_state(CausalConv1dParams& p, const Tensor& x, bool wanted) {
  const Tensor final_state = empty_if(wanted, x, {p.sequences, p.inputs, p.taps - 1}, x.scalar_type());
  if (wanted) p.final_state = final_state.mutable_data_ptr();
  return final_state;
}

/// What the backward of the convolution writes; the constructor allocates it and sets its pointers. Like bias and
/// initial_state, dbias and dstate may be left out.
struct ConvGradients {
  Tensor dx, dweight, dbias, dstate, partial;

  ConvGradients(CausalConv1dParams& p, const OptionalTensor& grad_final, const Tensor& x, bool biased, bool stateful)
      : dx(empty_on(x, {p.batch, p.time, p.inputs}, x.scalar_type())),
        dweight(empty_on(x, {p.channels, p.taps}, x.scalar_type())),
        dbias(empty_on(x, {biased ? p.channels : 0}, x.scalar_type())),
        dstate(empty_if(stateful, x, {p.sequences, p.inputs, p.taps - 1}, x.scalar_type())),
        partial(empty_on(x, {p.batch, p.blocks(), p.taps + 1, p.channels}, ScalarType::Float)) {
    p.grad_final = data_of(grad_final, "grad_final", {p.sequences, p.inputs, p.taps - 1}, {x, "x"});
    if (p.taps == 1) p.grad_final = nullptr;
    p.dx = dx.mutable_data_ptr();
    p.dweight = dweight.mutable_data_ptr();
    p.partial = floats_in(partial);
    if (biased) p.dbias = dbias.mutable_data_ptr();
    if (stateful) p.dstate = dstate.mutable_data_ptr();
  }
};

template <class Device>
std::tuple<Tensor, Tensor> causal_conv1d_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                             const OptionalTensor& initial_state, const OptionalTensor& residual,
                                             const OptionalTensor& cu_seqlens, const OptionalTensor& sequence,
                                             int64_t groups, int64_t head_dim, bool silu, bool output_final_state) {
  CausalConv1dParams p = conv_arguments(x, weight, bias, initial_state, cu_seqlens, sequence, groups, head_dim, silu);
  if (residual.has_value()) {
    check_device(*residual, "residual", {x, "x"});
    check_same_dtype(*residual, "residual", {x, "x"});
    check_shape(*residual, "residual", {p.batch, p.time, p.channels});
    check_last_contiguous(*residual, "residual");
    p.residual = residual->const_data_ptr();
    p.residual_stride_b = residual->stride(0), p.residual_stride_t = residual->stride(1);
  }
  const DType dtype = dtype_of(x, "x");
  const Tensor y = empty_on(x, {p.batch, p.time, p.channels}, x.scalar_type());
  p.y = y.mutable_data_ptr();
  const Tensor final_state = conv_final_state(p, x, output_final_state);
  Device::forward(p, dtype, x, weight, bias, initial_state, residual, cu_seqlens, sequence, y, final_state);
  return {y, final_state};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_bwd(
    const Tensor& grad_y, const OptionalTensor& grad_final, const Tensor& x, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
    const OptionalTensor& sequence, int64_t groups, int64_t head_dim, bool silu) {
  CausalConv1dParams p = conv_arguments(x, weight, bias, initial_state, cu_seqlens, sequence, groups, head_dim, silu);
  p.grad_y = data_of(grad_y, "grad_y", {p.batch, p.time, p.channels}, {x, "x"});
  const DType dtype = dtype_of(x, "x");
  const ConvGradients grads(p, grad_final, x, bias.has_value(), initial_state.has_value());
  Device::backward(p, dtype, x, weight, bias, initial_state, cu_seqlens, sequence, grad_y, grad_final, grads.dx,
                   grads.dweight, grads.dbias, grads.dstate, grads.partial);
  return {grads.dx, grads.dweight, grads.dbias, grads.dstate};
}

template <class Device>
Tensor causal_conv1d_update_(const Tensor& x, const Tensor& conv_state, const Tensor& weight,
                             const OptionalTensor& bias, const OptionalTensor& residual,
                             const OptionalTensor& cache_seqlens, const OptionalTensor& conv_state_indices,
                             int64_t groups, int64_t head_dim, bool silu) {
  const Anchor like_x{x, "x"};
  CausalConv1dUpdateParams p{};
  const bool one = x.dim() == 2;  // token per row
  STD_TORCH_CHECK(one || x.dim() == 3, "x: expected shape [B, D] or [B, s, D], got ", shape_text(x.sizes()));
  set_channels(p, x, weight, bias, groups, head_dim, silu);
  check_contiguous(x, "x");
  check_device(conv_state, "conv_state", like_x);
  check_same_dtype(conv_state, "conv_state", like_x);
  check_dims(conv_state, "conv_state", 3);
  p.tokens = one ? 1 : x.size(1);
  p.x = x.const_data_ptr();
  p.states = conv_state.size(0);
  p.length = conv_state.size(2);
  check_shape(conv_state, "conv_state", {conv_state_indices.has_value() ? p.states : p.batch, p.inputs, p.length});
  STD_TORCH_CHECK(p.length < (int64_t{1} << 31), "conv_state: expected fewer than 2^31 columns, got ", p.length);
  STD_TORCH_CHECK(p.length >= p.taps - 1, "conv_state: expected at least ", p.taps - 1, " columns, got ", p.length);
  p.state_stride_n = conv_state.stride(0), p.state_stride_c = conv_state.stride(1);
  p.state_stride_l = conv_state.stride(2);
  p.residual = one ? data_of(residual, "residual", {p.batch, p.channels}, like_x)
                   : data_of(residual, "residual", {p.batch, p.tokens, p.channels}, like_x);
  p.seqlens = int32_of(cache_seqlens, "cache_seqlens", {p.batch}, like_x);
  p.indices = int32_of(conv_state_indices, "conv_state_indices", {p.batch}, like_x);
  check_unshared({{conv_state, "conv_state"}}, {{x, "x"},
                                                {weight, "weight"},
                                                {bias, "bias"},
                                                {residual, "residual"},
                                                {cache_seqlens, "cache_seqlens"},
                                                {conv_state_indices, "conv_state_indices"}});
  const DType dtype = dtype_of(x, "x");
  const Tensor y = one ? empty_on(x, {p.batch, p.channels}, x.scalar_type())
                       : empty_on(x, {p.batch, p.tokens, p.channels}, x.scalar_type());
  p.y = y.mutable_data_ptr();
  p.state = conv_state.mutable_data_ptr();
  Device::update(p, dtype, x, conv_state, weight, bias, residual, cache_seqlens, conv_state_indices, y);
  return y;
}

}  // namespace subquad
