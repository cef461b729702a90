// The backward pass, compiled once per instruction set.
#include "ops/span_attention/cpu.h"
#include "ops/span_attention/cpu_backward_keys.h"
#include "ops/span_attention/cpu_backward_queries.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using namespace spans;

constexpr int64_t kItemsPerThread = 4;  // as many, where the tensors allow it, so that no thread waits long for another
constexpr int64_t kFewestPairs = 4096;  // the more pairs, the more of the keys of one are those of the next
constexpr int64_t kMostPairs = 32768;
constexpr int64_t kMostKeys = 512;  // the longer the range, the fewer pairs are met again in the next

/// No bits depend on either.
int64_t item_queries(const SpanAttentionParams& p, int64_t threads) {
  const int64_t pairs = p.heads / p.kv_heads * p.spans, all = p.batch * p.kv_heads * p.tokens;
  const int64_t few = smaller(ceil_div(all, threads), ceil_div(kFewestPairs, pairs));
  const int64_t wanted = larger(few, ceil_div(all, threads * kItemsPerThread));
  return larger(1, smaller(smaller(wanted, larger(1, kMostPairs / pairs)), p.tokens));
}

int64_t item_keys(const SpanAttentionParams& p, int64_t threads) {
  const int64_t wanted = ceil_div(p.batch * p.kv_heads * p.keys, threads * kItemsPerThread);
  return clamp(round_up(wanted, kKeys), kKeys, kMostKeys);
}

template <class T>
int64_t query_scratch(const SpanAttentionParams& p, int64_t queries) {
  return QueryGradients<T>(p, {}, nullptr, queries, Arena(nullptr)).bytes();
}

/// The last queries, which may see most, come first.
template <class T>
void run_queries(const SpanAttentionParams& p, const SpanAttentionGrads& grads, float* terms, int64_t queries,
                 int64_t item, void* scratch) {
  const int64_t blocks = ceil_div(p.tokens, queries), head = item / blocks;
  const int64_t first = (blocks - 1 - item % blocks) * queries;
  QueryGradients<T>(p, grads, terms, queries, Arena(scratch))
      .run({head / p.kv_heads, head % p.kv_heads, p.heads / p.kv_heads, first, smaller(queries, p.tokens - first)});
}

int64_t list_ints(const SpanAttentionParams& p) { return PairList::ints(p, p.tokens * (p.heads / p.kv_heads)); }

PairList list_of(const SpanAttentionParams& p, int32_t* lists, int64_t head) {
  return {p, lists + head * list_ints(p)};
}

void fill_list(const SpanAttentionParams& p, int32_t* lists, int64_t head) {
  list_of(p, lists, head).fill(all_queries(p, head));
}

template <class T>
int64_t key_scratch(const SpanAttentionParams& p, int64_t keys) {
  return KeyGradients<T>(p, {}, nullptr, keys, Arena(nullptr)).bytes();
}

template <class T>
void run_keys(const SpanAttentionParams& p, const SpanAttentionGrads& grads, const float* terms, int32_t* lists,
              int64_t keys, int64_t item, void* scratch) {
  const int64_t ranges = ceil_div(p.keys, keys), head = item / ranges, first = item % ranges * keys;
  KeyGradients<T>(p, grads, terms, keys, Arena(scratch))
      .run(all_queries(p, head), list_of(p, lists, head), first, smaller(p.keys, first + keys));
}

}  // namespace

SpanAttentionBackward span_attention_backward_kernels(DType dtype) {
  return by_dtype<BFloat16, Half>(dtype, []<class T>(T) -> SpanAttentionBackward {
    return {item_queries, query_scratch<T>, run_queries<T>, list_ints,
            fill_list,    item_keys,        key_scratch<T>, run_keys<T>};
  });
}

}  // namespace subquad::cpu::SUBQUAD_ISA
