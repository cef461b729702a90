// Compiled once per instruction set.
#include "ops/span_search/cpu.h"

#include "ops/span_search/cpu_gradients.h"
#include "ops/span_search/cpu_stripes.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using namespace stripes;

constexpr int64_t kRangeStripes = 128;
constexpr int64_t kManyItems = 32;  // keep threads busy, each with all stripes

int64_t blocks(const SpanSearchParams& p) { return ceil_div(p.tokens, kQueries); }

/// Of the stripes; more than one where queries alone are few items.
int64_t ranges(const SpanSearchParams& p) {
  return p.batch * p.kv_heads * blocks(p) < kManyItems ? larger(1, ceil_div(p.stripes, kRangeStripes)) : 1;
}

int64_t items(const SpanSearchParams& p) { return p.batch * p.kv_heads * blocks(p) * ranges(p); }

constexpr int64_t kBestFloats = sizeof(Best) / sizeof(float);

int64_t part_floats(const SpanSearchParams& p) {
  return ranges(p) > 1 ? ranges(p) * p.batch * p.tokens * p.heads * kBestFloats : 0;
}

/// What was found in a range for row `at`, of all (b, t, h).
Best* part(const SpanSearchParams& p, const float* parts, int64_t range, int64_t at) {
  const int64_t rows = p.batch * p.tokens * p.heads;
  return reinterpret_cast<Best*>(const_cast<float*>(parts)) + range * rows + at;
}

template <class T>
int64_t scratch(const SpanSearchParams& p) {
  return StripeSearch<T>(p, Arena(nullptr)).bytes();
}

/// The last queries, which have most stripes, come first.
template <class T>
void run(const SpanSearchParams& p, int64_t item, float* parts, void* memory) {
  const int64_t all = ranges(p), range = item % all, sequences = p.batch * p.kv_heads, group = p.heads / p.kv_heads;
  const int64_t sequence = item / all % sequences, b = sequence / p.kv_heads, kv_head = sequence % p.kv_heads;
  const int64_t first = (blocks(p) - 1 - item / all / sequences) * kQueries,
                count = smaller(kQueries, p.tokens - first);
  StripeSearch<T> search(p, Arena(memory));
  const int64_t begin = range * kRangeStripes;
  search.run(b, kv_head, first, count, begin, all > 1 ? smaller(p.stripes, begin + kRangeStripes) : p.stripes);
  for (int64_t row = 0; row < count * group; ++row) {
    const int64_t at = (b * p.tokens + first + row / group) * p.heads + kv_head * group + row % group;
    if (all > 1) {
      *part(p, parts, range, at) = search.best(row);
    } else {
      store_best(p, at, search.best(row));
    }
  }
}

void merge(const SpanSearchParams& p, const float* parts, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; ++at) {
    Best best;
    best.clear(p.spans);
    for (int64_t range = ranges(p) - 1; range >= 0; --range) {
      const Best& found = *part(p, parts, range, at);
      for (int64_t s = 0; s < p.spans; ++s) best.offer(p.spans, found.rank[s], found.score[s], found.anchor[s]);
    }
    store_best(p, at, best);
  }
}

}  // namespace

SpanSearchKernels span_search_kernels(DType dtype) {
  return by_dtype<BFloat16, Half>(dtype, []<class T>(T) -> SpanSearchKernels {
    return {items, part_floats, scratch<T>, run<T>, merge, dq<T>, sort, dk<T>};
  });
}

}  // namespace subquad::cpu::SUBQUAD_ISA
