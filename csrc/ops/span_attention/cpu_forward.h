// Forward pass of attention to spans, many rows: the pairs of some consecutive queries, with a running softmax each,
// meet the tiles of keys one after the other.
#pragma once

#include "ops/span_attention/cpu_pairs.h"
#include "ops/span_attention/cpu_sums.h"

namespace subquad::cpu::SUBQUAD_ISA::spans {

constexpr int64_t kChunk = 64;  // pairs whose scores are in cache

template <class T>
class ForwardPass {
  using Words = typename WordsOf<T>::Type;
  static constexpr bool kDirect = std::is_same_v<T, float>;  // queries are multiplied where they lie

 public:
  /// For up to `rows` rows.
  ForwardPass(const SpanAttentionParams& p, int64_t rows, Arena arena)
      : p_(p),
        words_(padded_words<Words>(p.d)),
        cols_(value_columns(p)),
        sweep_(rows * p.spans, arena),
        q_(kDirect ? nullptr : arena.take<float>(rows * words_)),
        k_(arena.take<float>(kKeys * words_)),
        kt_(arena.take<float>(kKeys * words_)),
        v_(arena.take<float>(kKeys * cols_)),
        v_pairs_(Words::kDepth == 1 ? v_ : arena.take<float>(kKeys / 2 * cols_)),
        scores_(arena.take<float>(kChunk * kKeys)),
        spare_(arena.take<float>(cols_)),
        out_(arena.take<float>(rows * p.spans * cols_)),
        top_(arena.take<float>(rows * p.spans)),
        sum_(arena.take<float>(rows * p.spans * kLanes)),
        bytes_(arena.used()) {}

  int64_t bytes() const { return bytes_; }

  void run(const Queries& queries) {
    queries_ = queries;
    const int64_t slots = queries.rows() * p_.spans;
    for (int64_t i = 0; i < slots; ++i) top_[i] = kNothing;
    zero_words(sum_, slots * kLanes);
    if constexpr (!kDirect) {
      for (int64_t row = 0; row < queries.rows(); ++row) load_row<Words>(query(row), p_.d, q_ + row * words_, words_);
    }
    sweep_.start(p_, queries, 0, p_.keys);
    while (sweep_.next()) add_tile();
    for (int64_t row = 0; row < queries.rows(); ++row) {
      RowResult<T> result(p_, queries.at(p_, row));
      for (int64_t s = 0; s < p_.spans; ++s) {
        const int64_t slot = row * p_.spans + s;
        result.add(s, {out_ + slot * cols_, top_[slot], vec_sum(vec_load(sum_ + slot * kLanes))});
      }
      result.store();
    }
  }

 private:
  const T* query(int64_t row) const {
    return static_cast<const T*>(p_.q) + queries_.b * p_.q_stride_b + queries_.token(row) * p_.q_stride_t +
           queries_.head(row) * p_.q_stride_h;
  }
  const float* query_words(int64_t row) const {
    if constexpr (kDirect) {
      return query(row);
    } else {
      return q_ + row * words_;
    }
  }

  void add_tile() {
    const int64_t b = queries_.b, key = sweep_.key();
    load_tile<Words, T>(p_, p_.k, p_.keys_at, b, queries_.kv_head, key, p_.d, k_, words_);
    transpose_words(k_, kKeys, words_, kt_, kKeys);
    finite_ = load_tile<Words, T>(p_, p_.v, p_.values_at, b, queries_.kv_head, key, p_.dv, v_, cols_ / Words::kDepth);
    if constexpr (Words::kDepth == 2) Words::pair_rows(v_, kKeys, cols_, v_pairs_);
    const bool whole = is_whole(p_, b, key);
    const Pairs full = sweep_.full(), edges = sweep_.edges();
    for (int64_t i = 0; i < full.count; i += kChunk)
      add_pairs(full.pairs + i, smaller(kChunk, full.count - i), {0, kKeys}, !whole);
    for (int64_t i = 0; i < edges.count; i += kTileRows) {
      const int64_t count = smaller(kTileRows, edges.count - i);
      add_pairs(edges.pairs + i, count, hull_of(edges.pairs + i, count, key), true);
    }
  }

