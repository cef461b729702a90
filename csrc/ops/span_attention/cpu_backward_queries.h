// Backward pass of attention to spans, first part: the gradients of some queries and of what belongs to them.
#pragma once

#include "ops/span_attention/cpu_backward_scores.h"

namespace subquad::cpu::SUBQUAD_ISA::spans {

/// dq, dgate, dbase_out, dbase_lse and the terms of some queries. With gates, c is not known before all keys of a pair
/// are: they are looked at twice. What the first look has computed is kept, unless a span is very long.
template <class T>
class QueryGradients {
  using Tiles = KeyTiles<T>;
  using Tile = typename Tiles::Tile;

 public:
  QueryGradients(const SpanAttentionParams& p, const SpanAttentionGrads& grads, float* terms, int64_t queries,
                 Arena arena)
      : p_(p),
        grads_(grads),
        terms_(terms),
        mixed_(p.gate != nullptr),
        q_cols_(columns(p.d)),
        rows_(queries * (p.heads / p.kv_heads)),
        list_(p, arena.take<int32_t>(PairList::ints(p, rows_))),
        row_dq_(arena.take<float>(rows_ * q_cols_)),
        row_sum_(arena.take<float>(mixed_ ? 0 : rows_)),
        to_base_(arena.take<float>(rows_)),
        dq_(arena.take<float>(kPairs * q_cols_)),
        x_(arena.take<float>((mixed_ ? kKept : 1) * kKeys * kPairs)),
        d_(arena.take<float>((mixed_ ? kKept : 1) * kKeys * kPairs)),
        scores_(p, grads, false, arena),
        tiles_(p, kTiles, true, arena),
        bytes_(arena.used()) {}

  int64_t bytes() const { return bytes_; }

  void run(const Queries& queries) {
    queries_ = &queries;
    for (int64_t row = 0; row < queries.rows(); ++row) start(row);
    zero_words(row_dq_, queries.rows() * q_cols_);
    list_.fill(queries);
    tiles_.start(queries.b, queries.kv_head);
    PairGroups groups(list_.between(0, p_.keys), 0, p_.keys);
    for (PairGroup group; groups.next(group);) add(group);
    for (int64_t row = 0; row < queries.rows(); ++row) finish(row);
  }

 private:
  static constexpr int64_t kTiles = 24;  // of keys, at hand
  static constexpr int64_t kKept = 128;  // of scores

  bool is_based(int64_t at) const { return p_.base_lse != nullptr && p_.base_lse[at] != kNothing; }
  const T* grad_of(int64_t at) const { return static_cast<const T*>(grads_.grad_out) + at * p_.dv; }

  /// What is known of a row before its pairs have met their keys.
  void start(int64_t row) {
    const int64_t at = queries_->at(p_, row);
    to_base_[row] = is_based(at) ? dot_of(grad_of(at), static_cast<const T*>(p_.base_out) + at * p_.dv, p_.dv) : 0.0f;
    if (mixed_) {
      for (int64_t s = 0; s < p_.spans; ++s) settle(row, s, 0.0f, 0.0f);
    } else {
      const float delta = dot_of(grad_of(at), static_cast<const T*>(p_.out) + at * p_.dv, p_.dv);
      row_sum_[row] = 0.0f;
      terms_[2 * at + 1] = delta - grads_.grad_lse[at];
    }
  }

  /// dgate and the terms of a span with a gate: `sum` of its weights e^(score - lse), `e` of the weights times u.
  void settle(int64_t row, int64_t s, float sum, float e) {
    const int64_t at = queries_->at(p_, row), softmax = at * p_.spans + s;
    float norm = 0.0f, delta = 0.0f, c = 0.0f;
    if (p_.lse[softmax] != kNothing) {
      const float weight = is_based(at) ? exp_of(p_.base_lse[at] - p_.lse[softmax]) : 0.0f;
      norm = 1.0f / (sum + weight);
      delta = e * norm + weight * norm * to_base_[row];
      c = p_.gate[softmax] * delta - grads_.grad_lse[softmax];
    }
    grads_.dgate[softmax] = delta;
    terms_[2 * softmax] = norm, terms_[2 * softmax + 1] = c;
  }

  void add(const PairGroup& group) {
    scores_.load(*queries_, group);
    for (int64_t i = 0; i < kPairs; ++i) sum_[i] = e_[i] = 0.0f;
    for (int64_t i = 0; i < group.count; ++i) {
      const int64_t at = queries_->at(p_, group.pairs[i].id / p_.spans);
      scores_.lse[i] = p_.lse[mixed_ ? at * p_.spans + group.pairs[i].id % p_.spans : at];
      if (!mixed_) scores_.factor[i] = 1.0f, scores_.shift[i] = terms_[2 * at + 1];
    }
    const int64_t first = group.begin / kKeys, last = ceil_div(group.end, kKeys);
    const bool kept = mixed_ && last - first <= kKept;
    if (mixed_) {
      for (int64_t i = first; i < last; ++i) look(group, tiles_.at(i), kept ? i - first : 0);
      for (int64_t i = 0; i < group.count; ++i) settle(group.pairs[i].id, i);
    }
    zero_words(dq_, kPairs * q_cols_);
    for (int64_t i = first; i < last; ++i) {
      const Tile& tile = tiles_.at(i);
      if (!kept) look(group, tile, 0);
      add_keys(group, tile, kept ? i - first : 0);
    }
    for (int64_t i = 0; i < group.count; ++i) {
      const int64_t row = group.pairs[i].id / p_.spans;
      add_row(row_dq_ + row * q_cols_, dq_ + i * q_cols_, q_cols_, 1.0f);
      if (!mixed_) row_sum_[row] += sum_[i];
    }
  }

