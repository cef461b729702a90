// The best stripes of a row. One instruction set.
#pragma once

#include "cpu/simd/vec.h"
#include "ops/span_search/params.h"

namespace subquad::cpu::SUBQUAD_ISA::stripes {

/// Up to kSpanSearchMaxSpans stripes, best first; what came first stays first where two are equal.
struct Best {
  float rank[kSpanSearchMaxSpans];
  float score[kSpanSearchMaxSpans];
  int32_t anchor[kSpanSearchMaxSpans];

  void clear(int64_t spans) {
    for (int64_t i = 0; i < spans; ++i) rank[i] = score[i] = -__builtin_inff(), anchor[i] = -1;
  }

  /// NaN and -inf are never better.
  void offer(int64_t spans, float new_rank, float new_score, int32_t new_anchor) {
    if (!(new_rank > rank[spans - 1])) return;
    int64_t i = spans - 1;
    for (; i > 0 && new_rank > rank[i - 1]; --i)
      rank[i] = rank[i - 1], score[i] = score[i - 1], anchor[i] = anchor[i - 1];
    rank[i] = new_rank, score[i] = new_score, anchor[i] = new_anchor;
  }
};

/// The results of row `at`, of all (b, t, h).
inline void store_best(const SpanSearchParams& p, int64_t at, const Best& best) {
  const int64_t token = at / p.heads;
  const int64_t first = larger(p.first[token], 0), last = p.last[token], back = p.back[token], ahead = p.ahead[token];
  for (int64_t s = 0; s < p.spans; ++s) {
    const int64_t to = at * p.spans + s, anchor = best.anchor[s];
    p.score[to] = best.score[s];
    p.anchor[to] = best.anchor[s];
    p.start[to] = anchor < 0 ? -1 : static_cast<int32_t>(larger(anchor - back, first));
    p.end[to] = anchor < 0 ? -1 : static_cast<int32_t>(smaller(anchor + ahead, last));
  }
}

}  // namespace subquad::cpu::SUBQUAD_ISA::stripes
