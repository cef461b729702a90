// Backward pass of attention to spans: the pairs of query and span that meet keys together.
#pragma once

#include "ops/span_attention/cpu_pairs.h"
#include "ops/span_attention/cpu_sums.h"

namespace subquad::cpu::SUBQUAD_ISA::spans {

constexpr int64_t kPairs = 64;  // pairs of a group, side by side in vectors

/// All queries of a batch entry, with the heads that share a key head.
inline Queries all_queries(const SpanAttentionParams& p, int64_t head) {
  return {head / p.kv_heads, head % p.kv_heads, p.heads / p.kv_heads, 0, p.tokens};
}

/// The pairs of some queries, sorted by the cell of keys in which they begin and then by `id`.
class PairList {
 public:
  PairList(const SpanAttentionParams& p, int32_t* memory)
      : p_(p), longest_(memory), ends_(memory + 1), pairs_(reinterpret_cast<Pair*>(ends_ + cells(p))) {}

  /// Of memory for `rows` rows.
  static int64_t ints(const SpanAttentionParams& p, int64_t rows) { return 1 + cells(p) + 3 * rows * p.spans; }

  /// Without those that see nothing.
  void fill(const Queries& queries) {
    for (int64_t i = 0; i < cells(p_); ++i) ends_[i] = 0;
    int64_t longest = 0, count = 0;
    each_pair(queries, [&](const Pair& pair) {
      longest = larger(longest, pair.end - pair.begin);
      ++ends_[pair.begin / kCell];
    });
    for (int64_t i = 0; i < cells(p_); ++i) {
      const int32_t here = ends_[i];
      ends_[i] = static_cast<int32_t>(count);
      count += here;
    }
    each_pair(queries, [&](const Pair& pair) { pairs_[ends_[pair.begin / kCell]++] = pair; });
    *longest_ = static_cast<int32_t>(longest);
  }

  /// Those which may see keys of [first, last); `first` is a multiple of kCell.
  Pairs between(int64_t first, int64_t last) const {
    const int64_t from = before((first - *longest_) / kCell * kCell);
    return {pairs_ + from, before(round_up(last, kCell)) - from};
  }

 private:
  static constexpr int64_t kCell = 16;  // pairs that begin close to each other see much the same

  static int64_t cells(const SpanAttentionParams& p) { return ceil_div(p.keys, kCell); }
  int64_t before(int64_t key) const { return key <= 0 ? 0 : ends_[key / kCell - 1]; }

  template <class Take>
  void each_pair(const Queries& queries, const Take& take) const {
    for (int64_t row = 0, id = 0; row < queries.rows(); ++row) {
      const int64_t at = queries.at(p_, row);
      for (int64_t s = 0; s < p_.spans; ++s, ++id) {
        const Span span = span_of(p_, queries.b, queries.token(row), queries.head(row), s);
        if (span.begin >= span.end || p_.lse[at * p_.softmaxes + s % p_.softmaxes] == kNothing) continue;
        take({static_cast<int32_t>(id), static_cast<int32_t>(span.begin), static_cast<int32_t>(span.end)});
      }
    }
  }

  const SpanAttentionParams& p_;
  int32_t* const longest_;
  int32_t* const ends_;  // [cells]: how many pairs begin in a cell or before it
  Pair* const pairs_;
};

/// Some pairs that follow each other in a list, cut to some keys.
struct PairGroup {
  Pair pairs[kPairs];
  int64_t count;
  int64_t begin, end;          // no pair sees other keys
  int64_t all_begin, all_end;  // keys that all pairs see

  int64_t lanes() const { return round_up(count, kLanes); }
};

/// The groups of a list. How it is cut into groups has no influence on any bits.
class PairGroups {
 public:
  PairGroups(const Pairs& list, int64_t first, int64_t last) : list_(list), first_(first), last_(last) {}

  /// Goes on to the next group; false after the last.
  bool next(PairGroup& group) {
    group.count = 0;
    for (; at_ < list_.count && group.count < kPairs; ++at_) {
      const Pair& pair = list_.pairs[at_];
      const int64_t begin = larger(pair.begin, first_), end = smaller(pair.end, last_);
      if (begin >= end) continue;
      if (group.count == 0) {
        group.begin = group.all_begin = begin, group.end = group.all_end = end;
      } else if (begin >= group.begin + larger(kKeys, (group.end - group.begin) / 2)) {
        break;  // it has too few keys in common with the others
      }
      group.begin = smaller(group.begin, begin), group.end = larger(group.end, end);
      group.all_begin = larger(group.all_begin, begin), group.all_end = smaller(group.all_end, end);
      group.pairs[group.count++] = {pair.id, static_cast<int32_t>(begin), static_cast<int32_t>(end)};
    }
    return group.count > 0;
  }

 private:
  const Pairs list_;
  const int64_t first_, last_;
  int64_t at_ = 0;
};

}  // namespace subquad::cpu::SUBQUAD_ISA::spans