  /// Weights and u of a tile, and their sums, which are made tile by tile so that long ones are exact too.
  void look(const PairGroup& group, const Tile& tile, int64_t slot) {
    const TileRows rows = rows_of(group, tile.key);
    float *x = x_ + slot * kKeys * kPairs, *d = d_ + slot * kKeys * kPairs;
    scores_.weigh(group, tile, rows, x, d);
    scores_.hide(group, tile, rows, x, d);
    for (int64_t i = 0; i < group.lanes(); i += kLanes) {
      Vec sum = vec_zero(), e = vec_zero();
      for (int64_t j = rows.from; j < rows.to; ++j) {
        const Vec weight = vec_load(x + j * kPairs + i);
        sum = vec_add(sum, weight);
        e = vec_fma(weight, vec_load(d + j * kPairs + i), e);
      }
      vec_store(sum_ + i, vec_add(vec_load(sum_ + i), sum));
      vec_store(e_ + i, vec_add(vec_load(e_ + i), e));
    }
  }

  void settle(int64_t id, int64_t i) {
    const int64_t row = id / p_.spans, s = id % p_.spans, softmax = queries_->at(p_, row) * p_.spans + s;
    settle(row, s, sum_[i], e_[i]);
    const float norm = terms_[2 * softmax], c = terms_[2 * softmax + 1];
    scores_.factor[i] = p_.gate[softmax] * norm, scores_.shift[i] = c * norm;
  }

  /// dq += (gradients of the scores) k. A key that is not finite is kept from the pairs that do not see it.
  void add_keys(const PairGroup& group, const Tile& tile, int64_t slot) {
    const TileRows rows = rows_of(group, tile.key);
    float *x = x_ + slot * kKeys * kPairs, *d = d_ + slot * kKeys * kPairs;
    scores_.differentiate(group, rows, x, d);
    if (tile.k_finite) {
      const int64_t at = rows.from;
      return product<Floats>(group.lanes(), q_cols_, rows.count(), {d + at * kPairs, 1, kPairs},
                             {const_cast<float*>(tile.k) + at * q_cols_, q_cols_}, {dq_, q_cols_}, true);
    }
    for (int64_t i = 0; i < group.count; ++i)
      for (int64_t j = rows.from; j < rows.to; ++j)
        if (scores_.sees(tile, j, i)) add_row(dq_ + i * q_cols_, tile.k + j * q_cols_, q_cols_, d[j * kPairs + i]);
  }

  /// Results of a row, all of whose pairs have met their keys.
  void finish(int64_t row) {
    const int64_t at = queries_->at(p_, row);
    const bool based = is_based(at);
    float base_weight = 0.0f, dbase_lse = 0.0f, factor = p_.scale;
    for (int64_t s = 0; s < p_.softmaxes; ++s) {
      const int64_t softmax = at * p_.softmaxes + s;
      float *norm = terms_ + 2 * softmax, *c = norm + 1;
      float weight = based ? exp_of(p_.base_lse[at] - p_.lse[softmax]) : 0.0f;
      if (!mixed_) {
        const bool any = p_.lse[softmax] != kNothing;
        *norm = any ? 1.0f / (row_sum_[row] + weight) : 0.0f;
        *c = any ? *c : 0.0f;
        factor *= *norm;
      }
      weight *= *norm;
      const float gate = mixed_ ? p_.gate[softmax] : 1.0f;
      base_weight += gate * weight;
      dbase_lse += weight * (gate * to_base_[row] - *c);
    }
    T* dq = static_cast<T*>(grads_.dq) + at * p_.d;
    for (int64_t i = 0; i < p_.d; ++i) dq[i] = from_float<T>(row_dq_[row * q_cols_ + i] * factor);
    if (p_.base_lse == nullptr) return;
    const T* grad = grad_of(at);
    T* dbase_out = static_cast<T*>(grads_.dbase_out) + at * p_.dv;
    for (int64_t i = 0; i < p_.dv; ++i) dbase_out[i] = from_float<T>(based ? base_weight * to_float(grad[i]) : 0.0f);
    grads_.dbase_lse[at] = based ? dbase_lse : 0.0f;
  }

  const SpanAttentionParams& p_;
  const SpanAttentionGrads& grads_;
  float* const terms_;
  const Queries* queries_ = nullptr;
  const bool mixed_;
  const int64_t q_cols_, rows_;
  PairList list_;
  float *const row_dq_, *const row_sum_, *const to_base_;  // of each row
  float *const dq_, *const x_, *const d_;                  // of a group
  float sum_[kPairs], e_[kPairs];
  GroupScores<T> scores_;
  Tiles tiles_;
  const int64_t bytes_;
};

}  // namespace subquad::cpu::SUBQUAD_ISA::spans
