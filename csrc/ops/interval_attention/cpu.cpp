// subquad::interval_attention_* on CPU tensors.
#include "ops/interval_attention/cpu.h"

#include <algorithm>

#include "common/integers.h"
#include "cpu/threads.h"
#include "ops/interval_attention/arguments.h"
#include "torch/register.h"

namespace subquad::cpu {
namespace {

/// A decoding step of a small model: waking other threads would take as long as the work.
bool is_small(const IntervalAttentionParams& p) {
  constexpr int64_t kSmallProducts = 1 << 18;
  return p.batch * p.heads * p.mask.tq * p.mask.tk * (p.d + p.dv) < kSmallProducts;
}

struct Cpu {
  static void forward(const IntervalAttentionParams& p, DType dtype, const Tensor& q, const auto&...) {
    const int64_t rows = p.batch * p.mask.tq * p.heads;
    if (rows == 0) return;
    const IntervalAttentionKernels kernels = SQ_DISPATCH_ISA(interval_attention_kernels, dtype);
    constexpr int64_t kMergedRows = 16;
    const Tensor memory = empty_on(q, {kernels.part_floats(p)}, ScalarType::Float);
    float* parts = floats_in(memory);
    parallel_items_with_scratch(kernels.forward_items(p), is_small(p), kernels.forward_scratch(p),
                                [&](int64_t item, void* scratch) { kernels.forward(p, item, parts, scratch); });
    if (memory.numel() == 0) return;
    const int64_t items = ceil_div(rows, kMergedRows);
    parallel_items(items, items <= 1, [&](int64_t i) {
      kernels.merge_parts(p, parts, i * kMergedRows, smaller(rows, (i + 1) * kMergedRows));
    });
  }

  static void backward(const IntervalAttentionParams& p, const IntervalAttentionGrads& grads, DType dtype,
                       const Tensor& q, const auto&...) {
    const int64_t rows = p.batch * p.mask.tq * p.heads;
    if (grads.dkey_bias != nullptr) std::fill_n(grads.dkey_bias, p.batch * p.heads * p.mask.tk, 0.0f);
    if (p.batch == 0) return;
    const IntervalAttentionKernels kernels = SQ_DISPATCH_ISA(interval_attention_kernels, dtype);
    constexpr int64_t kDeltaRows = 1024, kSumRows = 256;
    const int64_t delta_items = ceil_div(rows, kDeltaRows);
    parallel_items(delta_items, delta_items <= 1,
                   [&](int64_t i) { kernels.delta(p, grads, i * kDeltaRows, smaller(rows, (i + 1) * kDeltaRows)); });
    const Tensor parts = empty_on(q, {kernels.dq_floats(p)}, ScalarType::Float);
    float* sums = floats_in(parts);
    parallel_items_with_scratch(kernels.backward_items(p), is_small(p), kernels.backward_scratch(p, grads),
                                [&](int64_t item, void* scratch) { kernels.backward(p, grads, item, sums, scratch); });
    if (parts.numel() == 0) return;
    const int64_t items = ceil_div(rows, kSumRows);
    parallel_items(items, items <= 1,
                   [&](int64_t i) { kernels.sum_dq(p, grads, sums, i * kSumRows, smaller(rows, (i + 1) * kSumRows)); });
  }
};

}  // namespace

SQ_REGISTER_OPS(m) {
  m.impl("interval_attention_fwd", TORCH_BOX(&interval_attention_fwd<Cpu>));
  m.impl("interval_attention_bwd", TORCH_BOX(&interval_attention_bwd<Cpu>));
}

}  // namespace subquad::cpu
