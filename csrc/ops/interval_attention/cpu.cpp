// subquad::interval_attention_* on CPU tensors.
#include "ops/interval_attention/cpu.h"

#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

#include "cpu/binding.h"
#include "cpu/isa.h"

namespace subquad::cpu {
namespace {

constexpr int64_t kMaxHeadDim = 256;

void check_rows(const Tensor& t, const char* name, int64_t dims, const Tensor& q) {
  STD_TORCH_CHECK(t.dim() == dims, name, ": expected ", dims, " dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.scalar_type() == q.scalar_type(), name, ": expected the dtype of q");
  const int64_t last = t.size(dims - 1);
  STD_TORCH_CHECK(last >= 1 && last <= kMaxHeadDim, name, ": expected a head dimension in [1, ", kMaxHeadDim, "], got ",
                  last);
  STD_TORCH_CHECK(t.stride(dims - 1) == 1 || last == 1, name, ": expected a contiguous last dimension");
}

/// A contiguous [B|1, H|1, ...] tensor; returns its strides of batch and heads, 0 where broadcast.
std::pair<int64_t, int64_t> broadcast_strides(const Tensor& t, const char* name, int64_t dims, ScalarType dtype,
                                              int64_t batch, int64_t heads) {
  check_contiguous(t, name);
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": wrong dtype");
  STD_TORCH_CHECK(t.dim() == dims, name, ": expected ", dims, " dimensions, got ", t.dim());
  STD_TORCH_CHECK((t.size(0) == 1 || t.size(0) == batch) && (t.size(1) == 1 || t.size(1) == heads), name,
                  ": expected leading dimensions [", batch, " or 1, ", heads, " or 1]");
  return {t.size(0) == 1 ? 0 : t.stride(0), t.size(1) == 1 ? 0 : t.stride(1)};
}

IntervalMaskParams make_mask(const Tensor& q, const Tensor& k, const OptionalTensor& starts, const OptionalTensor& ends,
                             const OptionalTensor& key_start, const OptionalTensor& key_stop, int64_t sink_tokens,
                             int64_t window, bool causal) {
  IntervalMaskParams m{};
  const int64_t batch = q.size(0), heads = q.size(2);
  m.tq = q.size(1);
  m.tk = k.size(1);
  STD_TORCH_CHECK(m.tk < (int64_t{1} << 31) && m.tq < (int64_t{1} << 31), "k: expected fewer than 2^31 tokens");
  STD_TORCH_CHECK(starts.has_value() == ends.has_value(), "ends: expected together with starts");
  STD_TORCH_CHECK(key_start.has_value() == key_stop.has_value(), "key_stop: expected together with key_start");
  STD_TORCH_CHECK(sink_tokens >= 0, "sink_tokens: expected >= 0, got ", sink_tokens);
  STD_TORCH_CHECK(window >= -1, "window: expected >= -1, got ", window);
  m.sink_tokens = sink_tokens;
  m.window = window;
  m.causal = causal;
  m.intervals = causal && window >= 0 && sink_tokens > 0 ? 2 : 1;
  if (starts.has_value()) {
    std::tie(m.mask_stride_b, m.mask_stride_h) = broadcast_strides(*starts, "starts", 4, ScalarType::Int, batch, heads);
    broadcast_strides(*ends, "ends", 4, ScalarType::Int, batch, heads);
    m.intervals = starts->size(3);
    STD_TORCH_CHECK(starts->size(2) == m.tq && m.intervals >= 1, "starts: expected shape [B|1, H|1, ", m.tq,
                    ", m >= 1]");
    for (int64_t i = 0; i < 4; ++i)
      STD_TORCH_CHECK(ends->size(i) == starts->size(i), "ends: expected the shape of starts");
    m.starts = static_cast<const int32_t*>(starts->const_data_ptr());
    m.ends = static_cast<const int32_t*>(ends->const_data_ptr());
  }
  if (key_start.has_value()) {
    std::tie(m.key_stride_b, m.key_stride_h) =
        broadcast_strides(*key_start, "key_start", 3, ScalarType::Int, batch, heads);
    broadcast_strides(*key_stop, "key_stop", 3, ScalarType::Int, batch, heads);
    for (int64_t i = 0; i < 3; ++i)
      STD_TORCH_CHECK(key_stop->size(i) == key_start->size(i), "key_stop: expected the shape of key_start");
    STD_TORCH_CHECK(key_start->size(2) == m.tk, "key_start: expected shape [B|1, H|1, ", m.tk, "]");
    m.key_start = static_cast<const int32_t*>(key_start->const_data_ptr());
    m.key_stop = static_cast<const int32_t*>(key_stop->const_data_ptr());
  }
  return m;
}

IntervalAttentionParams make_params(const Tensor& q, const Tensor& k, const Tensor& v, const IntervalMaskParams& mask,
                                    const OptionalTensor& key_bias, const OptionalTensor& sink_logits, double scale) {
  IntervalAttentionParams p{};
  p.mask = mask;
  p.batch = q.size(0);
  p.heads = q.size(2);
  p.slots = q.size(3);
  p.d = q.size(4);
  p.kv_heads = k.size(2);
  p.dv = v.size(3);
  STD_TORCH_CHECK(p.kv_heads > 0 && p.heads % p.kv_heads == 0, "k: expected a number of heads that divides ", p.heads,
                  ", got ", p.kv_heads);
  STD_TORCH_CHECK(k.size(0) == p.batch && k.size(3) == p.d, "k: expected the batch and head dimension of q");
  STD_TORCH_CHECK(v.size(0) == p.batch && v.size(1) == k.size(1) && v.size(2) == p.kv_heads,
                  "v: expected the batch, length and heads of k");
  STD_TORCH_CHECK(p.slots == 1 || (mask.starts != nullptr && p.slots == mask.intervals),
                  "q: expected one slot, or one for each of ", mask.intervals, " intervals of starts, got ", p.slots);
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.q_stride_b = q.stride(0), p.q_stride_t = q.stride(1), p.q_stride_h = q.stride(2), p.q_stride_s = q.stride(3);
  p.k_stride_b = k.stride(0), p.k_stride_t = k.stride(1), p.k_stride_h = k.stride(2);
  p.v_stride_b = v.stride(0), p.v_stride_t = v.stride(1), p.v_stride_h = v.stride(2);
  if (key_bias.has_value()) {
    std::tie(p.bias_stride_b, p.bias_stride_h) =
        broadcast_strides(*key_bias, "key_bias", 3, ScalarType::Float, p.batch, p.heads);
    STD_TORCH_CHECK(key_bias->size(2) == mask.tk, "key_bias: expected shape [B|1, H|1, ", mask.tk, "]");
    p.key_bias = static_cast<const float*>(key_bias->const_data_ptr());
  }
  if (sink_logits.has_value()) {
    check_contiguous(*sink_logits, "sink_logits");
    STD_TORCH_CHECK(sink_logits->scalar_type() == ScalarType::Float, "sink_logits: expected float32");
    STD_TORCH_CHECK(sink_logits->dim() == 1 && sink_logits->size(0) == p.heads, "sink_logits: expected shape [",
                    p.heads, "]");
    p.sink_logits = static_cast<const float*>(sink_logits->const_data_ptr());
  }
  p.scale = static_cast<float>(scale);
  return p;
}

/// A decoding step of a small model: waking other threads would take as long as the work.
bool is_small(const IntervalAttentionParams& p) {
  constexpr int64_t kSmallProducts = 1 << 18;
  return p.batch * p.heads * p.mask.tq * p.mask.tk * (p.d + p.dv) < kSmallProducts;
}

IntervalAttentionKernels kernels_for(const Tensor& q) {
  return SQ_DISPATCH_ISA(interval_attention_kernels, dtype_of(q, "q"));
}

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v) {
  check_rows(q, "q", 5, q);
  check_rows(k, "k", 4, q);
  check_rows(v, "v", 4, q);
}

std::tuple<Tensor, Tensor> interval_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                                  const OptionalTensor& starts, const OptionalTensor& ends,
                                                  const OptionalTensor& key_start, const OptionalTensor& key_stop,
                                                  int64_t sink_tokens, int64_t window, bool causal,
                                                  const OptionalTensor& key_bias, const OptionalTensor& sink_logits,
                                                  double scale, [[maybe_unused]] std::vector<Tensor> plan) {
  check_inputs(q, k, v);
  const IntervalMaskParams mask = make_mask(q, k, starts, ends, key_start, key_stop, sink_tokens, window, causal);
  IntervalAttentionParams p = make_params(q, k, v, mask, key_bias, sink_logits, scale);
  Tensor out = empty({p.batch, mask.tq, p.heads, p.dv}, q.scalar_type());
  Tensor lse = empty({p.batch, mask.tq, p.heads}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (lse.numel() > 0) {
    const IntervalAttentionKernels kernels = kernels_for(q);
    parallel_items_with_scratch(kernels.forward_items(p), is_small(p), kernels.forward_scratch(p),
                                [&](int64_t item, void* scratch) { kernels.forward(p, item, scratch); });
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> interval_attention_bwd(
    const Tensor& grad_out, const Tensor& grad_lse, const Tensor& out, const Tensor& lse, const Tensor& q,
    const Tensor& k, const Tensor& v, const OptionalTensor& starts, const OptionalTensor& ends,
    const OptionalTensor& key_start, const OptionalTensor& key_stop, int64_t sink_tokens, int64_t window, bool causal,
    const OptionalTensor& key_bias, const OptionalTensor& sink_logits, double scale,
    [[maybe_unused]] std::vector<Tensor> plan) {
  check_inputs(q, k, v);
  const IntervalMaskParams mask = make_mask(q, k, starts, ends, key_start, key_stop, sink_tokens, window, causal);
  IntervalAttentionParams p = make_params(q, k, v, mask, key_bias, sink_logits, scale);
  const int64_t rows = p.batch * mask.tq * p.heads;
  for (const auto& [t, name] : {std::pair{&grad_out, "grad_out"}, {&out, "out"}}) {
    check_contiguous(*t, name);
    STD_TORCH_CHECK(t->scalar_type() == q.scalar_type() && t->numel() == rows * p.dv, name,
                    ": expected dtype and shape of the forward's result");
  }
  for (const auto& [t, name] : {std::pair{&grad_lse, "grad_lse"}, {&lse, "lse"}}) {
    check_contiguous(*t, name);
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->numel() == rows, name,
                    ": expected dtype and shape of the forward's lse");
  }
  Tensor dq = empty({p.batch, mask.tq, p.heads, p.slots, p.d}, q.scalar_type());
  Tensor dk = empty({p.batch, mask.tk, p.kv_heads, p.d}, q.scalar_type());
  Tensor dv = empty({p.batch, mask.tk, p.kv_heads, p.dv}, q.scalar_type());
  Tensor dkey_bias =
      key_bias.has_value() ? empty({p.batch, p.heads, mask.tk}, ScalarType::Float) : empty({0}, ScalarType::Float);
  Tensor delta = empty({p.batch, mask.tq, p.heads}, ScalarType::Float);
  p.out = const_cast<void*>(out.const_data_ptr());
  p.lse = const_cast<float*>(static_cast<const float*>(lse.const_data_ptr()));
  IntervalAttentionGrads grads{};
  grads.grad_out = grad_out.const_data_ptr();
  grads.grad_lse = static_cast<const float*>(grad_lse.const_data_ptr());
  grads.dq = dq.mutable_data_ptr();
  grads.dk = dk.mutable_data_ptr();
  grads.dv = dv.mutable_data_ptr();
  grads.delta = static_cast<float*>(delta.mutable_data_ptr());
  if (key_bias.has_value()) {
    grads.dkey_bias = static_cast<float*>(dkey_bias.mutable_data_ptr());
    std::fill_n(grads.dkey_bias, dkey_bias.numel(), 0.0f);
  }
  if (p.batch == 0) return {dq, dk, dv, dkey_bias, delta};
  const IntervalAttentionKernels kernels = kernels_for(q);
  constexpr int64_t kDeltaRows = 1024, kSumElements = 1 << 15;
  const int64_t delta_items = (rows + kDeltaRows - 1) / kDeltaRows;
  parallel_items(delta_items, delta_items <= 1,
                 [&](int64_t i) { kernels.delta(p, grads, i * kDeltaRows, std::min(rows, (i + 1) * kDeltaRows)); });
  const int64_t dq_parts = kernels.dq_parts(p), elements = dq.numel();
  Tensor parts = empty({dq_parts * elements}, ScalarType::Float);
  auto* part_sums = static_cast<float*>(parts.mutable_data_ptr());
  parallel_items_with_scratch(
      kernels.backward_items(p), is_small(p), kernels.backward_scratch(p, grads),
      [&](int64_t item, void* scratch) { kernels.backward(p, grads, item, part_sums, scratch); });
  if (dq_parts > 0) {
    const int64_t items = (elements + kSumElements - 1) / kSumElements;
    parallel_items(items, items <= 1, [&](int64_t i) {
      kernels.sum_dq(p, grads, part_sums, i * kSumElements, std::min(elements, (i + 1) * kSumElements));
    });
  }
  return {dq, dk, dv, dkey_bias, delta};
}

STABLE_TORCH_LIBRARY_IMPL(subquad, CPU, m) {
  m.impl("interval_attention_fwd", TORCH_BOX(&interval_attention_fwd));
  m.impl("interval_attention_bwd", TORCH_BOX(&interval_attention_bwd));
}

}  // namespace
}  // namespace subquad::cpu
