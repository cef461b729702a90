// Arguments and results of sink_attention_step_. `Device` has run(params, dtype, tensors...), where the tensors are all
// that it touches, k first; `Device::scratch(params)` says how many floats of scratch it wants.
#pragma once

#include <tuple>

#include "ops/sink_attention_step/params.h"
#include "torch/checks.h"
#include "torch/unshared.h"

namespace subquad {

/// The data of a state of k's dtype or of `dtype`.
inline void* state_of(const Tensor& t, const char* name, Shape shape, ScalarType dtype, const Anchor& anchor) {
  return const_cast<void*>(data_of(t, name, shape, dtype, anchor));
}

template <class Device>
std::tuple<Tensor, Tensor> sink_attention_step_(
    const Tensor& k, const Tensor& v, const OptionalTensor& q, const Tensor& sink_k, const Tensor& sink_v,
    const Tensor& ring_k, const Tensor& ring_v, const OptionalTensor& k_scale, const OptionalTensor& v_scale,
    const Tensor& seen, const Tensor& written, const Tensor& first, const OptionalTensor& tokens,
    const OptionalTensor& sink_logits, const OptionalTensor& turns, int64_t window, double scale, double rotary_scale,
    bool interleaved, bool rotated, bool absolute, bool together, bool advance) {
  const Anchor like_k{k, "k"};
  check_dims(k, "k", 4);
  check_dims(v, "v", 4);
  check_dims(sink_k, "sink_k", 4);
  check_dims(ring_k, "ring_k", 4);
  SinkAttentionStepParams p{};
  p.batch = k.size(0), p.width = k.size(1), p.kv_heads = k.size(2), p.d = k.size(3), p.dv = v.size(3);
  p.sinks = sink_k.size(2), p.ring = ring_k.size(2);
  STD_TORCH_CHECK(p.kv_heads >= 1 && p.d >= 1 && p.dv >= 1 && p.d <= kSinkMaxDim && p.dv <= kSinkMaxDim,
                  "k: expected heads of 1..", kSinkMaxDim, " elements, got ", p.kv_heads, " of ", p.d, " and ", p.dv);
  STD_TORCH_CHECK(p.ring >= 1 && window >= 0 && window <= p.ring, "window: expected 0..", p.ring,
                  ", the places of ring_k, got ", window);
  const auto strided = [&](const Tensor& t, const char* name, Shape shape) {
    check_device(t, name, like_k);
    check_same_dtype(t, name, like_k);
    check_shape(t, name, shape);
    check_last_contiguous(t, name);
    return t.const_data_ptr();
  };
  p.k = strided(k, "k", {p.batch, p.width, p.kv_heads, p.d});
  p.v = strided(v, "v", {p.batch, p.width, p.kv_heads, p.dv});
  p.k_stride_b = k.stride(0), p.k_stride_t = k.stride(1), p.k_stride_h = k.stride(2);
  p.v_stride_b = v.stride(0), p.v_stride_t = v.stride(1), p.v_stride_h = v.stride(2);
  if (q.has_value()) {
    check_dims(*q, "q", 4);
    p.heads = q->size(2);
    STD_TORCH_CHECK(p.heads >= 1 && p.heads % p.kv_heads == 0, "q: expected a multiple of the ", p.kv_heads,
                    " heads of k, got ", p.heads);
    p.q = strided(*q, "q", {p.batch, p.width, p.heads, p.d});
    p.q_stride_b = q->stride(0), p.q_stride_t = q->stride(1), p.q_stride_h = q->stride(2);
    p.sink_logits = floats_of(sink_logits, "sink_logits", {p.heads}, like_k);
  } else if (sink_logits.has_value()) {  // of nobody's softmax
    check_device(*sink_logits, "sink_logits", like_k);
    check_dtype(*sink_logits, "sink_logits", ScalarType::Float);
  }
  const ScalarType kind = ring_k.scalar_type();
  p.kind = kind == ScalarType::Char            ? RingKind::kInt8
           : kind == ScalarType::Float8_e4m3fn ? RingKind::kFloat8
                                               : RingKind::kPlain;
  STD_TORCH_CHECK(p.kind != RingKind::kPlain || kind == k.scalar_type(), "ring_k: expected ",
                  dtype_name(k.scalar_type()), " as k has, int8 or float8_e4m3fn, got ", dtype_name(kind));
  STD_TORCH_CHECK(
      k_scale.has_value() == (p.kind != RingKind::kPlain) && v_scale.has_value() == (p.kind != RingKind::kPlain),
      "k_scale: expected scales beside a ring of int8 or float8_e4m3fn, and none beside another");
  p.sink_k = state_of(sink_k, "sink_k", {p.batch, p.kv_heads, p.sinks, p.d}, k.scalar_type(), like_k);
  p.sink_v = state_of(sink_v, "sink_v", {p.batch, p.kv_heads, p.sinks, p.dv}, k.scalar_type(), like_k);
  p.ring_k = state_of(ring_k, "ring_k", {p.batch, p.kv_heads, p.ring, p.d}, kind, like_k);
  p.ring_v = state_of(ring_v, "ring_v", {p.batch, p.kv_heads, p.ring, p.dv}, kind, like_k);
  p.k_scale = const_cast<float*>(floats_of(k_scale, "k_scale", {p.batch, p.kv_heads, p.ring}, like_k));
  p.v_scale = const_cast<float*>(floats_of(v_scale, "v_scale", {p.batch, p.kv_heads, p.ring}, like_k));
  p.seen = const_cast<int64_t*>(int64_of(seen, "seen", {p.batch}, like_k));
  p.written = const_cast<int64_t*>(int64_of(written, "written", {p.batch}, like_k));
  p.first = int64_of(first, "first", {p.batch}, like_k);
  p.tokens = int64_of(tokens, "tokens", {p.batch}, like_k);
  if (turns.has_value()) {
    check_dims(*turns, "turns", 1);
    p.rotary = 2 * turns->size(0);
    STD_TORCH_CHECK(p.rotary <= p.d, "turns: expected at most ", p.d / 2, ", one per pair of k's elements, got ",
                    turns->size(0));
    p.turns = reinterpret_cast<const uint64_t*>(int64_of(turns, "turns", {p.rotary / 2}, like_k));
  }
  p.window = window, p.scale = finite(scale, "scale"), p.rotary_scale = static_cast<float>(rotary_scale);
  p.interleaved = interleaved, p.rotated = rotated, p.absolute = absolute, p.together = together, p.advance = advance;
  check_unshared({{sink_k, "sink_k"},
                  {sink_v, "sink_v"},
                  {ring_k, "ring_k"},
                  {ring_v, "ring_v"},
                  {k_scale, "k_scale"},
                  {v_scale, "v_scale"},
                  {seen, "seen"},
                  {written, "written"}},
                 {{k, "k"},
                  {v, "v"},
                  {q, "q"},
                  {first, "first"},
                  {tokens, "tokens"},
                  {sink_logits, "sink_logits"},
                  {turns, "turns"}});
  const DType dtype = dtype_of(k, "k");
  const Tensor out = empty_on(v, {p.batch, p.width, p.heads, p.dv}, v.scalar_type());
  const Tensor lse = empty_on(v, {p.batch, p.width, p.heads}, ScalarType::Float);
  p.out = out.mutable_data_ptr(), p.lse = floats_in(lse);
  const Tensor scratch = empty_on(v, {Device::scratch(p, dtype)}, ScalarType::Float);
  Device::run(p, dtype, floats_in(scratch), k, v, q, sink_k, sink_v, ring_k, ring_v, k_scale, v_scale, seen, written,
              first, tokens, sink_logits, turns, out, lse, scratch);
  return {out, lse};
}

}  // namespace subquad
