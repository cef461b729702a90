// Binding of cats_mlp_fwd: memory-safety checks, then the torch-free launches of cats_mlp.cuh.
#include "ops/cats_mlp/cuda.cuh"

#include "cuda/binding.h"

namespace subquad::cuda {
namespace {

// The stride of a dimension of size 1 means nothing.
bool unit_stride(const Tensor& t, int64_t dim) { return t.size(dim) <= 1 || t.stride(dim) == 1; }

void check_weight(const Tensor& weight, const char* name, const Tensor& x, std::initializer_list<int64_t> shape) {
  check_same_device(weight, name, x, "x");
  check_same_dtype(weight, name, x, "x");
  check_shape(weight, name, shape);
}

const void* bias_pointer(const OptionalTensor& bias, const char* name, const Tensor& x, int64_t size) {
  if (!bias.has_value()) return nullptr;
  check_same_device(*bias, name, x, "x");
  check_same_dtype(*bias, name, x, "x");
  check_shape(*bias, name, {size});
  check_contiguous(*bias, name);
  return bias->const_data_ptr();
}

Tensor cats_mlp_fwd(const Tensor& x, const Tensor& w_gate, const Tensor& w_up, const Tensor& w_down,
                    const Tensor& threshold, const OptionalTensor& b_gate, const OptionalTensor& b_up,
                    const OptionalTensor& b_down, int64_t activation, bool inclusive, bool union_mask) {
  check_dims(x, "x", 2);
  check_contiguous(x, "x");
  check_dims(w_gate, "w_gate", 2);
  CatsMlpParams p{};
  p.tokens = x.size(0);
  p.hidden = x.size(1);
  p.intermediate = w_gate.size(0);
  STD_TORCH_CHECK(p.tokens <= kCatsMaxTokens, "x: expected at most ", kCatsMaxTokens, " rows, got ", p.tokens);
  check_weight(w_gate, "w_gate", x, {p.intermediate, p.hidden});
  check_weight(w_up, "w_up", x, {p.intermediate, p.hidden});
  check_weight(w_down, "w_down", x, {p.hidden, p.intermediate});
  STD_TORCH_CHECK(unit_stride(w_gate, 1), "w_gate: expected stride 1 in dimension 1, got ", w_gate.stride(1));
  STD_TORCH_CHECK(unit_stride(w_up, 1), "w_up: expected stride 1 in dimension 1, got ", w_up.stride(1));
  p.neuron_major = unit_stride(w_down, 0);
  STD_TORCH_CHECK(p.neuron_major || unit_stride(w_down, 1), "w_down: expected stride 1 in one dimension, got strides ",
                  w_down.stride(0), " and ", w_down.stride(1));
  check_same_device(threshold, "threshold", x, "x");
  STD_TORCH_CHECK(activation >= 0 && activation < kActivationCount, "activation: expected a code in [0, ",
                  kActivationCount, "), got ", activation);

  p.ld_gate = w_gate.stride(0);
  p.ld_up = w_up.stride(0);
  p.ld_down = w_down.stride(p.neuron_major ? 1 : 0);
  p.threshold_stride = check_channel_vector(threshold, "threshold", p.intermediate);
  p.x = x.const_data_ptr();
  p.w_gate = w_gate.const_data_ptr();
  p.w_up = w_up.const_data_ptr();
  p.w_down = w_down.const_data_ptr();
  p.threshold = static_cast<const float*>(threshold.const_data_ptr());
  p.b_gate = bias_pointer(b_gate, "b_gate", x, p.intermediate);
  p.b_up = bias_pointer(b_up, "b_up", x, p.intermediate);
  p.b_down = bias_pointer(b_down, "b_down", x, p.hidden);
  p.activation = static_cast<Activation>(activation);
  p.inclusive = inclusive;
  p.union_mask = union_mask;

  const Tensor y = empty_contiguous_like(x);
  const Tensor scratch = empty_on(x, {cats_mlp_workspace_words(p)}, ScalarType::Float);
  const LaunchScope scope(x, w_gate, w_up, w_down, threshold, b_gate, b_up, b_down, y, scratch);
  p.y = y.mutable_data_ptr();
  dispatch_dtype(x, "x", [&](auto element) {
    cats_mlp_forward<decltype(element)>(p, static_cast<float*>(scratch.mutable_data_ptr()), scope.stream());
  });
  return y;
}

}  // namespace
}  // namespace subquad::cuda

SQ_REGISTER_OPS(m) { m.impl("cats_mlp_fwd", TORCH_BOX(&subquad::cuda::cats_mlp_fwd)); }
