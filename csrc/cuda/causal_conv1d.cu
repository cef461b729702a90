// Binding of causal_conv1d_{fwd,bwd} and causal_conv1d_update_.
#include "causal_conv1d.cuh"

#include <tuple>

#include "binding.h"

namespace subquad::cuda {
namespace {

void check_like(const Tensor& t, const char* name, std::initializer_list<int64_t> shape, const Tensor& x) {
  check_same_device(t, name, x, "x");
  check_same_dtype(t, name, x, "x");
  check_shape(t, name, shape);
}

const void* packed_pointer(const OptionalTensor& t, const char* name, std::initializer_list<int64_t> shape,
                           const Tensor& x) {
  if (!t.has_value()) return nullptr;
  check_like(*t, name, shape, x);
  check_contiguous(*t, name);
  return t->const_data_ptr();
}

const int32_t* integers(const OptionalTensor& t, const char* name, int64_t size, const Tensor& x) {
  if (!t.has_value()) return nullptr;
  check_same_device(*t, name, x, "x");
  check_dims(*t, name, 1);
  check_shape(*t, name, {size});
  check_contiguous(*t, name);
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Int, name, ": expected int32");
  return static_cast<const int32_t*>(t->const_data_ptr());
}

template <class P>
void set_channels(P& p, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t groups,
                  int64_t head_dim, bool silu) {
  check_dims(x, "x", 3);
  check_dims(weight, "weight", 2);
  STD_TORCH_CHECK(weight.size(1) >= 1 && weight.size(1) <= kConvMaxTaps, "weight: expected 1 to ", kConvMaxTaps,
                  " taps, got ", weight.size(1));
  STD_TORCH_CHECK(groups >= 1, "groups: expected >= 1, got ", groups);
  STD_TORCH_CHECK(weight.size(0) < (int64_t{1} << 31), "weight: expected fewer than 2^31 channels");
  p.batch = x.size(0);
  p.inputs = x.size(2);
  p.channels = weight.size(0);
  p.taps = static_cast<int>(weight.size(1));
  p.groups = groups;
  p.head_dim = head_dim;
  p.silu = silu;
  STD_TORCH_CHECK(head_dim >= 1 && p.inputs % head_dim == 0 && p.channels == p.inputs * groups,
                  "head_dim: expected a divisor of the channels of x, and groups times as many in weight");
  p.weight = packed_pointer(weight, "weight", {p.channels, p.taps}, x);
  p.bias = packed_pointer(bias, "bias", {p.channels}, x);
}

CausalConv1dParams make_params(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                               const OptionalTensor& sequence, int64_t groups, int64_t head_dim, bool silu) {
  CausalConv1dParams p{};
  set_channels(p, x, weight, bias, groups, head_dim, silu);
  p.time = x.size(1);
  STD_TORCH_CHECK(x.stride(2) == 1 || p.inputs <= 1, "x: expected a contiguous last dimension");
  STD_TORCH_CHECK(p.time < (int64_t{1} << 31), "x: expected fewer than 2^31 tokens");
  p.x = x.const_data_ptr();
  p.x_stride_b = x.stride(0), p.x_stride_t = x.stride(1);
  p.sequences = p.batch;
  STD_TORCH_CHECK(cu_seqlens.has_value() == sequence.has_value(), "sequence: expected together with cu_seqlens");
  if (cu_seqlens.has_value()) {
    STD_TORCH_CHECK(p.batch == 1, "cu_seqlens: expected a batch of 1, got ", p.batch);
    check_dims(*cu_seqlens, "cu_seqlens", 1);
    p.sequences = cu_seqlens->size(0) - 1;
    STD_TORCH_CHECK(p.sequences > 0 || (p.sequences == 0 && p.time == 0), "cu_seqlens: expected shape [N + 1]");
    p.cu_seqlens = integers(cu_seqlens, "cu_seqlens", p.sequences + 1, x);
    p.sequence = integers(sequence, "sequence", p.time, x);
  }
  p.state = packed_pointer(initial_state, "initial_state", {p.sequences, p.inputs, p.taps - 1}, x);
  if (p.taps == 1) p.state = nullptr;
  return p;
}

std::tuple<Tensor, Tensor> causal_conv1d_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                             const OptionalTensor& initial_state, const OptionalTensor& residual,
                                             const OptionalTensor& cu_seqlens, const OptionalTensor& sequence,
                                             int64_t groups, int64_t head_dim, bool silu, bool output_final_state) {
  CausalConv1dParams p = make_params(x, weight, bias, initial_state, cu_seqlens, sequence, groups, head_dim, silu);
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
  CausalConv1dParams p = make_params(x, weight, bias, initial_state, cu_seqlens, sequence, groups, head_dim, silu);
  p.grad_y = packed_pointer(grad_y, "grad_y", {p.batch, p.time, p.channels}, x);
  p.grad_final = packed_pointer(grad_final, "grad_final", {p.sequences, p.inputs, p.taps - 1}, x);
  if (p.taps == 1) p.grad_final = nullptr;
  const ScalarType dtype = x.scalar_type();
  const Tensor dx = empty_contiguous_like(x), dweight = empty_on(x, {p.channels, p.taps}, dtype);
  const Tensor dbias = empty_on(x, {bias.has_value() ? p.channels : 0}, dtype);
  const Tensor dstate =
      initial_state.has_value() ? empty_on(x, {p.sequences, p.inputs, p.taps - 1}, dtype) : empty_on(x, {0}, dtype);
  const Tensor partial = empty_on(x, {p.batch, p.blocks(), p.taps + 1, p.channels}, ScalarType::Float);
  const LaunchScope scope(x, weight, bias, initial_state, cu_seqlens, sequence, grad_y, grad_final, dx, dweight, dbias,
                          dstate, partial);
  p.dx = dx.mutable_data_ptr();
  p.dweight = dweight.mutable_data_ptr();
  p.partial = static_cast<float*>(partial.mutable_data_ptr());
  if (bias.has_value()) p.dbias = dbias.mutable_data_ptr();
  if (initial_state.has_value()) p.dstate = dstate.mutable_data_ptr();
  dispatch_dtype(x, "x", [&](auto element) { causal_conv1d_backward<decltype(element)>(p, scope.stream()); });
  return {dx, dweight, dbias, dstate};
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
