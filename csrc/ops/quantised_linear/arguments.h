// Arguments and results of quantised_linear_{fwd,bwd}, on any device. `Device` has forward(params, dtype, tensors...)
// and backward likewise, where the tensors are all that it touches, x first.
#pragma once

#include "ops/quantised_linear/params.h"
#include "torch/checks.h"

namespace subquad {

inline QuantisedFormat quantised_format(int64_t format, const char* name) {
  STD_TORCH_CHECK(format >= 0 && format < kQuantisedFormats, name, ": expected 0 to ", kQuantisedFormats - 1, ", got ",
                  format);
  return static_cast<QuantisedFormat>(format);
}

inline QuantisedLinearParams quantised_weight(const Tensor& weight, int64_t columns, int64_t format,
                                              const Anchor& anchor) {
  STD_TORCH_CHECK(columns >= 0 && columns % kQuantisedGroup == 0, "columns: expected a multiple of ", kQuantisedGroup,
                  ", got ", columns);
  check_dims(weight, "weight", 2);
  QuantisedLinearParams p{};
  p.rows = weight.size(0);
  p.columns = columns;
  p.format = quantised_format(format, "format");
  p.weight = static_cast<const uint8_t*>(data_of(weight, "weight", {p.rows, p.row_bytes()}, ScalarType::Byte, anchor));
  return p;
}

template <class Device>
Tensor quantised_linear_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t columns,
                            int64_t format) {
  const Anchor like_x{x, "x"};
  QuantisedLinearParams p = quantised_weight(weight, columns, format, like_x);
  p.tokens = rows_in(x, "x", 2);
  STD_TORCH_CHECK(x.size(x.dim() - 1) == columns, "x: expected ", columns, " columns, got ", shape_text(x.sizes()));
  check_contiguous(x, "x");
  p.x = x.const_data_ptr();
  p.bias = data_of(bias, "bias", {p.rows}, like_x);
  const Tensor y = empty_rows(x, p.rows, x.scalar_type());
  p.y = y.mutable_data_ptr();
  Device::forward(p, dtype_of(x, "x"), x, weight, bias, y);
  return y;
}

template <class Device>
Tensor quantised_linear_bwd(const Tensor& grad_y, const Tensor& weight, int64_t columns, int64_t format) {
  const Anchor like_grad{grad_y, "grad_y"};
  check_dims(grad_y, "grad_y", 2);
  QuantisedLinearParams p = quantised_weight(weight, columns, format, like_grad);
  p.tokens = grad_y.size(0);
  p.x = data_of(grad_y, "grad_y", {p.tokens, p.rows}, like_grad);
  const Tensor grad_x = empty_on(grad_y, {p.tokens, p.columns}, grad_y.scalar_type());
  p.y = grad_x.mutable_data_ptr();
  Device::backward(p, dtype_of(grad_y, "grad_y"), grad_y, weight, grad_x);
  return grad_x;
}

}  // namespace subquad
