// Backward pass of interval attention: one range of keys of one head against all rows. The range's dk and dv are summed
// in one place, in the order of the rows; dq is written, or one part of it when the keys are cut into several ranges.
#pragma once

#include <math.h>

#include "ops/interval_attention/cpu_forward.h"

namespace subquad::cpu::SUBQUAD_ISA::interval {

/// x = scaled scores, d = gradients of the weights, over columns [begin, end): x becomes the weights
/// e^(x - top) 2^-log2_sum, d the gradients of the scores.
inline void score_gradients(float* x, float* d, int64_t begin, int64_t end, float top, float log2_sum, float delta) {
  const Vec log2e = vec_set(kLog2e), minus_top = vec_set(-top), minus_sum = vec_set(-log2_sum);
  const Vec minus_delta = vec_set(-delta);
  for (int64_t j = begin; j < end; j += kLanes) {
    const Vec weight = vec_exp2(vec_fma(vec_add(vec_load(x + j), minus_top), log2e, minus_sum));
    vec_store(x + j, weight);
    vec_store(d + j, vec_mul(weight, vec_add(vec_load(d + j), minus_delta)));
  }
}

template <class T>
class BackwardRange {
  using Words = typename WordsOf<T>::Type;
  using Element = typename Words::Element;

 public:
  BackwardRange(const IntervalAttentionParams& p, const IntervalAttentionGrads& grads, int64_t range_keys, Arena arena)
      : p_(p),
        grads_(grads),
        q_words_(padded_words<Words>(p.d)),
        v_words_(padded_words<Words>(p.dv)),
        q_cols_(q_words_ * Words::kDepth),
        v_cols_(v_words_ * Words::kDepth),
        q_(arena.take<float>(kRows * q_words_)),
        q_right_(right_operand(arena, q_, kRows, q_cols_)),
        grad_(arena.take<float>(kRows * v_words_)),
        grad_right_(right_operand(arena, grad_, kRows, v_cols_)),
        k_(arena.take<float>(kKeys * q_words_)),
        k_right_(right_operand(arena, k_, kKeys, q_cols_)),
        kt_(arena.take<float>(kKeys * q_words_)),
        v_(arena.take<float>(kKeys * v_words_)),
        vt_(arena.take<float>(kKeys * v_words_)),
        weights_(arena.take<float>(kRows * kKeys)),
        scores_(arena.take<float>(kRows * kKeys)),
        scores_right_(Words::kDepth == 1 ? scores_ : arena.take<float>(kRows / 2 * kKeys)),
        dq_(arena.take<float>(kRows * q_cols_)),
        top_(arena.take<float>(kRows)),
        log2_sum_(arena.take<float>(kRows)),
        delta_(arena.take<float>(kRows)),
        dk_(arena.take<float>(range_keys * q_cols_)),
        dv_(arena.take<float>(range_keys * v_cols_)),
        hulls_(arena.take<Hull>(kGroups)),
        intervals_(arena.take<Interval>(kRows * p.mask.intervals)),
        marks_(arena.take<int32_t>(ceil_div(p.mask.tk, kKeys) + 1)),
        bytes_(arena.used()) {}

  int64_t bytes() const { return bytes_; }

  /// Keys [first, last) of one head, `first` a multiple of kKeys. Their share of dq goes to `dq_part`, or is added to
  /// what is there, of rows that see any of them: `written` of a row tile and slot says whether something is there.
  /// Both null: dq is written.
  void run(int64_t b, int64_t kv_head, int64_t first, int64_t last, float* dq_part, float* written) {
    first_ = first, last_ = last, dq_part_ = dq_part, written_ = written;
    const int64_t per_kv = p_.heads / p_.kv_heads, all_rows = p_.mask.tq * per_kv;
    const int64_t padded = round_up(last - first, kKeys);
    zero_words(dk_, padded * q_cols_);
    zero_words(dv_, padded * v_cols_);
    for (int64_t row = 0; row < all_rows; row += kRows) {
      const RowTile rows{b, kv_head, per_kv, row, smaller(kRows, all_rows - row)};
      add_rows(rows);
    }
    store_keys(b, kv_head);
  }

 private:
  static float* right_operand(Arena& arena, float* words, int64_t rows, int64_t cols) {
    return Words::kDepth == 1 ? words : arena.take<float>(rows / 2 * cols);
  }
  static void pack_right(float* words, int64_t rows, int64_t cols, float* right) {
    if constexpr (Words::kDepth == 2) Words::pair_rows(words, rows, cols, right);
  }
  int64_t flat(const RowTile& rows, int64_t row) const {
    return (rows.b * p_.mask.tq + rows.position(row)) * p_.heads + rows.head(row);
  }

