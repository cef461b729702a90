// Arguments and results of span_attention_{fwd,bwd}. `Device` has forward(params, dtype, tensors...) and, where the
// device has one, backward(params, grads, dtype, tensors...); the tensors are all that it touches, q first.
#pragma once

#include <tuple>

#include "ops/span_attention/params.h"
#include "torch/paged.h"

namespace subquad {

/// Everything but the results.
inline SpanAttentionParams span_attention_arguments(const Tensor& q, const Tensor& k, const Tensor& v,
                                                    const Tensor& start, const Tensor& end, const OptionalTensor& gate,
                                                    const OptionalTensor& base_out, const OptionalTensor& base_lse,
                                                    const OptionalTensor& key_mask, const OptionalTensor& block_table,
                                                    double scale) {
  const Anchor like_q{q, "q"};
  check_dims(q, "q", 4);
  check_dims(k, "k", 4);
  check_dims(v, "v", 4);
  check_dims(start, "start", 4);
  check_last_contiguous(q, "q");
  SpanAttentionParams p{};
  p.batch = q.size(0), p.tokens = q.size(1), p.heads = q.size(2), p.d = q.size(3);
  p.kv_heads = k.size(2), p.keys = paged_keys(k, block_table), p.dv = v.size(3), p.spans = start.size(3);
  p.softmaxes = gate.has_value() ? p.spans : 1;
  for (const int64_t dim : {p.d, p.dv})
    STD_TORCH_CHECK(dim >= 1 && dim <= kSpanAttentionMaxDim, "q: expected head dimensions in [1, ",
                    kSpanAttentionMaxDim, "], got ", dim);
  STD_TORCH_CHECK(p.kv_heads > 0 && p.heads % p.kv_heads == 0, "k: expected a number of heads that divides ", p.heads,
                  ", got ", p.kv_heads);
  STD_TORCH_CHECK(p.keys < (int64_t{1} << 31), "k: expected fewer than 2^31 keys, got ", p.keys);
  STD_TORCH_CHECK(p.spans >= 1, "start: expected at least one span, got none");
  STD_TORCH_CHECK(base_out.has_value() == base_lse.has_value(),
                  "base_lse: expected together with base_out, got one of them");
  STD_TORCH_CHECK(v.size(1) == k.size(1), "v: expected ", k.size(1), " keys as k has, got ", v.size(1));
  p.keys_at = paged_rows(k, "k", block_table, p.batch, p.kv_heads, p.d, like_q);
  STD_TORCH_CHECK(v.size(0) == k.size(0), "v: expected ", k.size(0), " rows as k has, got ", v.size(0));
  p.values_at = paged_rows(v, "v", block_table, p.batch, p.kv_heads, p.dv, like_q);
  p.start = int32_of(start, "start", {p.batch, p.tokens, p.heads, p.spans}, like_q);
  p.end = int32_of(end, "end", {p.batch, p.tokens, p.heads, p.spans}, like_q);
  p.gate = floats_of(gate, "gate", {p.batch, p.tokens, p.heads, p.spans}, like_q);
  p.base_out = data_of(base_out, "base_out", {p.batch, p.tokens, p.heads, p.dv}, like_q);
  p.base_lse = floats_of(base_lse, "base_lse", {p.batch, p.tokens, p.heads}, like_q);
  p.key_mask = static_cast<const bool*>(data_of(key_mask, "key_mask", {p.batch, p.keys}, ScalarType::Bool, like_q));
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
  p.q_stride_b = q.stride(0), p.q_stride_t = q.stride(1), p.q_stride_h = q.stride(2);
  p.scale = static_cast<float>(scale);
  return p;
}

template <class Device>
std::tuple<Tensor, Tensor> span_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& start,
                                              const Tensor& end, const OptionalTensor& gate,
                                              const OptionalTensor& base_out, const OptionalTensor& base_lse,
                                              const OptionalTensor& key_mask, const OptionalTensor& block_table,
                                              double scale) {
  SpanAttentionParams p =
      span_attention_arguments(q, k, v, start, end, gate, base_out, base_lse, key_mask, block_table, scale);
  const DType dtype = dtype_of(q, "q");
  const Tensor out = empty_on(q, {p.batch, p.tokens, p.heads, p.dv}, q.scalar_type());
  const Tensor lse = empty_on(q, {p.batch, p.tokens, p.heads, p.softmaxes}, ScalarType::Float);
  p.out = out.mutable_data_ptr(), p.lse = floats_in(lse);
  Device::forward(p, dtype, q, k, v, start, end, gate, base_out, base_lse, key_mask, block_table, out, lse);
  return {out, lse};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> span_attention_bwd(
    const Tensor& grad_out, const Tensor& grad_lse, const Tensor& out, const Tensor& lse, const Tensor& q,
    const Tensor& k, const Tensor& v, const Tensor& start, const Tensor& end, const OptionalTensor& gate,
    const OptionalTensor& base_out, const OptionalTensor& base_lse, const OptionalTensor& key_mask, double scale) {
  const Anchor like_q{q, "q"};
  SpanAttentionParams p =
      span_attention_arguments(q, k, v, start, end, gate, base_out, base_lse, key_mask, std::nullopt, scale);
  const DType dtype = dtype_of(q, "q");
  p.out = const_cast<void*>(data_of(out, "out", {p.batch, p.tokens, p.heads, p.dv}, like_q));
  p.lse = const_cast<float*>(floats_of(lse, "lse", {p.batch, p.tokens, p.heads, p.softmaxes}, like_q));
  SpanAttentionGrads grads{};
  grads.grad_out = data_of(grad_out, "grad_out", {p.batch, p.tokens, p.heads, p.dv}, like_q);
  grads.grad_lse = floats_of(grad_lse, "grad_lse", {p.batch, p.tokens, p.heads, p.softmaxes}, like_q);
  const Tensor dq = empty_on(q, {p.batch, p.tokens, p.heads, p.d}, q.scalar_type());
  const Tensor dk = empty_on(q, {p.batch, p.keys, p.kv_heads, p.d}, q.scalar_type());
  const Tensor dv = empty_on(q, {p.batch, p.keys, p.kv_heads, p.dv}, q.scalar_type());
  const Tensor dgate = empty_if(gate.has_value(), q, {p.batch, p.tokens, p.heads, p.spans}, ScalarType::Float);
  const bool based = base_out.has_value();
  const Tensor dbase_out = empty_if(based, q, {p.batch, p.tokens, p.heads, p.dv}, q.scalar_type());
  const Tensor dbase_lse = empty_if(based, q, {p.batch, p.tokens, p.heads}, ScalarType::Float);
  grads.dq = dq.mutable_data_ptr(), grads.dk = dk.mutable_data_ptr(), grads.dv = dv.mutable_data_ptr();
  if (gate.has_value()) grads.dgate = floats_in(dgate);
  if (based) grads.dbase_out = dbase_out.mutable_data_ptr(), grads.dbase_lse = floats_in(dbase_lse);
  Device::backward(p, grads, dtype, q, k, v, start, end, gate, base_out, base_lse, key_mask, out, lse, grad_out,
                   grad_lse, dq, dk, dv, dgate, dbase_out, dbase_lse);
  return {dq, dk, dv, dgate, dbase_out, dbase_lse};
}

}  // namespace subquad
