// Backward pass of attention to spans, first part: the gradients of some queries and of what belongs to them.
#pragma once

#include "ops/span_attention/cpu_backward_scores.h"

namespace subquad::cpu::SUBQUAD_ISA::spans {

/// dq, dgate, dbase_out, dbase_lse and the terms of some queries. Where c is not known before all keys are, the sums
/// A = sum P u k and B = sum P k of a pair make its share of dq, gate A - c B.
template <class T>
class QueryGradients {
  using Tile = KeyTile<T>;
  using Words = typename Tile::Words;

 public:
  QueryGradients(const SpanAttentionParams& p, const SpanAttentionGrads& grads, float* terms, int64_t queries,
                 Arena arena)
      : p_(p),
        grads_(grads),
        terms_(terms),
        mixed_(p.gate != nullptr),
        q_cols_(columns(p.d)),
        q_words_(Tile::words(p.d)),
        v_words_(Tile::words(p.dv)),
        rows_(queries * (p.heads / p.kv_heads)),
        q_(arena.take<float>(rows_ * q_words_)),
        grad_(arena.take<float>(rows_ * v_words_)),
        a_(arena.take<float>(rows_ * p.spans * q_cols_)),
        b_(arena.take<float>(mixed_ ? rows_ * p.spans * q_cols_ : 0)),
        e_(arena.take<float>(rows_ * p.spans)),
        sum_(arena.take<float>(rows_ * p.spans)),
        x_(arena.take<float>(kTilePairs * kKeys)),
        d_(arena.take<float>(kTilePairs * kKeys)),
        dq_(arena.take<float>(q_cols_)),
        unused_(arena.take<float>(q_cols_)),
        tile_(p, arena),
        sweep_(rows_ * p.spans, arena),
        bytes_(arena.used()) {}

  int64_t bytes() const { return bytes_; }

  void run(const Queries& queries) {
    queries_ = &queries;
    load_rows();
    const int64_t pairs = queries.rows() * p_.spans;
    zero_words(a_, pairs * q_cols_);
    if (mixed_) zero_words(b_, pairs * q_cols_);
    zero_words(e_, pairs), zero_words(sum_, pairs);
    sweep_.start(p_, queries, 0, p_.keys);
    while (sweep_.next()) {
      tile_.load(queries.b, queries.kv_head, sweep_.key(), true);
      add(sweep_.full(), true);
      add(sweep_.edges(), false);
    }
    for (int64_t row = 0; row < queries.rows(); ++row) finish(row);
  }

 private:
  void load_rows() {
    for (int64_t row = 0; row < queries_->rows(); ++row) {
      const int64_t at = queries_->at(p_, row);
      const T* grad = static_cast<const T*>(grads_.grad_out) + at * p_.dv;
      load_row<Words>(query_row(row), p_.d, q_ + row * q_words_, q_words_);
      load_row<Words>(grad, p_.dv, grad_ + row * v_words_, v_words_);
      if (mixed_) continue;
      const float delta = dot_of(grad, static_cast<const T*>(p_.out) + at * p_.dv, p_.dv);
      terms_[2 * at + 1] = delta - grads_.grad_lse[at];
    }
  }
  const T* query_row(int64_t row) const {
    return static_cast<const T*>(p_.q) + queries_->b * p_.q_stride_b + queries_->token(row) * p_.q_stride_t +
           queries_->head(row) * p_.q_stride_h;
  }

  void add(const Pairs& pairs, bool full) {
    const int64_t step = full ? kTilePairs : kTileRows;
    for (int64_t i = 0; i < pairs.count; i += step) add_pairs(pairs.pairs + i, smaller(step, pairs.count - i), full);
  }

  void add_pairs(const Pair* pairs, int64_t count, bool full) {
    const Hull hull = full ? Hull{0, kKeys} : hull_of(pairs, count, sweep_.key());
    const int64_t rows = round_up(count, kTileRows), width = hull.end - hull.begin;
    const float *q[kTilePairs], *grad[kTilePairs];
    float *x[kTilePairs], *d[kTilePairs], *a[kTilePairs], *b[kTilePairs];
    for (int64_t i = 0; i < rows; ++i) {
      const bool live = i < count;
      const int64_t pair = pairs[live ? i : 0].id, row = pair / p_.spans;
      q[i] = q_ + row * q_words_, grad[i] = grad_ + row * v_words_;
      x[i] = x_ + i * kKeys + hull.begin, d[i] = d_ + i * kKeys + hull.begin;
      a[i] = live ? a_ + pair * q_cols_ : unused_;
      b[i] = live && mixed_ ? b_ + pair * q_cols_ : unused_;
    }
    product_of_rows<Words>(rows, width, Tile::depth(p_.d), q, {tile_.kt + hull.begin, kKeys}, x, false);
    product_of_rows<Words>(rows, width, Tile::depth(p_.dv), grad, {tile_.vt + hull.begin, kKeys}, d, false);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t pair = pairs[i].id, at = queries_->at(p_, pair / p_.spans);
      const Terms terms = mixed_ ? Terms{p_.lse[at * p_.spans + pair % p_.spans], 1.0f, 0.0f}
                                 : Terms{p_.lse[at], 1.0f, terms_[2 * at + 1]};
      tile_.finish(pairs[i], full, hull, terms, x_ + i * kKeys, d_ + i * kKeys);
      sum_[pair] += sum_of(x_ + i * kKeys, hull.begin, hull.end);
      if (mixed_) e_[pair] += sum_of(d_ + i * kKeys, hull.begin, hull.end);
    }
    add_keys(pairs, count, hull, d, a);
    if (mixed_) add_keys(pairs, count, hull, x, b);
  }

