// Checks and parameters that the bindings of the causal convolution share.
#pragma once

#include "cuda/binding.h"
#include "ops/causal_conv1d/params.h"

namespace subquad::cuda {

inline void check_like(const Tensor& t, const char* name, std::initializer_list<int64_t> shape, const Tensor& x) {
  check_same_device(t, name, x, "x");
  check_same_dtype(t, name, x, "x");
  check_shape(t, name, shape);
}

inline const void* packed_pointer(const OptionalTensor& t, const char* name, std::initializer_list<int64_t> shape,
                                  const Tensor& x) {
  if (!t.has_value()) return nullptr;
  check_like(*t, name, shape, x);
  check_contiguous(*t, name);
  return t->const_data_ptr();
}

inline const int32_t* integers(const OptionalTensor& t, const char* name, int64_t size, const Tensor& x) {
  if (!t.has_value()) return nullptr;
  check_same_device(*t, name, x, "x");
  check_dims(*t, name, 1);
  check_shape(*t, name, {size});
  check_contiguous(*t, name);
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Int, name, ": expected int32");
  return static_cast<const int32_t*>(t->const_data_ptr());
}

/// What the arguments are called in messages.
struct ConvNames {
  const char *weight = "weight", *bias = "bias";
};

template <class P>
void set_channels(P& p, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t groups,
                  int64_t head_dim, bool silu, ConvNames names = {}) {
  check_dims(x, "x", 3);
  check_dims(weight, names.weight, 2);
  STD_TORCH_CHECK(weight.size(1) >= 1 && weight.size(1) <= kConvMaxTaps, names.weight, ": expected 1 to ", kConvMaxTaps,
                  " taps, got ", weight.size(1));
  STD_TORCH_CHECK(groups >= 1, "groups: expected >= 1, got ", groups);
  STD_TORCH_CHECK(weight.size(0) < (int64_t{1} << 31), names.weight, ": expected fewer than 2^31 channels");
  p.batch = x.size(0);
  p.inputs = x.size(2);
  p.channels = weight.size(0);
  p.taps = static_cast<int>(weight.size(1));
  p.groups = groups;
  p.head_dim = head_dim;
  p.silu = silu;
  STD_TORCH_CHECK(head_dim >= 1 && p.inputs % head_dim == 0 && p.channels == p.inputs * groups,
                  "head_dim: expected a divisor of the channels of x, and groups times as many in weight");
  p.weight = packed_pointer(weight, names.weight, {p.channels, p.taps}, x);
  p.bias = packed_pointer(bias, names.bias, {p.channels}, x);
}

inline CausalConv1dParams conv_arguments(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                         const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                                         const OptionalTensor& sequence, int64_t groups, int64_t head_dim, bool silu,
                                         ConvNames names = {}) {
  CausalConv1dParams p{};
  set_channels(p, x, weight, bias, groups, head_dim, silu, names);
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

/// What the backward of the convolution writes; the constructor allocates it and sets its pointers.
struct ConvGradients {
  Tensor dx, dweight, dbias, dstate, partial;

  ConvGradients(CausalConv1dParams& p, const OptionalTensor& grad_final, const Tensor& x, bool biased, bool stateful)
      : dx(empty_on(x, {p.batch, p.time, p.inputs}, x.scalar_type())),
        dweight(empty_on(x, {p.channels, p.taps}, x.scalar_type())),
        dbias(empty_on(x, {biased ? p.channels : 0}, x.scalar_type())),
        dstate(stateful ? empty_on(x, {p.sequences, p.inputs, p.taps - 1}, x.scalar_type())
                        : empty_on(x, {0}, x.scalar_type())),
        partial(empty_on(x, {p.batch, p.blocks(), p.taps + 1, p.channels}, ScalarType::Float)) {
    p.grad_final = packed_pointer(grad_final, "grad_final", {p.sequences, p.inputs, p.taps - 1}, x);
    if (p.taps == 1) p.grad_final = nullptr;
    p.dx = dx.mutable_data_ptr();
    p.dweight = dweight.mutable_data_ptr();
    p.partial = static_cast<float*>(partial.mutable_data_ptr());
    if (biased) p.dbias = dbias.mutable_data_ptr();
    if (stateful) p.dstate = dstate.mutable_data_ptr();
  }
};

}  // namespace subquad::cuda
