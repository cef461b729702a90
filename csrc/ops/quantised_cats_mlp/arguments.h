// Arguments and results of quantised_cats_mlp_fwd. `Device` has run(params, dtype, tensors...), where the tensors are
// all that it touches, x first.
#pragma once

#include <tuple>

#include "ops/cats_activation/arguments.h"
#include "ops/quantised_cats_mlp/params.h"
#include "ops/quantised_linear/arguments.h"

namespace subquad {

template <class Device>
std::tuple<Tensor, Tensor> quantised_cats_mlp_fwd(const Tensor& x, const Tensor& w_gate, const Tensor& w_up,
                                                  const Tensor& w_down, const OptionalTensor& down_scales,
                                                  const Tensor& threshold, const OptionalTensor& b_gate,
                                                  const OptionalTensor& b_up, const OptionalTensor& b_down,
                                                  int64_t gate_format, int64_t up_format, int64_t down_format,
                                                  int64_t activation, bool inclusive, bool union_mask) {
  const Anchor like_x{x, "x"};
  QuantisedCatsMlpParams p{};
  p.tokens = rows_in(x, "x", 2);
  p.hidden = x.size(x.dim() - 1);
  check_contiguous(x, "x");
  check_dims(w_gate, "w_gate", 2);
  p.intermediate = w_gate.size(0);
  STD_TORCH_CHECK(p.tokens <= kQuantisedCatsMaxTokens, "x: expected at most ", kQuantisedCatsMaxTokens, " rows, got ",
                  p.tokens);
  STD_TORCH_CHECK(p.hidden % kQuantisedGroup == 0, "x: expected a multiple of ", kQuantisedGroup, " columns, got ",
                  p.hidden);
  p.x = x.const_data_ptr();
  p.gate = quantised_format(gate_format, "gate_format");
  p.up = quantised_format(up_format, "up_format");
  p.down = quantised_format(down_format, "down_format");
  const auto bytes_of = [&](const Tensor& weight, const char* name, int64_t rows, int64_t columns) {
    return static_cast<const uint8_t*>(data_of(weight, name, {rows, columns}, ScalarType::Byte, like_x));
  };
  p.w_gate = bytes_of(w_gate, "w_gate", p.intermediate, p.groups() * group_bytes(p.gate));
  p.w_up = bytes_of(w_up, "w_up", p.intermediate, p.groups() * group_bytes(p.up));
  if (down_scales.has_value()) {
    STD_TORCH_CHECK(p.intermediate % kQuantisedGroup == 0, "down_scales: expected a multiple of ", kQuantisedGroup,
                    " neurons, got ", p.intermediate);
    p.down_scales = bytes_of(*down_scales, "down_scales", p.intermediate / kQuantisedGroup,
                             p.hidden * (group_bytes(p.down) - code_bytes(p.down)));
  }
  p.w_down = bytes_of(w_down, "w_down", p.intermediate, p.down_row_bytes());
  set_threshold(p, threshold, p.intermediate, like_x);
  p.b_gate = data_of(b_gate, "b_gate", {p.intermediate}, like_x);
  p.b_up = data_of(b_up, "b_up", {p.intermediate}, like_x);
  p.b_down = data_of(b_down, "b_down", {p.hidden}, like_x);
  p.activation = activation_of(activation);
  p.inclusive = inclusive;
  p.union_mask = union_mask;
  const Tensor y = empty_rows(x, p.hidden, x.scalar_type());
  const Tensor mask = empty_rows(x, p.intermediate, ScalarType::Bool);
  p.y = y.mutable_data_ptr();
  p.mask = static_cast<bool*>(mask.mutable_data_ptr());
  Device::run(p, dtype_of(x, "x"), x, w_gate, w_up, w_down, down_scales, threshold, b_gate, b_up, b_down, y, mask);
  return {y, mask};
}

}  // namespace subquad
