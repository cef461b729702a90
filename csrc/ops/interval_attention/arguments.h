// Arguments and results of interval_attention_{fwd,bwd}. `Device` has forward and, where the device has one, backward
// as run(params, dtype, tensors...), where the tensors are all that it touches, q first. `plan` is for Triton.
#pragma once

#include <tuple>
#include <utility>
#include <vector>

#include "ops/interval_attention/params.h"
#include "torch/checks.h"

namespace subquad {

inline void check_head_rows(const Tensor& t, const char* name, int64_t dims, const Anchor& like_q) {
  check_dims(t, name, dims);
  check_device(t, name, like_q);
  check_same_dtype(t, name, like_q);
  const int64_t last = t.size(dims - 1);
  STD_TORCH_CHECK(last >= 1 && last <= kIntervalMaxDim, name, ": expected a head dimension in [1, ", kIntervalMaxDim,
                  "], got ", last);
  check_last_contiguous(t, name);
}

/// Strides of batch and heads of a contiguous [B|1, H|1, ...] tensor, 0 where broadcast.
inline std::pair<int64_t, int64_t> broadcast_strides(const Tensor& t, const char* name, int64_t dims, ScalarType dtype,
                                                     const Anchor& like_q) {
  check_dims(t, name, dims);
  check_contiguous(t, name);
  check_device(t, name, like_q);
  check_dtype(t, name, dtype);
  const int64_t batch = like_q.tensor.size(0), heads = like_q.tensor.size(2);
  STD_TORCH_CHECK((t.size(0) == 1 || t.size(0) == batch) && (t.size(1) == 1 || t.size(1) == heads), name,
                  ": expected leading dimensions [", batch, " or 1, ", heads, " or 1], got ", shape_text(t.sizes()));
  return {t.size(0) == 1 ? 0 : t.stride(0), t.size(1) == 1 ? 0 : t.stride(1)};
}

inline IntervalMaskParams interval_mask(const Tensor& q, const Tensor& k, const OptionalTensor& starts,
                                        const OptionalTensor& ends, const OptionalTensor& key_start,
                                        const OptionalTensor& key_stop, int64_t sink_tokens, int64_t window,
                                        bool causal) {
  const Anchor like_q{q, "q"};
  IntervalMaskParams m{};
  m.tq = q.size(1), m.tk = k.size(1);
  STD_TORCH_CHECK(m.tk < (int64_t{1} << 31) && m.tq < (int64_t{1} << 31), "k: expected fewer than 2^31 tokens, got ",
                  m.tk, " beside ", m.tq, " of q");
  STD_TORCH_CHECK(starts.has_value() == ends.has_value(), "ends: expected together with starts, got one of them");
  STD_TORCH_CHECK(key_start.has_value() == key_stop.has_value(),
                  "key_stop: expected together with key_start, got one of them");
  STD_TORCH_CHECK(sink_tokens >= 0, "sink_tokens: expected >= 0, got ", sink_tokens);
  STD_TORCH_CHECK(window >= -1, "window: expected >= -1, got ", window);
  m.sink_tokens = sink_tokens, m.window = window, m.causal = causal;
  m.intervals = causal && window >= 0 && sink_tokens > 0 ? 2 : 1;
  if (starts.has_value()) {
    std::tie(m.mask_stride_b, m.mask_stride_h) = broadcast_strides(*starts, "starts", 4, ScalarType::Int, like_q);
    m.intervals = starts->size(3);
    STD_TORCH_CHECK(m.intervals >= 1, "starts: expected at least one interval, got none");
    m.starts = int32_of(starts, "starts", {starts->size(0), starts->size(1), m.tq, m.intervals}, like_q);
    m.ends = int32_of(ends, "ends", {starts->size(0), starts->size(1), m.tq, m.intervals}, like_q);
  }
  if (key_start.has_value()) {
    std::tie(m.key_stride_b, m.key_stride_h) = broadcast_strides(*key_start, "key_start", 3, ScalarType::Int, like_q);
    m.key_start = int32_of(key_start, "key_start", {key_start->size(0), key_start->size(1), m.tk}, like_q);
    m.key_stop = int32_of(key_stop, "key_stop", {key_start->size(0), key_start->size(1), m.tk}, like_q);
  }
  return m;
}

/// Everything but the results.
inline IntervalAttentionParams interval_arguments(const Tensor& q, const Tensor& k, const Tensor& v,
                                                  const OptionalTensor& starts, const OptionalTensor& ends,
                                                  const OptionalTensor& key_start, const OptionalTensor& key_stop,
                                                  int64_t sink_tokens, int64_t window, bool causal,
                                                  const OptionalTensor& key_bias, const OptionalTensor& sink_logits,
                                                  const OptionalTensor& alibi_slopes, double scale, double softcap) {
  const Anchor like_q{q, "q"};
  check_head_rows(q, "q", 5, like_q);
  check_head_rows(k, "k", 4, like_q);
  check_head_rows(v, "v", 4, like_q);
  IntervalAttentionParams p{};
  IntervalMaskParams& m = p.mask;
  m = interval_mask(q, k, starts, ends, key_start, key_stop, sink_tokens, window, causal);
  p.batch = q.size(0), p.heads = q.size(2), p.slots = q.size(3), p.d = q.size(4);
  p.kv_heads = k.size(2), p.dv = v.size(3);
  STD_TORCH_CHECK(p.kv_heads > 0 && p.heads % p.kv_heads == 0, "k: expected a number of heads that divides ", p.heads,
                  ", got ", p.kv_heads);
  check_shape(k, "k", {p.batch, m.tk, p.kv_heads, p.d});
  check_shape(v, "v", {p.batch, m.tk, p.kv_heads, p.dv});
  STD_TORCH_CHECK(p.slots == 1 || (starts.has_value() && p.slots == m.intervals),
                  "q: expected one slot, or one for each of ", m.intervals, " intervals of starts, got ", p.slots);
  if (key_bias.has_value()) {
    std::tie(p.bias_stride_b, p.bias_stride_h) = broadcast_strides(*key_bias, "key_bias", 3, ScalarType::Float, like_q);
    p.key_bias = floats_of(key_bias, "key_bias", {key_bias->size(0), key_bias->size(1), m.tk}, like_q);
  }
  p.sink_logits = floats_of(sink_logits, "sink_logits", {p.heads}, like_q);
  if (alibi_slopes.has_value()) {
    check_dims(*alibi_slopes, "alibi_slopes", 2);
    const int64_t rows = alibi_slopes->size(0) == 1 ? 1 : p.batch;
    p.alibi_slopes = floats_of(alibi_slopes, "alibi_slopes", {rows, p.heads}, like_q);
    p.slope_stride_b = rows == 1 ? 0 : p.heads;
  }
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
  p.q_stride_b = q.stride(0), p.q_stride_t = q.stride(1), p.q_stride_h = q.stride(2), p.q_stride_s = q.stride(3);
  p.k_stride_b = k.stride(0), p.k_stride_t = k.stride(1), p.k_stride_h = k.stride(2);
  p.v_stride_b = v.stride(0), p.v_stride_t = v.stride(1), p.v_stride_h = v.stride(2);
  p.scale = static_cast<float>(scale);
  STD_TORCH_CHECK(softcap >= 0, "softcap: expected >= 0, got ", softcap);
  p.softcap = static_cast<float>(softcap);
  return p;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> interval_attention_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& starts, const OptionalTensor& ends,
    const OptionalTensor& key_start, const OptionalTensor& key_stop, int64_t sink_tokens, int64_t window, bool causal,
    const OptionalTensor& key_bias, const OptionalTensor& sink_logits, const OptionalTensor& alibi_slopes, double scale,
    double softcap, [[maybe_unused]] std::vector<Tensor> plan) {
  IntervalAttentionParams p = interval_arguments(q, k, v, starts, ends, key_start, key_stop, sink_tokens, window,
                                                 causal, key_bias, sink_logits, alibi_slopes, scale, softcap);
  const DType dtype = dtype_of(q, "q");
  const Tensor out = empty_on(q, {p.batch, p.mask.tq, p.heads, p.dv}, q.scalar_type());
  const Tensor lse = empty_on(q, {p.batch, p.mask.tq, p.heads}, ScalarType::Float);
  const Tensor stats = empty_on(q, {p.batch, p.mask.tq, p.heads, 2}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = floats_in(lse), p.stats = floats_in(stats);
  Device::forward(p, dtype, q, k, v, starts, ends, key_start, key_stop, key_bias, sink_logits, alibi_slopes, out, lse,
                  stats);
  return {out, lse, stats};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> interval_attention_bwd(
    const Tensor& grad_out, const Tensor& grad_lse, const Tensor& out, const Tensor& stats, const Tensor& q,
    const Tensor& k, const Tensor& v, const OptionalTensor& starts, const OptionalTensor& ends,
    const OptionalTensor& key_start, const OptionalTensor& key_stop, int64_t sink_tokens, int64_t window, bool causal,
    const OptionalTensor& key_bias, const OptionalTensor& sink_logits, const OptionalTensor& alibi_slopes, double scale,
    double softcap, [[maybe_unused]] std::vector<Tensor> plan) {
  const Anchor like_q{q, "q"};
  IntervalAttentionParams p = interval_arguments(q, k, v, starts, ends, key_start, key_stop, sink_tokens, window,
                                                 causal, key_bias, sink_logits, alibi_slopes, scale, softcap);
  const DType dtype = dtype_of(q, "q");
  const int64_t tq = p.mask.tq, tk = p.mask.tk;
  p.out = const_cast<void*>(data_of(out, "out", {p.batch, tq, p.heads, p.dv}, like_q));
  p.stats = const_cast<float*>(floats_of(stats, "stats", {p.batch, tq, p.heads, 2}, like_q));
  IntervalAttentionGrads grads{};
  grads.grad_out = data_of(grad_out, "grad_out", {p.batch, tq, p.heads, p.dv}, like_q);
  grads.grad_lse = floats_of(grad_lse, "grad_lse", {p.batch, tq, p.heads}, like_q);
  const Tensor dq = empty_on(q, {p.batch, tq, p.heads, p.slots, p.d}, q.scalar_type());
  const Tensor dk = empty_on(q, {p.batch, tk, p.kv_heads, p.d}, q.scalar_type());
  const Tensor dv = empty_on(q, {p.batch, tk, p.kv_heads, p.dv}, q.scalar_type());
  const Tensor dkey_bias = empty_if(key_bias.has_value(), q, {p.batch, p.heads, tk}, ScalarType::Float);
  const Tensor delta = empty_on(q, {p.batch, tq, p.heads}, ScalarType::Float);
  grads.dq = dq.mutable_data_ptr(), grads.dk = dk.mutable_data_ptr(), grads.dv = dv.mutable_data_ptr();
  grads.delta = floats_in(delta);
  if (key_bias.has_value()) grads.dkey_bias = floats_in(dkey_bias);
  Device::backward(p, grads, dtype, q, k, v, starts, ends, key_start, key_stop, key_bias, sink_logits, alibi_slopes,
                   out, stats, grad_out, grad_lse, dq, dk, dv, dkey_bias, delta);
  return {dq, dk, dv, dkey_bias, delta};
}

}  // namespace subquad