  void add_rows(const RowTile& rows) {
    rows_ = &rows;
    bool loaded = false, finite = true;
    for (int64_t slot = 0; slot < p_.slots; ++slot) {
      const VisibleKeys seen(p_.mask, rows, p_.slots > 1 ? slot : -1, first_, last_, intervals_, marks_);
      if (!seen.any() && dq_part_ != nullptr) continue;
      if (!loaded) finite = load_rows(rows);
      loaded = true;
      const bool q_finite = load_queries<Words, T>(
          rows, [&](int64_t row) { return query_row<T>(p_, rows, row, slot); }, p_.d, q_, q_words_);
      pack_right(q_, kRows, q_cols_, q_right_);
      zero_words(dq_, kRows * q_cols_);
      for (int64_t key = first_; key < last_; key += kKeys)
        if (seen.touches(key / kKeys)) add_keys(seen, key, finite && q_finite);
      store_rows(slot);
    }
  }

  /// What all slots of the rows share. Returns whether all of it is finite.
  bool load_rows(const RowTile& rows) {
    const T* grad_out = static_cast<const T*>(grads_.grad_out);
    bool finite = load_queries<Words, T>(
        rows, [&](int64_t row) { return grad_out + flat(rows, row) * p_.dv; }, p_.dv, grad_, v_words_);
    pack_right(grad_, kRows, v_cols_, grad_right_);
    for (int64_t row = 0; row < kRows; ++row) {
      const bool live = row < rows.count;
      const float* stats = p_.stats + (live ? 2 * flat(rows, row) : 0);
      top_[row] = live ? stats[0] : 0.0f;
      log2_sum_[row] = live ? stats[1] * kLog2e : __builtin_inff();
      delta_[row] = live ? grads_.delta[flat(rows, row)] : 0.0f;
      const bool empty = log2_sum_[row] == __builtin_inff();
      finite &= is_finite_bits(delta_[row]) && is_finite_bits(top_[row]) && (empty || is_finite_bits(log2_sum_[row]));
    }
    return finite;
  }

  void add_keys(const VisibleKeys& seen, int64_t key, bool rows_finite) {
    const RowTile& rows = *rows_;
    const int64_t live = smaller(kKeys, p_.mask.tk - key), groups = rows.padded() / kTileRows;
    const T* k =
        static_cast<const T*>(p_.k) + rows.b * p_.k_stride_b + key * p_.k_stride_t + rows.kv_head * p_.k_stride_h;
    const T* v =
        static_cast<const T*>(p_.v) + rows.b * p_.v_stride_b + key * p_.v_stride_t + rows.kv_head * p_.v_stride_h;
    bool finite = load_keys<Words>(k, p_.k_stride_t, live, p_.d, k_, q_words_) && rows_finite;
    finite &= load_keys<Words>(v, p_.v_stride_t, live, p_.dv, v_, v_words_);
    const bool biased = masks_by_bias(p_, rows, key, live);
    bool all_full = true;
    for (int64_t g = 0; g < groups; ++g) {
      hulls_[g] = seen.hull(g, key, live);
      all_full &= hulls_[g].full;
    }
    if (!finite && (!all_full || biased)) {
      for (int64_t row = 0; row < rows.count; ++row) add_visible_pairs(seen, row, key);
      return;
    }
    transpose_words(k_, kKeys, q_words_, kt_, kKeys);
    transpose_words(v_, kKeys, v_words_, vt_, kKeys);
    pack_right(k_, kKeys, q_cols_, k_right_);
    for (int64_t g = 0; g < groups;) {
      int64_t stop = g + 1;
      while (stop < groups && same(hulls_[g], hulls_[stop])) ++stop;
      add_groups(seen, key, live, g, stop, biased);
      g = stop;
    }
    add_key_gradients(key, groups);
  }

  static bool same(const Hull& a, const Hull& b) { return a.begin == b.begin && a.end == b.end && a.full == b.full; }

