// The backward pass, compiled once per instruction set.
#include "ops/span_attention/cpu.h"
#include "ops/span_attention/cpu_backward_keys.h"
#include "ops/span_attention/cpu_backward_queries.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using namespace spans;

constexpr int64_t kItems = 64;        // as many of either kind, where the tensors allow it: for many threads
constexpr int64_t kItemPairs = 4096;  // the more pairs meet a tile of keys, the less its loading matters
constexpr int64_t kItemKeys = 512;    // the longer the range, the fewer pairs are met again in the next
constexpr int64_t kFewestQueries = 16;

/// How many of `count` (queries or keys of a head) an item takes. No bits depend on it.
int64_t share(const SpanAttentionParams& p, int64_t count, int64_t fewest, int64_t most) {
  return smaller(larger(fewest, ceil_div(p.batch * p.kv_heads * count, kItems)), most);
}

int64_t item_queries(const SpanAttentionParams& p) {
  return share(p, p.tokens, kFewestQueries, larger(1, kItemPairs / (p.heads / p.kv_heads * p.spans)));
}

int64_t item_keys(const SpanAttentionParams& p) { return round_up(share(p, p.keys, kKeys, kItemKeys), kKeys); }

int64_t query_items(const SpanAttentionParams& p) { return p.batch * p.kv_heads * ceil_div(p.tokens, item_queries(p)); }

template <class T>
int64_t query_scratch(const SpanAttentionParams& p) {
  return QueryGradients<T>(p, {}, nullptr, item_queries(p), Arena(nullptr)).bytes();
}

/// The last queries, which may see most, come first.
template <class T>
void run_queries(const SpanAttentionParams& p, const SpanAttentionGrads& grads, float* terms, int64_t item,
                 void* scratch) {
  const int64_t queries = item_queries(p), blocks = ceil_div(p.tokens, queries), head = item / blocks;
  const int64_t first = (blocks - 1 - item % blocks) * queries;
  QueryGradients<T>(p, grads, terms, queries, Arena(scratch))
      .run({head / p.kv_heads, head % p.kv_heads, p.heads / p.kv_heads, first, smaller(queries, p.tokens - first)});
}

PairList list_of(const SpanAttentionParams& p, int32_t* lists, int64_t head) {
  return {p, lists + head * PairList::ints(p)};
}

void fill_list(const SpanAttentionParams& p, int32_t* lists, int64_t head) {
  list_of(p, lists, head).fill(all_queries(p, head));
}

int64_t key_items(const SpanAttentionParams& p) { return p.batch * p.kv_heads * ceil_div(p.keys, item_keys(p)); }

template <class T>
int64_t key_scratch(const SpanAttentionParams& p, int32_t* lists) {
  int64_t most = 0;
  for (int64_t head = 0; head < p.batch * p.kv_heads; ++head) most = larger(most, list_of(p, lists, head).most());
  return KeyGradients<T>(p, {}, nullptr, most, Arena(nullptr)).bytes();
}

template <class T>
void run_keys(const SpanAttentionParams& p, const SpanAttentionGrads& grads, const float* terms, int32_t* lists,
              int64_t item, void* scratch) {
  const int64_t keys = item_keys(p), ranges = ceil_div(p.keys, keys);
  const int64_t head = item / ranges, first = item % ranges * keys;
  const PairList list = list_of(p, lists, head);
  KeyGradients<T>(p, grads, terms, list.most(), Arena(scratch))
      .run(all_queries(p, head), list, first, smaller(p.keys, first + keys));
}

}  // namespace

SpanAttentionBackward span_attention_backward_kernels(DType dtype) {
  return by_dtype<BFloat16, Half>(dtype, []<class T>(T) -> SpanAttentionBackward {
    return {query_items, query_scratch<T>, run_queries<T>, PairList::ints,
            fill_list,   key_items,        key_scratch<T>, run_keys<T>};
  });
}

}  // namespace subquad::cpu::SUBQUAD_ISA