  /// Columns `hull` of the tile, of which a pair sees all unless they are `hidden` in part.
  void add_pairs(const Pair* pairs, int64_t count, Hull hull, bool hidden) {
    const int64_t rows = round_up(count, kTileRows), key = sweep_.key();
    const float *left[kChunk], *weights[kChunk];
    float *scores[kChunk], *out[kChunk];
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t id = pairs[smaller(i, count - 1)].id;
      left[i] = query_words(id / p_.spans);
      scores[i] = scores_ + i * kKeys + hull.begin;
      weights[i] = scores_ + i * kKeys + hull.begin / Words::kDepth;
      out[i] = i < count ? out_ + id * cols_ : spare_;
    }
    product_of_rows<Words>(rows, hull.end - hull.begin, ceil_div(p_.d, Words::kDepth), left, {kt_ + hull.begin, kKeys},
                           scores, false);
    for (int64_t i = 0; i < count; ++i) {
      float* x = scores_ + i * kKeys;
      if (pairs[i].begin >= key) zero_words(out[i], cols_);  // the first tile of the pair
      float found = scale(x, hull);
      if (hidden) {
        hide(p_, queries_.b, pairs[i], key, hull.begin, hull.end, x);
        found = largest(x, hull);
      }
      soften(pairs[i].id, x, hull, found);
    }
    if (hull.begin == 0 && hull.end == kKeys && !hidden) {
      return product_of_rows<Words>(rows, cols_, kKeys / Words::kDepth, weights, {v_pairs_, cols_}, out, true);
    }
    if (finite_) {
      const float* values = v_pairs_ + hull.begin / Words::kDepth * cols_;
      return product_of_rows<Words>(rows, cols_, (hull.end - hull.begin) / Words::kDepth, weights,
                                    {const_cast<float*>(values), cols_}, out, true);
    }
    for (int64_t i = 0; i < count; ++i) add_seen(pairs[i], scores_ + i * kKeys, out[i]);
  }

  /// Scores from products; returns the largest. NaN is passed over.
  float scale(float* x, Hull hull) const {
    const Vec factor = vec_set(p_.scale);
    Vec top = vec_set(kNothing);
    for (int64_t j = hull.begin; j < hull.end; j += kLanes) {
      const Vec s = vec_mul(vec_load(x + j), factor);
      top = vec_max(s, top);
      vec_store(x + j, s);
    }
    return vec_max_all(top);
  }

  static float largest(const float* x, Hull hull) {
    Vec top = vec_set(kNothing);
    for (int64_t j = hull.begin; j < hull.end; j += kLanes) top = vec_max(vec_load(x + j), top);
    return vec_max_all(top);
  }

  /// Scores x, of which `found` is the largest, become weights; what was summed before is scaled to the new maximum.
  void soften(int64_t slot, float* x, Hull hull, float found) {
    float* sums = sum_ + slot * kLanes;
    Vec sum = vec_load(sums);
    if (found > top_[slot]) {
      const float factor = exp_of(top_[slot] - found);
      sum = vec_mul(sum, vec_set(factor));
      scale_row(out_ + slot * cols_, cols_, factor);
      top_[slot] = found;
    }
    const Vec minus = vec_set(-shift_of(top_[slot])), log2e = vec_set(kLog2e);
    for (int64_t j = hull.begin; j < hull.end; j += kLanes) {
      const Vec weight = vec_exp2(vec_mul(vec_add(vec_load(x + j), minus), log2e));
      sum = vec_add(sum, weight);
      Words::store(reinterpret_cast<typename Words::Element*>(x) + j, weight);
    }
    vec_store(sums, sum);
  }

  /// out += weights * values of the keys that the pair sees, where a hidden value is not finite.
  void add_seen(const Pair& pair, const float* x, float* out) const {
    const auto* weights = reinterpret_cast<const typename Words::Element*>(x);
    const auto* values = reinterpret_cast<const typename Words::Element*>(v_);
    const int64_t key = sweep_.key();
    const bool* mask = mask_of(p_, queries_.b, key);
    for (int64_t j = clamp(pair.begin - key, 0, kKeys); j < clamp(pair.end - key, 0, kKeys); ++j) {
      if (mask != nullptr && !mask[j]) continue;
      const float weight = to_float(weights[j]);
      for (int64_t c = 0; c < p_.dv; ++c) out[c] += weight * to_float(values[j * cols_ + c]);
    }
  }

  const SpanAttentionParams& p_;
  Queries queries_{};
  const int64_t words_, cols_;
  PairSweep sweep_;
  float *const q_, *const k_, *const kt_, *const v_, *const v_pairs_, *const scores_, *const spare_;
  float *const out_, *const top_, *const sum_;  // of every slot: sums of values, largest score, kLanes sums of weights
  const int64_t bytes_;
  bool finite_ = false;  // all values of the tile
};

}  // namespace subquad::cpu::SUBQUAD_ISA::spans
