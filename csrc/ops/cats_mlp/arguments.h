// Arguments and results of cats_mlp_fwd. `Device` has run(params, dtype, tensors...), where the tensors are all that it
// touches, x first; how many rows it takes is its own matter.
#pragma once

#include "ops/cats_activation/arguments.h"
#include "ops/cats_mlp/params.h"

namespace subquad {

/// A weight that neurons, or their channels, are read from in rows.
inline const void* weight_of(const Tensor& weight, const char* name, Shape shape, const Anchor& anchor) {
  check_device(weight, name, anchor);
  check_same_dtype(weight, name, anchor);
  check_shape(weight, name, shape);
  return weight.const_data_ptr();
}

template <class Device>
Tensor cats_mlp_fwd(const Tensor& x, const Tensor& w_gate, const Tensor& w_up, const Tensor& w_down,
                    const Tensor& threshold, const OptionalTensor& b_gate, const OptionalTensor& b_up,
                    const OptionalTensor& b_down, int64_t activation, bool inclusive, bool union_mask) {
  const Anchor like_x{x, "x"};
  CatsMlpParams p{};
  p.tokens = rows_in(x, "x", 2);
  p.hidden = x.size(x.dim() - 1);
  check_contiguous(x, "x");
  check_dims(w_gate, "w_gate", 2);
  p.x = x.const_data_ptr();
  p.intermediate = w_gate.size(0);
  p.w_gate = weight_of(w_gate, "w_gate", {p.intermediate, p.hidden}, like_x);
  p.w_up = weight_of(w_up, "w_up", {p.intermediate, p.hidden}, like_x);
  p.w_down = weight_of(w_down, "w_down", {p.hidden, p.intermediate}, like_x);
  check_last_contiguous(w_gate, "w_gate");
  check_last_contiguous(w_up, "w_up");
  p.neuron_major = unit_stride(w_down, 0);
  STD_TORCH_CHECK(p.neuron_major || unit_stride(w_down, 1), "w_down: expected stride 1 in one dimension, got strides ",
                  shape_text(w_down.strides()));
  p.ld_gate = w_gate.stride(0);
  p.ld_up = w_up.stride(0);
  p.ld_down = w_down.stride(p.neuron_major ? 1 : 0);
  set_threshold(p, threshold, p.intermediate, like_x);
  p.b_gate = data_of(b_gate, "b_gate", {p.intermediate}, like_x);
  p.b_up = data_of(b_up, "b_up", {p.intermediate}, like_x);
  p.b_down = data_of(b_down, "b_down", {p.hidden}, like_x);
  p.activation = activation_of(activation);
  p.inclusive = inclusive;
  p.union_mask = union_mask;
  const Tensor y = empty_rows(x, p.hidden, x.scalar_type());
  p.y = y.mutable_data_ptr();
  Device::run(p, dtype_of(x, "x"), x, w_gate, w_up, w_down, threshold, b_gate, b_up, b_down, y);
  return y;
}

}  // namespace subquad
