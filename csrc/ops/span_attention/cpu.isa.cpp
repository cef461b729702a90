// Compiled once per instruction set.
#include "ops/span_attention/cpu.h"

#include "ops/span_attention/cpu_forward.h"
#include "ops/span_attention/cpu_pieces.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using namespace spans;

constexpr int64_t kItemsPerThread = 4;  // as many, where the queries allow it, so that no thread waits long for another
constexpr int64_t kItemPairs = 8192;    // the more pairs meet a tile of keys, the less its loading matters
constexpr int64_t kFewestQueries = 32;

int64_t item_queries(const SpanAttentionParams& p, int64_t threads) {
  const int64_t most = larger(1, kItemPairs / (p.heads / p.kv_heads * p.spans));
  const int64_t wanted = ceil_div(p.batch * p.kv_heads * p.tokens, threads * kItemsPerThread);
  return smaller(smaller(most, larger(kFewestQueries, wanted)), p.tokens);
}

template <class T>
int64_t scratch(const SpanAttentionParams& p, int64_t queries) {
  return ForwardPass<T>(p, queries * (p.heads / p.kv_heads), Arena(nullptr)).bytes();
}

/// The last queries, which may see most, come first.
template <class T>
void run(const SpanAttentionParams& p, int64_t queries, int64_t item, void* memory) {
  const int64_t group = p.heads / p.kv_heads, sequences = p.batch * p.kv_heads, sequence = item % sequences;
  const int64_t first = (ceil_div(p.tokens, queries) - 1 - item / sequences) * queries;
  ForwardPass<T>(p, queries * group, Arena(memory))
      .run({sequence / p.kv_heads, sequence % p.kv_heads, group, first, smaller(queries, p.tokens - first)});
}

bool is_few(const SpanAttentionParams& p) {
  constexpr int64_t kFewTokens = 4, kFewRows = 16;
  return p.tokens <= kFewTokens || p.tokens * (p.heads / p.kv_heads) <= kFewRows;
}

Span span_of_slot(const SpanAttentionParams& p, int64_t slot) {
  const int64_t row = slot / p.spans, h = row % p.heads, t = row / p.heads % p.tokens, b = row / p.heads / p.tokens;
  return span_of(p, b, t, h, slot % p.spans);
}

int64_t piece_count(const SpanAttentionParams& p, int64_t slot) {
  const Span span = span_of_slot(p, slot);
  return span.begin < span.end ? ceil_div(span.end - span.begin, piece_keys(span)) : 0;
}

/// Of a piece: its values, the largest score, the sum of the weights.
int64_t part_floats(const SpanAttentionParams& p) { return value_columns(p) + 16; }

template <class T>
void run_piece(const SpanAttentionParams& p, int64_t slot, int64_t piece, float* part) {
  const Span span = span_of_slot(p, slot);
  const int64_t keys = piece_keys(span), begin = span.begin + piece * keys, cols = value_columns(p);
  Softmax sums{part, 0.0f, 0.0f};
  attend_piece<T>(p, slot / p.spans, begin, smaller(span.end, begin + keys), sums);
  part[cols] = sums.top, part[cols + 1] = sums.sum;
}

template <class T>
void merge_pieces(const SpanAttentionParams& p, const int64_t* first_piece, const float* parts, int64_t row) {
  const int64_t cols = value_columns(p);
  alignas(64) float values[kSpanAttentionMaxDim];
  RowResult<T> result(p, row);
  for (int64_t s = 0; s < p.spans; ++s) {
    Softmax sums{values, kNothing, 0.0f};
    const int64_t slot = row * p.spans + s;
    for (int64_t piece = first_piece[slot]; piece < first_piece[slot + 1]; ++piece) {
      const float* part = parts + piece * part_floats(p);
      sums.add({const_cast<float*>(part), part[cols], part[cols + 1]}, cols);
    }
    result.add(s, sums);
  }
  result.store();
}

}  // namespace

SpanAttentionForward span_attention_forward_kernels(DType dtype) {
  return by_dtype<BFloat16, Half>(dtype, []<class T>(T) -> SpanAttentionForward {
    return {item_queries, scratch<T>, run<T>, is_few, piece_count, part_floats, run_piece<T>, merge_pieces<T>};
  });
}

}  // namespace subquad::cpu::SUBQUAD_ISA
