// Backward pass of attention to spans, second part: the gradients of a range of keys, from all pairs that see them.
#pragma once

#include "ops/span_attention/cpu_backward_scores.h"

namespace subquad::cpu::SUBQUAD_ISA::spans {

/// dk and dv of a range of keys, group of pairs by group of pairs.
template <class T>
class KeyGradients {
  using Tiles = KeyTiles<T>;
  using Tile = typename Tiles::Tile;

 public:
  /// Of up to `keys` keys, a multiple of kKeys.
  KeyGradients(const SpanAttentionParams& p, const SpanAttentionGrads& grads, const float* terms, int64_t keys,
               Arena arena)
      : p_(p),
        grads_(grads),
        terms_(terms),
        q_cols_(columns(p.d)),
        v_cols_(columns(p.dv)),
        keys_(keys),
        dk_(arena.take<float>(keys * q_cols_)),
        dv_(arena.take<float>(keys * v_cols_)),
        x_(arena.take<float>(kKeys * kPairs)),
        d_(arena.take<float>(kKeys * kPairs)),
        scores_(p, grads, true, arena),
        tiles_(p, keys / kKeys, false, arena),
        bytes_(arena.used()) {}

  int64_t bytes() const { return bytes_; }

  /// Keys [first, last), `first` a multiple of kKeys.
  void run(const Queries& queries, const PairList& list, int64_t first, int64_t last) {
    queries_ = &queries, first_ = first;
    zero_words(dk_, keys_ * q_cols_);
    zero_words(dv_, keys_ * v_cols_);
    tiles_.start(queries.b, queries.kv_head);
    PairGroups groups(list.between(first, last), first, last);
    for (PairGroup group; groups.next(group);) add(group);
    store(last - first);
  }

 private:
  void add(const PairGroup& group) {
    const bool finite = scores_.load(*queries_, group);
    for (int64_t i = 0; i < group.count; ++i) {
      const int64_t id = group.pairs[i].id, at = queries_->at(p_, id / p_.spans), s = id % p_.spans;
      const int64_t softmax = at * p_.softmaxes + s % p_.softmaxes;
      const float gate = p_.gate == nullptr ? 1.0f : p_.gate[softmax];
      const float norm = terms_[2 * softmax], c = terms_[2 * softmax + 1];
      scores_.lse[i] = p_.lse[softmax], scores_.factor[i] = gate * norm, scores_.shift[i] = c * norm;
    }
    for (int64_t i = group.begin / kKeys; i < ceil_div(group.end, kKeys); ++i) {
      const Tile& tile = tiles_.at(i);
      const TileRows rows = rows_of(group, tile.key);
      scores_.weigh(group, tile, rows, x_, d_);
      scores_.differentiate(group, rows, x_, d_);
      scores_.hide(group, tile, rows, x_, d_);
      if (finite) {
        add_rows(group, rows, tile.key - first_ + rows.from);
      } else {
        add_seen(group, tile, rows);
      }
    }
  }

  /// The shares of all pairs of a group in the gradients of rows of a tile, which are keys [key, ...) of the range.
  void add_rows(const PairGroup& group, const TileRows& rows, int64_t key) {
    const int64_t at = rows.from * kPairs;
    product<Floats>(rows.count(), v_cols_, group.count, {x_ + at, kPairs, 1}, {scores_.grad, v_cols_},
                    {dv_ + key * v_cols_, v_cols_}, true);
    product<Floats>(rows.count(), q_cols_, group.count, {d_ + at, kPairs, 1}, {scores_.q, q_cols_},
                    {dk_ + key * q_cols_, q_cols_}, true);
  }

  /// The same of pairs that are not finite, which are kept from the keys that they do not see.
  void add_seen(const PairGroup& group, const Tile& tile, const TileRows& rows) {
    for (int64_t j = rows.from; j < rows.to; ++j) {
      const int64_t key = tile.key - first_ + j;
      for (int64_t i = 0; i < group.count; ++i) {
        if (!scores_.sees(tile, j, i)) continue;
        add_row(dv_ + key * v_cols_, scores_.grad + i * v_cols_, v_cols_, x_[j * kPairs + i]);
        add_row(dk_ + key * q_cols_, scores_.q + i * q_cols_, q_cols_, d_[j * kPairs + i]);
      }
    }
  }

  void store(int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
      const int64_t at = (queries_->b * p_.keys + first_ + j) * p_.kv_heads + queries_->kv_head;
      T *dk = static_cast<T*>(grads_.dk) + at * p_.d, *dv = static_cast<T*>(grads_.dv) + at * p_.dv;
      for (int64_t i = 0; i < p_.d; ++i) dk[i] = from_float<T>(dk_[j * q_cols_ + i] * p_.scale);
      for (int64_t i = 0; i < p_.dv; ++i) dv[i] = from_float<T>(dv_[j * v_cols_ + i]);
    }
  }

  const SpanAttentionParams& p_;
  const SpanAttentionGrads& grads_;
  const float* const terms_;
  const Queries* queries_ = nullptr;
  int64_t first_ = 0;
  const int64_t q_cols_, v_cols_, keys_;
  float *const dk_, *const dv_, *const x_, *const d_;
  GroupScores<T> scores_;
  Tiles tiles_;
  const int64_t bytes_;
};

}  // namespace subquad::cpu::SUBQUAD_ISA::spans
