// subquad::span_attention_* on CPU tensors.
#include "ops/span_attention/cpu.h"

#include <vector>

#include "common/integers.h"
#include "cpu/threads.h"
#include "ops/span_attention/arguments.h"
#include "torch/register.h"

namespace subquad::cpu {
namespace {

/// So many pairs of so many keys: waking other threads would take as long as the work.
bool is_small(int64_t pairs, int64_t keys, const SpanAttentionParams& p) {
  constexpr double kSmallProducts = 1 << 18;
  return static_cast<double>(pairs) * static_cast<double>(keys * (p.d + p.dv)) < kSmallProducts;
}

struct Cpu {
  static void forward(const SpanAttentionParams& p, DType dtype, const Tensor& q, const auto&...) {
    const int64_t rows = p.batch * p.tokens * p.heads;
    if (rows == 0) return;
    const SpanAttentionForward kernels = SQ_DISPATCH_ISA(span_attention_forward_kernels, dtype);
    if (kernels.is_few(p)) return forward_of_few(p, kernels, q);
    const bool small = is_small(rows * p.spans, p.keys, p);
    const int64_t queries = kernels.item_queries(p, small ? 1 : thread_count());
    parallel_items_with_scratch(p.batch * p.kv_heads * ceil_div(p.tokens, queries), small, kernels.scratch(p, queries),
                                [&](int64_t item, void* scratch) { kernels.run(p, queries, item, scratch); });
  }

  static void backward(const SpanAttentionParams& p, const SpanAttentionGrads& grads, DType dtype, const Tensor& q,
                       const auto&...) {
    const int64_t rows = p.batch * p.tokens * p.heads, heads = p.batch * p.kv_heads;
    STD_TORCH_CHECK(heads == 0 || rows / heads * p.spans < (int64_t{1} << 31),
                    "start: expected fewer than 2^31 spans for each head of k, got ", rows / heads * p.spans);
    const SpanAttentionBackward kernels = SQ_DISPATCH_ISA(span_attention_backward_kernels, dtype);
    const bool small = is_small(rows * p.spans, p.keys, p);
    const int64_t threads = small ? 1 : thread_count();
    const int64_t queries = kernels.item_queries(p, threads), keys = kernels.item_keys(p, threads);
    const Tensor memory = empty_on(q, {rows * p.softmaxes * 2}, ScalarType::Float);
    const Tensor pairs = empty_on(q, {heads * kernels.list_ints(p)}, ScalarType::Int);
    float* terms = floats_in(memory);
    auto* lists = static_cast<int32_t*>(pairs.mutable_data_ptr());
    parallel_items_with_scratch(
        heads * ceil_div(p.tokens, queries), small, kernels.query_scratch(p, queries),
        [&](int64_t item, void* scratch) { kernels.run_queries(p, grads, terms, queries, item, scratch); });
    parallel_items(heads, small, [&](int64_t head) { kernels.fill_list(p, lists, head); });
    parallel_items_with_scratch(
        heads * ceil_div(p.keys, keys), small, kernels.key_scratch(p, keys),
        [&](int64_t item, void* scratch) { kernels.run_keys(p, grads, terms, lists, keys, item, scratch); });
  }

 private:
  static void forward_of_few(const SpanAttentionParams& p, const SpanAttentionForward& kernels, const Tensor& q) {
    const int64_t rows = p.batch * p.tokens * p.heads, slots = rows * p.spans, floats = kernels.part_floats(p);
    std::vector<int64_t> first_piece(static_cast<size_t>(slots) + 1), slot_of;
    for (int64_t slot = 0; slot < slots; ++slot) {
      first_piece[slot] = static_cast<int64_t>(slot_of.size());
      slot_of.insert(slot_of.end(), static_cast<size_t>(kernels.piece_count(p, slot)), slot);
    }
    const auto pieces = static_cast<int64_t>(slot_of.size());
    first_piece[slots] = pieces;
    const Tensor memory = empty_on(q, {pieces * floats}, ScalarType::Float);
    float* parts = floats_in(memory);
    constexpr int64_t kPieceKeys = 512;
    const bool small = is_small(pieces, smaller(kPieceKeys, p.keys), p);
    parallel_items(pieces, small, [&](int64_t i) {
      kernels.run_piece(p, slot_of[i], i - first_piece[slot_of[i]], parts + i * floats);
    });
    parallel_items(rows, small, [&](int64_t row) { kernels.merge_pieces(p, first_piece.data(), parts, row); });
  }
};

}  // namespace

SQ_REGISTER_OPS(m) {
  m.impl("span_attention_fwd", TORCH_BOX(&span_attention_fwd<Cpu>));
  m.impl("span_attention_bwd", TORCH_BOX(&span_attention_bwd<Cpu>));
}

}  // namespace subquad::cpu
