// Arguments and results of span_search_{fwd,bwd}. `Device` has forward(params, dtype, tensors...) and, where the device
// has one, backward(grads, dtype, tensors...); the tensors are all that it touches, q_search first.
#pragma once

#include <tuple>

#include "ops/span_search/params.h"
#include "torch/paged.h"

namespace subquad {

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> span_search_fwd(const Tensor& q_search, const Tensor& k,
                                                           const Tensor& position, const Tensor& first,
                                                           const Tensor& last, const Tensor& back, const Tensor& ahead,
                                                           const Tensor& offsets, const OptionalTensor& key_mask,
                                                           const OptionalTensor& block_table, int64_t num_spans,
                                                           double scale, bool per_group) {
  const Anchor like_q{q_search, "q_search"};
  check_dims(q_search, "q_search", 4);
  check_dims(k, "k", 4);
  check_dims(offsets, "offsets", 1);
  check_last_contiguous(q_search, "q_search");
  SpanSearchParams p{};
  p.batch = q_search.size(0), p.tokens = q_search.size(1), p.heads = q_search.size(2), p.d = q_search.size(3);
  p.kv_heads = k.size(2), p.keys = paged_keys(k, block_table), p.stripes = offsets.size(0), p.spans = num_spans;
  STD_TORCH_CHECK(p.d >= 1 && p.d <= kSpanSearchMaxDim, "q_search: expected a head dimension in [1, ",
                  kSpanSearchMaxDim, "], got ", p.d);
  STD_TORCH_CHECK(p.kv_heads > 0 && p.heads % p.kv_heads == 0, "k: expected a number of heads that divides ", p.heads,
                  ", got ", p.kv_heads);
  STD_TORCH_CHECK(p.keys < (int64_t{1} << 31), "k: expected fewer than 2^31 keys, got ", p.keys);
  STD_TORCH_CHECK(num_spans >= 1 && num_spans <= kSpanSearchMaxSpans, "num_spans: expected 1..", kSpanSearchMaxSpans,
                  ", got ", num_spans);
  p.keys_at = paged_rows(k, "k", block_table, p.batch, p.kv_heads, p.d, like_q);
  p.position = int32_of(position, "position", {p.batch, p.tokens}, like_q);
  p.first = int32_of(first, "first", {p.batch, p.tokens}, like_q);
  p.last = int32_of(last, "last", {p.batch, p.tokens}, like_q);
  p.back = int32_of(back, "back", {p.batch, p.tokens}, like_q);
  p.ahead = int32_of(ahead, "ahead", {p.batch, p.tokens}, like_q);
  p.offsets = int32_of(offsets, "offsets", {p.stripes}, like_q);
  p.key_mask = static_cast<const bool*>(data_of(key_mask, "key_mask", {p.batch, p.keys}, ScalarType::Bool, like_q));
  p.q = q_search.const_data_ptr(), p.k = k.const_data_ptr();
  p.q_stride_b = q_search.stride(0), p.q_stride_t = q_search.stride(1), p.q_stride_h = q_search.stride(2);
  p.scale = static_cast<float>(scale), p.per_group = per_group;
  const DType dtype = dtype_of(q_search, "q_search");
  const Tensor score = empty_on(q_search, {p.batch, p.tokens, p.heads, p.spans}, ScalarType::Float);
  const Tensor anchor = empty_on(q_search, {p.batch, p.tokens, p.heads, p.spans}, ScalarType::Int);
  const Tensor start = empty_on(q_search, {p.batch, p.tokens, p.heads, p.spans}, ScalarType::Int);
  const Tensor end = empty_on(q_search, {p.batch, p.tokens, p.heads, p.spans}, ScalarType::Int);
  p.score = floats_in(score);
  p.anchor = static_cast<int32_t*>(anchor.mutable_data_ptr());
  p.start = static_cast<int32_t*>(start.mutable_data_ptr());
  p.end = static_cast<int32_t*>(end.mutable_data_ptr());
  Device::forward(p, dtype, q_search, k, position, first, last, back, ahead, offsets, key_mask, block_table, score,
                  anchor, start, end);
  return {score, anchor, start, end};
}

template <class Device>
std::tuple<Tensor, Tensor> span_search_bwd(const Tensor& grad_score, const Tensor& anchor, const Tensor& q_search,
                                           const Tensor& k, double scale) {
  const Anchor like_q{q_search, "q_search"};
  check_dims(q_search, "q_search", 4);
  check_dims(k, "k", 4);
  check_dims(anchor, "anchor", 4);
  check_last_contiguous(q_search, "q_search");
  check_last_contiguous(k, "k");
  check_device(k, "k", like_q);
  check_same_dtype(k, "k", like_q);
  SpanSearchGrads p{};
  p.batch = q_search.size(0), p.tokens = q_search.size(1), p.heads = q_search.size(2), p.d = q_search.size(3);
  p.keys = k.size(1), p.kv_heads = k.size(2), p.spans = anchor.size(3);
  STD_TORCH_CHECK(p.kv_heads > 0 && p.heads % p.kv_heads == 0, "k: expected a number of heads that divides ", p.heads,
                  ", got ", p.kv_heads);
  STD_TORCH_CHECK(p.d >= 1 && p.d <= kSpanSearchMaxDim, "q_search: expected a head dimension in [1, ",
                  kSpanSearchMaxDim, "], got ", p.d);
  check_shape(k, "k", {p.batch, p.keys, p.kv_heads, p.d});
  p.grad_score = floats_of(grad_score, "grad_score", {p.batch, p.tokens, p.heads, p.spans}, like_q);
  p.anchor = int32_of(anchor, "anchor", {p.batch, p.tokens, p.heads, p.spans}, like_q);
  p.q = q_search.const_data_ptr(), p.k = k.const_data_ptr();
  p.q_stride_b = q_search.stride(0), p.q_stride_t = q_search.stride(1), p.q_stride_h = q_search.stride(2);
  p.k_stride_b = k.stride(0), p.k_stride_t = k.stride(1), p.k_stride_h = k.stride(2);
  p.scale = static_cast<float>(scale);
  const DType dtype = dtype_of(q_search, "q_search");
  const Tensor dq = empty_on(q_search, {p.batch, p.tokens, p.heads, p.d}, q_search.scalar_type());
  const Tensor dk = empty_on(q_search, {p.batch, p.keys, p.kv_heads, p.d}, q_search.scalar_type());
  p.dq = dq.mutable_data_ptr(), p.dk = dk.mutable_data_ptr();
  Device::backward(p, dtype, q_search, k, grad_score, anchor, dq, dk);
  return {dq, dk};
}

}  // namespace subquad