  /// Weights and score gradients of groups [g, stop) of one hull, and their share of dq.
  void add_groups(const VisibleKeys& seen, int64_t key, int64_t live, int64_t g, int64_t stop, bool biased) {
    const Hull& hull = hulls_[g];
    const bool any = hull.begin < hull.end;
    const int64_t begin = any ? hull.begin / kLanes * kLanes : 0, end = any ? round_up(hull.end, kLanes) : 0;
    const int64_t row = g * kTileRows, rows = (stop - g) * kTileRows;
    if (any) {
      product<Words>(rows, end - begin, ceil_div(p_.d, Words::kDepth), {q_ + row * q_words_, q_words_, 1},
                     {kt_ + begin, kKeys}, {weights_ + row * kKeys + begin, kKeys}, false);
      product<Words>(rows, end - begin, ceil_div(p_.dv, Words::kDepth), {grad_ + row * v_words_, v_words_, 1},
                     {vt_ + begin, kKeys}, {scores_ + row * kKeys + begin, kKeys}, false);
    }
    for (int64_t i = row; i < row + rows; ++i) {
      float *x = weights_ + i * kKeys, *d = scores_ + i * kKeys;
      zero_words(x, begin), zero_words(d, begin);
      zero_words(x + end, kKeys - end), zero_words(d + end, kKeys - end);
      if (!any) continue;
      const ScoreTerms terms = score_terms(p_, *rows_, i, key);
      alignas(64) float rates[kKeys];
      finish_products(terms, begin, end, live, x, rates);
      if (biased && terms.bias != nullptr) hide_biased(terms.bias, begin, smaller(end, live), x);
      if (!hull.full || end > live) seen.fill_hidden(i, key, begin, end, -__builtin_inff(), x);
      score_gradients(x, d, begin, end, top_[i], log2_sum_[i], delta_[i]);
      if (grads_.dkey_bias != nullptr && i < rows_->count) {
        float* dbias = grads_.dkey_bias + (rows_->b * p_.heads + rows_->head(i)) * p_.mask.tk + key;
        for (int64_t j = hull.begin; j < hull.end; ++j) dbias[j] += d[j];
      }
      if (terms.softcap != 0.0f) {
        for (int64_t j = begin; j < end; j += kLanes) {
          const Vec g = vec_load(d + j);
          vec_store(d + j, g == 0.0f ? g : vec_mul(g, vec_load(rates + j)));  // a hidden product may be NaN
        }
      }
    }
    narrow(row, rows);
    if (!any) return;
    const int64_t from = hull.begin / Words::kDepth, depth = ceil_div(hull.end, Words::kDepth) - from;
    product<Words>(rows, q_cols_, depth, {scores_ + row * kKeys + from, kKeys, 1}, {k_right_ + from * q_cols_, q_cols_},
                   {dq_ + row * q_cols_, q_cols_}, true);
  }

  /// Rounds weights and score gradients to words: pairs along the rows for dk and dv, pairs along the keys for dq.
  void narrow(int64_t row, int64_t rows) {
    if constexpr (Words::kDepth == 2) {
      for (int64_t i = row; i < row + rows; i += 2) {
        float *x = weights_ + i * kKeys, *d = scores_ + i * kKeys, *right = scores_right_ + i / 2 * kKeys;
        for (int64_t j = 0; j < kKeys; j += kLanes) {
          const Vec low = vec_load(d + j), high = vec_load(d + kKeys + j);
          Words::store_pairs(x + j, vec_load(x + j), vec_load(x + kKeys + j));
          Words::store_pairs(right + j, low, high);
          Words::store(reinterpret_cast<Element*>(d) + j, low);
          Words::store(reinterpret_cast<Element*>(d + kKeys) + j, high);
        }
      }
    }
  }

  /// dv += weights^T grad_out and dk += (score gradients)^T q, for blocks of keys and the rows that see them.
  void add_key_gradients(int64_t key, int64_t groups) {
    constexpr int64_t kBlockKeys = 16, kStep = Words::kDepth == 1 ? kKeys : 2 * kKeys;
    for (int64_t j = 0; j < kKeys; j += kBlockKeys) {
      int64_t g = groups, stop = 0;
      for (int64_t i = 0; i < groups; ++i) {
        if (hulls_[i].begin >= j + kBlockKeys || hulls_[i].end <= j) continue;
        g = smaller(g, i);
        stop = i + 1;
      }
      if (g >= stop) continue;
      const int64_t from = g * kTileRows / Words::kDepth, depth = (stop - g) * kTileRows / Words::kDepth;
      const int64_t at = key - first_ + j;
      product<Words>(kBlockKeys, v_cols_, depth, {weights_ + from * kStep + j, 1, kStep},
                     {grad_right_ + from * v_cols_, v_cols_}, {dv_ + at * v_cols_, v_cols_}, true);
      product<Words>(kBlockKeys, q_cols_, depth, {scores_right_ + from * kKeys + j, 1, kKeys},
                     {q_right_ + from * q_cols_, q_cols_}, {dk_ + at * q_cols_, q_cols_}, true);
    }
  }