  /// sums[i] += weights[i] k. A key that is not finite is kept from the pairs that do not see it.
  void add_keys(const Pair* pairs, int64_t count, const Hull& hull, float* const* weights, float* const* sums) {
    if (tile_.k_finite) {
      product_of_rows<Floats>(round_up(count, kTileRows), q_cols_, hull.end - hull.begin, weights,
                              {tile_.k + hull.begin * q_cols_, q_cols_}, sums, true);
      return;
    }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = hull.begin; j < hull.end; ++j)
        if (tile_.sees(pairs[i], j)) add_row(sums[i], tile_.k + j * q_cols_, q_cols_, weights[i][j - hull.begin]);
  }

  /// Results of a row, all of whose pairs have met their keys.
  void finish(int64_t row) {
    const int64_t at = queries_->at(p_, row);
    const T* grad = static_cast<const T*>(grads_.grad_out) + at * p_.dv;
    const float base_lse = p_.base_lse == nullptr ? kNothing : p_.base_lse[at];
    const bool based = base_lse != kNothing;
    const float to_base = based ? dot_of(grad, static_cast<const T*>(p_.base_out) + at * p_.dv, p_.dv) : 0.0f;
    float base_weight = 0.0f, dbase_lse = 0.0f;
    zero_words(dq_, q_cols_);
    for (int64_t s = 0; s < p_.softmaxes; ++s) {
      const int64_t softmax = at * p_.softmaxes + s, pair = row * p_.spans + s, pairs = p_.spans / p_.softmaxes;
      float *norm = terms_ + 2 * softmax, *c = norm + 1;
      if (p_.lse[softmax] == kNothing) {
        *norm = *c = 0.0f;
        if (mixed_) grads_.dgate[softmax] = 0.0f;
        continue;
      }
      float weight = based ? exp_of(base_lse - p_.lse[softmax]) : 0.0f, sum = weight;
      for (int64_t i = 0; i < pairs; ++i) sum += sum_[pair + i];
      *norm = 1.0f / sum;
      weight *= *norm;
      const float gate = mixed_ ? p_.gate[softmax] : 1.0f;
      if (mixed_) {
        const float delta = e_[pair] * *norm + weight * to_base;
        grads_.dgate[softmax] = delta;
        *c = gate * delta - grads_.grad_lse[softmax];
        add_row(dq_, b_ + pair * q_cols_, q_cols_, -*c * *norm);
      }
      for (int64_t i = 0; i < pairs; ++i) add_row(dq_, a_ + (pair + i) * q_cols_, q_cols_, gate * *norm);
      base_weight += gate * weight;
      dbase_lse += weight * (gate * to_base - *c);
    }
    T* dq = static_cast<T*>(grads_.dq) + at * p_.d;
    for (int64_t i = 0; i < p_.d; ++i) dq[i] = from_float<T>(dq_[i] * p_.scale);
    if (p_.base_lse == nullptr) return;
    T* dbase_out = static_cast<T*>(grads_.dbase_out) + at * p_.dv;
    for (int64_t i = 0; i < p_.dv; ++i) dbase_out[i] = from_float<T>(based ? base_weight * to_float(grad[i]) : 0.0f);
    grads_.dbase_lse[at] = based ? dbase_lse : 0.0f;
  }

  const SpanAttentionParams& p_;
  const SpanAttentionGrads& grads_;
  float* const terms_;
  const Queries* queries_ = nullptr;
  const bool mixed_;
  const int64_t q_cols_, q_words_, v_words_, rows_;
  float *const q_, *const grad_, *const a_, *const b_, *const e_, *const sum_, *const x_, *const d_, *const dq_,
                                                                                                         *const unused_;
  Tile tile_;
  PairSweep sweep_;
  const int64_t bytes_;
};

}  // namespace subquad::cpu::SUBQUAD_ISA::spans
