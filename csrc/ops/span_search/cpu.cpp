// subquad::span_search_* on CPU tensors.
#include "ops/span_search/cpu.h"

#include <vector>

#include "common/integers.h"
#include "cpu/threads.h"
#include "ops/span_search/arguments.h"
#include "torch/register.h"

namespace subquad::cpu {
namespace {

constexpr int64_t kSmallProducts = 1 << 18;  // waking other threads would take as long as the work

struct Cpu {
  static void forward(const SpanSearchParams& p, DType dtype, const Tensor& q, const auto&...) {
    const int64_t rows = p.batch * p.tokens * p.heads;
    if (rows == 0) return;
    const SpanSearchKernels kernels = SQ_DISPATCH_ISA(span_search_kernels, dtype);
    const bool small = rows * p.stripes * p.d < kSmallProducts;
    const Tensor memory = empty_on(q, {kernels.part_floats(p)}, ScalarType::Float);
    float* parts = floats_in(memory);
    parallel_items_with_scratch(kernels.items(p), small, kernels.scratch(p),
                                [&](int64_t item, void* scratch) { kernels.run(p, item, parts, scratch); });
    if (memory.numel() == 0) return;
    constexpr int64_t kMergedRows = 64;
    const int64_t merges = ceil_div(rows, kMergedRows);
    parallel_items(merges, merges <= 1,
                   [&](int64_t i) { kernels.merge(p, parts, i * kMergedRows, smaller(rows, (i + 1) * kMergedRows)); });
  }

  static void backward(const SpanSearchGrads& p, DType dtype, const auto&...) {
    const SpanSearchKernels kernels = SQ_DISPATCH_ISA(span_search_kernels, dtype);
    constexpr int64_t kRows = 256;
    const int64_t rows = p.batch * p.tokens * p.heads, row_items = ceil_div(rows, kRows);
    parallel_items(row_items, row_items <= 1,
                   [&](int64_t i) { kernels.dq(p, i * kRows, smaller(rows, (i + 1) * kRows)); });
    const int64_t sequences = p.batch * p.kv_heads, items = ceil_div(p.keys, kRows);
    if (sequences * p.keys == 0) return;
    const int64_t pair_count = p.tokens * (p.heads / p.kv_heads) * p.spans;
    std::vector<int64_t> pairs(static_cast<size_t>(sequences * pair_count));
    std::vector<int64_t> ends(static_cast<size_t>(sequences * p.keys));
    const bool small = sequences * items <= 1;
    parallel_items(sequences, small,
                   [&](int64_t i) { kernels.sort(p, i, pairs.data() + i * pair_count, ends.data() + i * p.keys); });
    parallel_items(sequences * items, small, [&](int64_t i) {
      const int64_t sequence = i / items, begin = i % items * kRows;
      kernels.dk(p, sequence, pairs.data() + sequence * pair_count, ends.data() + sequence * p.keys, begin,
                 smaller(p.keys, begin + kRows));
    });
  }
};

}  // namespace

SQ_REGISTER_OPS(m) {
  m.impl("span_search_fwd", TORCH_BOX(&span_search_fwd<Cpu>));
  m.impl("span_search_bwd", TORCH_BOX(&span_search_bwd<Cpu>));
}

}  // namespace subquad::cpu
