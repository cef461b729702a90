// Checks and parameters that the bindings of the causal convolution share.
#pragma once

#include <algorithm>
#include <tuple>

#include "cpu/binding.h"
#include "cpu/isa.h"
#include "ops/causal_conv1d/cpu.h"

namespace subquad::cpu {

constexpr int64_t kSmall = 1 << 14;  // elements: waking other threads would take as long as the work
constexpr int64_t kFloatBytes = sizeof(float);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void check_like(const Tensor& t, const char* name, std::initializer_list<int64_t> shape, const Tensor& x) {
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, ": expected the dtype of x");
  STD_TORCH_CHECK(std::ranges::equal(t.sizes(), shape), name, ": wrong shape for x and weight");
}

inline void check_packed(const Tensor& t, const char* name, std::initializer_list<int64_t> shape, const Tensor& x) {
  check_like(t, name, shape, x);
  check_contiguous(t, name);
}

inline const int32_t* integers(const OptionalTensor& t, const char* name, int64_t size) {
  if (!t.has_value()) return nullptr;
  check_contiguous(*t, name);
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Int && t->dim() == 1 && t->size(0) == size, name,
                  ": expected int32 of shape [", size, "]");
  return static_cast<const int32_t*>(t->const_data_ptr());
}

/// What the arguments are called in messages.
struct ConvNames {
  const char *weight = "weight", *bias = "bias";
};

/// Shapes of x, weight and bias, which all operators share.
template <class P>
void set_channels(P& p, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t groups,
                  int64_t head_dim, bool silu, ConvNames names = {}) {
  STD_TORCH_CHECK(x.dim() == 3, "x: expected 3 dimensions, got ", x.dim());
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) >= 1 && weight.size(1) <= kConvMaxTaps, names.weight,
                  ": expected shape [D, W] with W in 1..", kConvMaxTaps);
  STD_TORCH_CHECK(groups >= 1, "groups: expected >= 1, got ", groups);
  p.batch = x.size(0);
  p.inputs = x.size(2);
  p.channels = weight.size(0);
  p.taps = static_cast<int>(weight.size(1));
  p.groups = groups;
  p.head_dim = head_dim;
  p.silu = silu;
  STD_TORCH_CHECK(head_dim >= 1 && p.inputs % head_dim == 0 && p.channels == p.inputs * groups,
                  "head_dim: expected a divisor of the channels of x, and groups times as many in weight");
  check_packed(weight, names.weight, {p.channels, p.taps}, x);
  p.weight = weight.const_data_ptr();
  if (bias.has_value()) {
    check_packed(*bias, names.bias, {p.channels}, x);
    p.bias = bias->const_data_ptr();
  }
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
    STD_TORCH_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1, "cu_seqlens: expected shape [N + 1]");
    p.sequences = cu_seqlens->size(0) - 1;
    STD_TORCH_CHECK(p.sequences > 0 || p.time == 0, "cu_seqlens: expected at least one sequence");
    p.cu_seqlens = integers(cu_seqlens, "cu_seqlens", p.sequences + 1);
    p.sequence = integers(sequence, "sequence", p.time);
  }
  if (initial_state.has_value()) {
    check_packed(*initial_state, "initial_state", {p.sequences, p.inputs, p.taps - 1}, x);
    p.state = p.taps > 1 ? initial_state->const_data_ptr() : nullptr;
  }
  return p;
}

inline Tensor packed_weights(const CausalConv1dParams& p, const CausalConv1dKernels& kernels) {
  Tensor packed = empty({p.taps + 1, p.channels}, ScalarType::Float);
  kernels.pack(p, static_cast<float*>(packed.mutable_data_ptr()));
  return packed;
}

inline CausalConv1dKernels conv_kernels(const Tensor& x, bool wide_gradient = false) {
  return SQ_DISPATCH_ISA(causal_conv1d_kernels, dtype_of(x, "x"), wide_gradient);
}

/// The final state's gradient, if there is one.
inline void set_grad_final(CausalConv1dParams& p, const OptionalTensor& grad_final, const Tensor& x) {
  if (!grad_final.has_value()) return;
  check_packed(*grad_final, "grad_final", {p.sequences, p.inputs, p.taps - 1}, x);
  p.grad_final = p.taps > 1 ? grad_final->const_data_ptr() : nullptr;
}

/// (dx, dweight, dbias, dstate) of a call whose arguments and gradients are set; `weights` are packed. Like bias and
/// initial_state, the last two may be left out.
inline std::tuple<Tensor, Tensor, Tensor, Tensor> conv_backward(CausalConv1dParams p,
                                                                const CausalConv1dKernels& kernels,
                                                                const Tensor& weights, ScalarType dtype, bool biased,
                                                                bool stateful) {
  Tensor dx = empty({p.batch, p.time, p.inputs}, dtype), dweight = empty({p.channels, p.taps}, dtype);
  Tensor dbias = empty({biased ? p.channels : 0}, dtype);
  Tensor dstate = stateful ? empty({p.sequences, p.inputs, p.taps - 1}, dtype) : empty({0}, dtype);
  const auto* packed = static_cast<const float*>(weights.const_data_ptr());
  const Tensor partial = empty({p.batch, p.blocks(), p.taps + 1, p.channels}, ScalarType::Float);
  p.partial = static_cast<float*>(partial.mutable_data_ptr());
  advise_huge_pages(dx);
  p.dx = dx.mutable_data_ptr();
  p.dweight = dweight.mutable_data_ptr();
  if (biased) p.dbias = dbias.mutable_data_ptr();
  const int64_t elements = p.batch * p.time * p.channels;
  const bool small = elements < kSmall;
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
  if (dstate.numel() > 0) {
    p.dstate = dstate.mutable_data_ptr();
    parallel_items(p.sequences, dstate.numel() < kSmall / 4, [&](int64_t n) { kernels.state_grad(p, packed, n); });
  }
  return {dx, dweight, dbias, dstate};
}

}  // namespace subquad::cpu
