// Arguments and results of cats_activation_* and cats_glu_*. `Device` has the passes, forward and backward, as
// run(params, dtype of z, dtype of u, tensors...), where the tensors are all that a pass touches.
#pragma once

#include <tuple>

#include "ops/cats_activation/params.h"
#include "torch/checks.h"

namespace subquad {

inline Activation activation_of(int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation < kActivationCount, "activation: expected a code in [0, ",
                  kActivationCount, "), got ", activation);
  return static_cast<Activation>(activation);
}

/// Thresholds of one neuron each, or one for all: sets their data and the distance between neighbours, 0 to repeat one.
/// NaN is refused where it can be read: it would silently make every neuron active.
template <class P>
void set_threshold(P& p, const Tensor& threshold, int64_t neurons, const Anchor& anchor) {
  check_device(threshold, "threshold", anchor);
  check_dtype(threshold, "threshold", ScalarType::Float);
  const int64_t count = threshold.numel();
  STD_TORCH_CHECK(threshold.dim() <= 1 && (count == 1 || count == neurons), "threshold: expected shape [], [1] or [",
                  neurons, "], got ", shape_text(threshold.sizes()));
  p.threshold = static_cast<const float*>(threshold.const_data_ptr());
  p.threshold_stride = count == 1 ? 0 : threshold.stride(0);
  if (anchor.device.type != aoti_torch_device_type_cpu()) return;
  bool numbers = true;
  for (int64_t i = 0; i < count; ++i) numbers &= !std::isnan(p.threshold[i * p.threshold_stride]);
  STD_TORCH_CHECK(numbers, "threshold: expected numbers, got NaN");
}

inline CatsActivationParams cats_activation_arguments(const Tensor& z, const Tensor& threshold, int64_t activation,
                                                      bool inclusive, bool straight_through = false) {
  CatsActivationParams p{};
  p.rows = rows_in(z, "z", 1);
  p.cols = z.size(z.dim() - 1);
  check_contiguous(z, "z");
  p.z = z.const_data_ptr();
  set_threshold(p, threshold, p.cols, {z, "z"});
  p.activation = activation_of(activation);
  p.inclusive = inclusive;
  p.straight_through = straight_through;
  return p;
}

/// u of a gated unit; z has its dtype, or is float32 beside it.
inline const void* gated_with(const Tensor& u, const Tensor& z) {
  is_wide(z, "z", {u, "u"});
  return data_of(u, "u", {z.size(0), z.size(1)}, u.scalar_type(), {z, "z"});
}

template <class Device>
Tensor cats_activation_fwd(const Tensor& z, const Tensor& threshold, int64_t activation, bool inclusive) {
  CatsActivationParams p = cats_activation_arguments(z, threshold, activation, inclusive);
  const DType dtype = dtype_of(z, "z");
  const Tensor a = empty_rows(z, p.cols, z.scalar_type());
  p.out = a.mutable_data_ptr();
  Device::forward(p, dtype, dtype, z, threshold, a);
  return a;
}

template <class Device>
Tensor cats_activation_bwd(const Tensor& grad_a, const Tensor& z, const Tensor& threshold, int64_t activation,
                           bool inclusive, bool straight_through) {
  check_dims(z, "z", 2);
  CatsActivationParams p = cats_activation_arguments(z, threshold, activation, inclusive, straight_through);
  const DType dtype = dtype_of(z, "z");
  p.grad = data_of(grad_a, "grad_a", {p.rows, p.cols}, {z, "z"});
  const Tensor dz = empty_on(z, {p.rows, p.cols}, z.scalar_type());
  p.dz = dz.mutable_data_ptr();
  Device::backward(p, dtype, dtype, z, grad_a, threshold, dz);
  return dz;
}

template <class Device>
Tensor cats_glu_fwd(const Tensor& z, const Tensor& u, const Tensor& threshold, int64_t activation, bool inclusive) {
  check_dims(z, "z", 2);
  CatsActivationParams p = cats_activation_arguments(z, threshold, activation, inclusive);
  p.u = gated_with(u, z);
  const Tensor h = empty_on(z, {p.rows, p.cols}, u.scalar_type());
  p.out = h.mutable_data_ptr();
  Device::forward(p, dtype_of(z, "z"), dtype_of(u, "u"), z, u, threshold, h);
  return h;
}

template <class Device>
std::tuple<Tensor, Tensor> cats_glu_bwd(const Tensor& grad_h, const Tensor& z, const Tensor& u, const Tensor& threshold,
                                        int64_t activation, bool inclusive, bool straight_through) {
  check_dims(z, "z", 2);
  CatsActivationParams p = cats_activation_arguments(z, threshold, activation, inclusive, straight_through);
  p.u = gated_with(u, z);
  p.grad = data_of(grad_h, "grad_h", {p.rows, p.cols}, {u, "u"});
  const Tensor dz = empty_on(z, {p.rows, p.cols}, z.scalar_type());
  const Tensor du = empty_on(z, {p.rows, p.cols}, u.scalar_type());
  p.dz = dz.mutable_data_ptr();
  p.du = du.mutable_data_ptr();
  Device::backward(p, dtype_of(z, "z"), dtype_of(u, "u"), z, u, grad_h, threshold, dz, du);
  return {dz, du};
}

}  // namespace subquad
