// subquad::gated_linear_attention_* on CPU tensors.
#include "ops/gated_linear_attention/cpu.h"

#include "common/integers.h"
#include "cpu/threads.h"
#include "ops/gated_linear_attention/arguments.h"
#include "torch/register.h"

namespace subquad::cpu {
namespace {

constexpr int64_t kMaxGroup = 4;  // states of a group stay in the cache

/// Neighbouring states that walk together: as many as leave every thread a group.
int64_t group_of(const GatedLinearAttentionParams& p) {
  return clamp(p.sequences * p.states / thread_count(), 1, kMaxGroup);
}

/// A few tokens: waking other threads would take as long as the work.
bool is_small(const GatedLinearAttentionParams& p) {
  constexpr int64_t kSmallProducts = 1 << 18;
  return larger(p.q.heads, p.states) * p.sequences * p.tokens * p.dk * p.dv < kSmallProducts;
}

/// Parts of a sequence, where there are threads enough for so many parts of each. A part goes through all before it
/// for the state, which takes 0.4 of the time: with more of them than this little is gained, nothing without queries.
int64_t shares_of(const GatedLinearAttentionParams& p) {
  constexpr int64_t kMostShares = 6;
  return is_small(p) || p.q.heads == 0
             ? 1
             : clamp(thread_count() / (p.sequences * ceil_div(p.states, p.group)), 1, kMostShares);
}

constexpr int64_t kSlice = 16;  // columns of a state for a thread are a multiple of this

/// Slices of the columns of a state, at most `wanted`.
int64_t slices_of(int64_t columns, int64_t wanted) {
  const int64_t most = ceil_div(columns, kSlice), each = ceil_div(most, clamp(wanted, 1, most));
  return ceil_div(most, each);
}

struct Cpu {
  static void forward(GatedLinearAttentionParams p, DType dtype, const Tensor& q, const auto&...) {
    p.group = group_of(p);
    const int64_t rows = q.size(0) * p.tokens;
    advise_huge_pages(p.o, rows * p.q.heads * p.dv * static_cast<int64_t>(q.element_size()));
    const GatedLinearAttentionKernels kernels = SQ_DISPATCH_ISA(gated_linear_attention_kernels, dtype);
    p.shares = p.local.reach == nullptr ? shares_of(p) : 1;
    parallel_items_with_scratch(kernels.forward_items(p), is_small(p), kernels.forward_scratch(p),
                                [&](int64_t item, void* scratch) { kernels.forward(p, item, scratch); });
  }

  static void local_forward(GatedLinearAttentionParams p, DType dtype, const Tensor& q, const auto&... tensors) {
    advise_huge_pages(p.local.sums, q.size(0) * p.tokens * p.q.heads * p.dv * static_cast<int64_t>(sizeof(float)));
    forward(p, dtype, q, tensors...);
  }

  static void enter(GatedLinearAttentionParams p, DType dtype, const auto&...) {
    p.group = group_of(p);
    const GatedLinearAttentionKernels kernels = SQ_DISPATCH_ISA(gated_linear_attention_kernels, dtype);
    parallel_items_with_scratch(kernels.enter_items(p), is_small(p), kernels.enter_scratch(p),
                                [&](int64_t item, void* scratch) { kernels.enter(p, item, scratch); });
  }

  static void backward(GatedLinearAttentionParams p, const GatedLinearAttentionGrads& grads, DType dtype,
                       const Tensor& q, const auto&...) {
    p.group = group_of(p);
    const int64_t rows = q.size(0) * p.tokens, element = static_cast<int64_t>(q.element_size());
    const int64_t gates = p.g.heads * (p.gate == GateKind::kChannel ? p.dk : 1);
    advise_huge_pages(grads.dq, rows * p.q.heads * p.dk * element);
    advise_huge_pages(grads.dk, rows * p.k.heads * p.dk * element);
    advise_huge_pages(grads.dv, rows * p.v.heads * p.dv * element);
    advise_huge_pages(grads.dg, rows * gates * (p.gate_is_float ? static_cast<int64_t>(sizeof(float)) : element));
    const GatedLinearAttentionKernels kernels = SQ_DISPATCH_ISA(gated_linear_attention_kernels, dtype);
    parallel_items_with_scratch(kernels.backward_items(p), is_small(p), kernels.backward_scratch(p),
                                [&](int64_t item, void* scratch) { kernels.backward(p, grads, item, scratch); });
  }

  static void step(const GlaStepParams& p, DType dtype, const auto&...) {
    constexpr int64_t kSmallState = 1 << 16;
    const GatedLinearAttentionKernels kernels = SQ_DISPATCH_ISA(gated_linear_attention_kernels, dtype);
    const int64_t items = p.batch * p.states;
    const bool small = items * p.dk * p.dv < kSmallState;
    const auto whole = [&](int64_t item) { kernels.step(p, item, 0, p.dv, nullptr); };
    if (p.batch > 1 || items == 0) return parallel_items(items, small, whole);
    if (small || items >= thread_count()) return parallel_shares(items, small, whole);
    const int64_t slices = slices_of(p.dv, ceil_div(thread_count(), items));
    const int64_t width = kSlice * ceil_div(ceil_div(p.dv, kSlice), slices);
    const Scratch memory(p.batch * p.q_heads * static_cast<int64_t>(sizeof(float)));
    auto* const inverses = static_cast<float*>(memory.at(0));
    for (int64_t item = 0; item < items; ++item) kernels.step_totals(p, item, inverses);
    parallel_shares(items * slices, false, [&](int64_t i) {
      const int64_t first = i % slices * width;
      kernels.step(p, i / slices, first, smaller(width, p.dv - first), inverses);
    });
  }
};

}  // namespace

SQ_REGISTER_OPS(m) {
  m.impl("gated_linear_attention_fwd", TORCH_BOX(&gated_linear_attention_fwd<Cpu>));
  m.impl("gated_linear_attention_local_fwd", TORCH_BOX(&gated_linear_attention_local_fwd<Cpu>));
  m.impl("gated_linear_attention_enter_", TORCH_BOX(&gated_linear_attention_enter_<Cpu>));
  m.impl("gated_linear_attention_bwd", TORCH_BOX(&gated_linear_attention_bwd<Cpu>));
  m.impl("gated_linear_attention_step_", TORCH_BOX(&gated_linear_attention_step_<Cpu>));
}

}  // namespace subquad::cpu
