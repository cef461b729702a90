// Binding of interval_attention_fwd: memory-safety checks, then the torch-free launches of interval_attention.cuh.
#include "ops/interval_attention/cuda.cuh"

#include <tuple>
#include <utility>
#include <vector>

#include "cuda/binding.h"

namespace subquad::cuda {
namespace {

void check_rows(const Tensor& t, const char* name, int64_t dims, const Tensor& q) {
  check_dims(t, name, dims);
  check_same_device(t, name, q, "q");
  check_same_dtype(t, name, q, "q");
  const int64_t last = t.size(dims - 1);
  STD_TORCH_CHECK(last >= 1 && last <= kMaxHeadDim, name, ": expected a head dimension in [1, ", kMaxHeadDim, "], got ",
                  last);
  STD_TORCH_CHECK(t.stride(dims - 1) == 1 || last == 1, name, ": expected a contiguous last dimension");
}

/// Strides of batch and heads of a contiguous [B|1, H|1, ...] tensor, 0 where broadcast.
std::pair<int64_t, int64_t> broadcast_strides(const Tensor& t, const char* name, int64_t dims, ScalarType dtype,
                                              const Tensor& q) {
  check_dims(t, name, dims);
  check_contiguous(t, name);
  check_same_device(t, name, q, "q");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": expected ", dtype == ScalarType::Int ? "int32" : "float32");
  const int64_t batch = q.size(0), heads = q.size(2);
  STD_TORCH_CHECK((t.size(0) == 1 || t.size(0) == batch) && (t.size(1) == 1 || t.size(1) == heads), name,
                  ": expected leading dimensions [", batch, " or 1, ", heads, " or 1]");
  return {t.size(0) == 1 ? 0 : t.stride(0), t.size(1) == 1 ? 0 : t.stride(1)};
}

const int32_t* indices(const Tensor& t) { return static_cast<const int32_t*>(t.const_data_ptr()); }

std::tuple<Tensor, Tensor> interval_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                                  const OptionalTensor& starts, const OptionalTensor& ends,
                                                  const OptionalTensor& key_start, const OptionalTensor& key_stop,
                                                  int64_t sink_tokens, int64_t window, bool causal,
                                                  const OptionalTensor& key_bias, const OptionalTensor& sink_logits,
                                                  double scale, std::vector<Tensor> plan) {
  check_rows(q, "q", 5, q);
  check_rows(k, "k", 4, q);
  check_rows(v, "v", 4, q);
  IntervalAttentionParams p{};
  IntervalMaskParams& m = p.mask;
  p.batch = q.size(0), m.tq = q.size(1), p.heads = q.size(2), p.slots = q.size(3), p.d = q.size(4);
  m.tk = k.size(1), p.kv_heads = k.size(2), p.dv = v.size(3);
  STD_TORCH_CHECK(p.kv_heads > 0 && p.heads % p.kv_heads == 0, "k: expected a number of heads that divides ", p.heads,
                  ", got ", p.kv_heads);
  check_shape(k, "k", {p.batch, m.tk, p.kv_heads, p.d});
  check_shape(v, "v", {p.batch, m.tk, p.kv_heads, p.dv});
  STD_TORCH_CHECK(m.tk < (int64_t{1} << 31) && m.tq < (int64_t{1} << 31), "k: expected fewer than 2^31 tokens");
  STD_TORCH_CHECK(sink_tokens >= 0, "sink_tokens: expected >= 0, got ", sink_tokens);
  STD_TORCH_CHECK(window >= -1, "window: expected >= -1, got ", window);
  STD_TORCH_CHECK(starts.has_value() == ends.has_value(), "ends: expected together with starts");
  STD_TORCH_CHECK(key_start.has_value() == key_stop.has_value(), "key_stop: expected together with key_start");
  m.sink_tokens = sink_tokens, m.window = window, m.causal = causal;
  m.intervals = causal && window >= 0 && sink_tokens > 0 ? 2 : 1;
  if (starts.has_value()) {
    std::tie(m.mask_stride_b, m.mask_stride_h) = broadcast_strides(*starts, "starts", 4, ScalarType::Int, q);
    broadcast_strides(*ends, "ends", 4, ScalarType::Int, q);
    m.intervals = starts->size(3);
    STD_TORCH_CHECK(m.intervals >= 1, "starts: expected at least one interval");
    check_shape(*starts, "starts", {starts->size(0), starts->size(1), m.tq, m.intervals});
    check_shape(*ends, "ends", {starts->size(0), starts->size(1), m.tq, m.intervals});
    m.starts = indices(*starts), m.ends = indices(*ends);
  }
  if (key_start.has_value()) {
    std::tie(m.key_stride_b, m.key_stride_h) = broadcast_strides(*key_start, "key_start", 3, ScalarType::Int, q);
    broadcast_strides(*key_stop, "key_stop", 3, ScalarType::Int, q);
    check_shape(*key_start, "key_start", {key_start->size(0), key_start->size(1), m.tk});
    check_shape(*key_stop, "key_stop", {key_start->size(0), key_start->size(1), m.tk});
    m.key_start = indices(*key_start), m.key_stop = indices(*key_stop);
  }
  STD_TORCH_CHECK(p.slots == 1 || (m.starts != nullptr && p.slots == m.intervals),
                  "q: expected one slot, or one for each of ", m.intervals, " intervals of starts, got ", p.slots);
  if (key_bias.has_value()) {
    std::tie(p.bias_stride_b, p.bias_stride_h) = broadcast_strides(*key_bias, "key_bias", 3, ScalarType::Float, q);
    check_shape(*key_bias, "key_bias", {key_bias->size(0), key_bias->size(1), m.tk});
    p.key_bias = static_cast<const float*>(key_bias->const_data_ptr());
  }
  if (sink_logits.has_value()) {
    check_same_device(*sink_logits, "sink_logits", q, "q");
    check_contiguous(*sink_logits, "sink_logits");
    check_shape(*sink_logits, "sink_logits", {p.heads});
    STD_TORCH_CHECK(sink_logits->scalar_type() == ScalarType::Float, "sink_logits: expected float32");
    p.sink_logits = static_cast<const float*>(sink_logits->const_data_ptr());
  }
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
  p.q_stride_b = q.stride(0), p.q_stride_t = q.stride(1), p.q_stride_h = q.stride(2), p.q_stride_s = q.stride(3);
  p.k_stride_b = k.stride(0), p.k_stride_t = k.stride(1), p.k_stride_h = k.stride(2);
  p.v_stride_b = v.stride(0), p.v_stride_t = v.stride(1), p.v_stride_h = v.stride(2);
  p.scale = static_cast<float>(scale);

  const Tensor out = empty_on(q, {p.batch, m.tq, p.heads, p.dv}, q.scalar_type());
  const Tensor lse = empty_on(q, {p.batch, m.tq, p.heads}, ScalarType::Float);
  const Tensor scratch = empty_on(q, {attention_scratch_floats(p)}, ScalarType::Float);
  const LaunchScope scope(q, k, v, starts, ends, key_start, key_stop, key_bias, sink_logits, out, lse, scratch);
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  dispatch_dtype(q, "q", [&](auto element) {
    interval_attention_forward<decltype(element)>(p, static_cast<float*>(scratch.mutable_data_ptr()), scope.stream());
  });
  return {out, lse};
}

}  // namespace
}  // namespace subquad::cuda

SQ_REGISTER_OPS(m) { m.impl("interval_attention_fwd", TORCH_BOX(&subquad::cuda::interval_attention_fwd)); }