  /// The same for one row, pair by pair: what a hidden key or row holds is never multiplied.
  void add_visible_pairs(const VisibleKeys& seen, int64_t row, int64_t key) {
    const auto* q = reinterpret_cast<const Element*>(q_ + row * q_words_);
    const auto* grad = reinterpret_cast<const Element*>(grad_ + row * v_words_);
    const ScoreTerms terms = score_terms(p_, *rows_, row, key);
    const float* bias = terms.bias;
    for (int64_t j = 0; j < smaller(kKeys, p_.mask.tk - key); ++j) {
      if (!seen.sees(row, key, j) || (bias != nullptr && bias[j] == -__builtin_inff())) continue;
      const auto* k = reinterpret_cast<const Element*>(k_ + j * q_words_);
      const auto* v = reinterpret_cast<const Element*>(v_ + j * v_words_);
      float score = 0.0f, d = 0.0f;
      for (int64_t c = 0; c < p_.d; ++c) score += to_float(q[c]) * to_float(k[c]);
      for (int64_t c = 0; c < p_.dv; ++c) d += to_float(grad[c]) * to_float(v[c]);
      const float t = terms.softcap != 0.0f ? tanhf(score * terms.scale / terms.softcap) : 0.0f;
      score = terms.softcap != 0.0f ? t * terms.softcap : score * terms.scale;
      score -= terms.slope * fabsf(static_cast<float>(terms.own - j));
      if (bias != nullptr) score += bias[j];
      const float weight = exp2f((score - top_[row]) * kLog2e - log2_sum_[row]);
      const float dbias = weight * (d - delta_[row]);
      d = dbias * (1.0f - t * t);
      float *dk = dk_ + (key - first_ + j) * q_cols_, *dv = dv_ + (key - first_ + j) * v_cols_;
      for (int64_t c = 0; c < p_.dv; ++c) dv[c] += weight * to_float(grad[c]);
      for (int64_t c = 0; c < p_.d; ++c) dk[c] += d * to_float(q[c]);
      for (int64_t c = 0; c < p_.d; ++c) dq_[row * q_cols_ + c] += d * to_float(k[c]);
      if (grads_.dkey_bias != nullptr)
        grads_.dkey_bias[(rows_->b * p_.heads + rows_->head(row)) * p_.mask.tk + key + j] += dbias;
    }
  }

  void store_rows(int64_t slot) {
    float* written = dq_part_ == nullptr ? nullptr : written_ + rows_->first / kRows * p_.slots + slot;
    const bool add = written != nullptr && *written != 0.0f;
    for (int64_t row = 0; row < rows_->count; ++row) {
      const int64_t at = (flat(*rows_, row) * p_.slots + slot) * p_.d;
      const float* sums = dq_ + row * q_cols_;
      if (dq_part_ != nullptr) {
        float* part = dq_part_ + at;
        for (int64_t c = 0; c < p_.d; ++c) part[c] = add ? part[c] + sums[c] : sums[c];
      } else {
        T* dq = static_cast<T*>(grads_.dq) + at;
        for (int64_t c = 0; c < p_.d; ++c) dq[c] = from_float<T>(sums[c] * p_.scale);
      }
    }
    if (written != nullptr) *written = 1.0f;
  }

  void store_keys(int64_t b, int64_t kv_head) {
    for (int64_t key = first_; key < last_; ++key) {
      const int64_t at = (b * p_.mask.tk + key) * p_.kv_heads + kv_head;
      T *dk = static_cast<T*>(grads_.dk) + at * p_.d, *dv = static_cast<T*>(grads_.dv) + at * p_.dv;
      const float *k_sums = dk_ + (key - first_) * q_cols_, *v_sums = dv_ + (key - first_) * v_cols_;
      for (int64_t c = 0; c < p_.d; ++c) dk[c] = from_float<T>(k_sums[c] * p_.scale);
      for (int64_t c = 0; c < p_.dv; ++c) dv[c] = from_float<T>(v_sums[c]);
    }
  }

  const IntervalAttentionParams& p_;
  const IntervalAttentionGrads& grads_;
  const RowTile* rows_ = nullptr;
  int64_t first_ = 0, last_ = 0;
  float *dq_part_ = nullptr, *written_ = nullptr;
  const int64_t q_words_, v_words_, q_cols_, v_cols_;
  float *const q_,
      *const q_right_,
          *const grad_,
              *const grad_right_,
                  *const k_, *const k_right_,
                                 *const kt_, *const v_, *const vt_, *const weights_,
                                                                        *const scores_,
                                                                            *const scores_right_,
                                                                                *const dq_, *const top_,
                                                                                                *const log2_sum_,
                                                                                                    *const delta_,
                                                                                                        *const dk_,
                                                                                                            *const dv_;
  Hull* const hulls_;
  Interval* const intervals_;
  int32_t* const marks_;
  const int64_t bytes_;
};

}  // namespace subquad::cpu::SUBQUAD_ISA::interval
