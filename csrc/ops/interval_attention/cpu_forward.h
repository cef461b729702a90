// Forward pass of interval attention: one tile of rows over the key tiles it sees, with a running softmax.
#pragma once

#include "ops/interval_attention/cpu_sums.h"

namespace subquad::cpu::SUBQUAD_ISA::interval {

/// Key rows [key, key + count) of one head as words, padded with zero rows to kKeys. Returns whether all are finite.
template <class Words, class T>
inline bool load_keys(const T* src, int64_t stride, int64_t count, int64_t n, float* dst, int64_t words) {
  bool finite = true;
  for (int64_t j = 0; j < count; ++j) finite &= load_row<Words>(src + j * stride, n, dst + j * words, words);
  zero_words(dst + count * words, (kKeys - count) * words);
  return finite;
}

/// Query-side rows of a tile as words, padded with zero rows. `at(row)` points to the elements of a row.
template <class Words, class T, class At>
inline bool load_queries(const RowTile& rows, const At& at, int64_t n, float* dst, int64_t words) {
  bool finite = true;
  for (int64_t row = 0; row < rows.count; ++row) {
    const T* src = at(row);
    finite &= load_row<Words>(src, n, dst + row * words, words);
  }
  zero_words(dst + rows.count * words, (round_up(rows.padded(), 16) - rows.count) * words);
  return finite;
}

template <class T>
inline const T* query_row(const IntervalAttentionParams& p, const RowTile& rows, int64_t row, int64_t slot) {
  return static_cast<const T*>(p.q) + rows.b * p.q_stride_b + rows.position(row) * p.q_stride_t +
         rows.head(row) * p.q_stride_h + slot * p.q_stride_s;
}

/// The key biases of a row's head, from `key` on, or null.
inline const float* bias_row(const IntervalAttentionParams& p, const RowTile& rows, int64_t row, int64_t key) {
  if (p.key_bias == nullptr || row >= rows.count) return nullptr;
  return p.key_bias + rows.b * p.bias_stride_b + rows.head(row) * p.bias_stride_h + key;
}

/// Whether some head of the group masks a key of the tile by a bias of -inf.
inline bool masks_by_bias(const IntervalAttentionParams& p, const RowTile& rows, int64_t key, int64_t count) {
  if (p.key_bias == nullptr) return false;
  bool found = false;
  for (int64_t g = 0; g < smaller(rows.per_kv, rows.count); ++g) {
    const float* bias = bias_row(p, rows, g, key);
    for (int64_t j = 0; j < count; ++j) found |= bias[j] == -__builtin_inff();
  }
  return found;
}

/// What turns the products of a row with the keys of a tile into scores.
struct ScoreTerms {
  float scale, softcap;
  const float* bias;  // of the tile's keys, or null
  float slope;        // taken from the score for each key between the row's own and the key; 0 where there is none
  int64_t own;        // column of the row's own key
};

inline ScoreTerms score_terms(const IntervalAttentionParams& p, const RowTile& rows, int64_t row, int64_t key) {
  ScoreTerms terms{p.scale, p.softcap, bias_row(p, rows, row, key), 0.0f, 0};
  if (p.alibi_slopes == nullptr || row >= rows.count) return terms;
  terms.slope = p.alibi_slopes[rows.b * p.slope_stride_b + rows.head(row)];
  terms.own = rows.position(row) + p.mask.tk - p.mask.tq - key;
  return terms;
}

/// x = cap(scale x) - slope |own - column| + bias over columns [begin, end), multiples of kLanes; `live` keys have a
/// bias. Returns the largest; NaN is passed over. Not yet in units of log2: the largest floats, which masks and sinks
/// may hold, would overflow. `rates`, where given: the derivative of the cap, where there is one.
inline float finish_products(const ScoreTerms& terms, int64_t begin, int64_t end, int64_t live, float* x,
                             float* rates = nullptr) {
  const Vec factor = vec_set(terms.scale), cap = vec_set(terms.softcap), slope = vec_set(terms.slope);
  const Vec per_cap = vec_set(1.0f / terms.softcap);
  const bool capped = terms.softcap != 0.0f, sloped = terms.slope != 0.0f;
  Vec lanes = vec_zero();
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(i);
  Vec top = vec_set(-__builtin_inff());
  for (int64_t j = begin; j < end; j += kLanes) {
    Vec s = vec_mul(vec_load(x + j), factor);
    if (capped) {
      const Vec t = vec_tanh(vec_mul(s, per_cap));
      s = vec_mul(t, cap);
      if (rates != nullptr) vec_store(rates + j, 1.0f - t * t);
    }
    if (sloped) {
      const Vec distance = vec_set(static_cast<float>(terms.own - j)) - lanes;
      s = s - slope * vec_max(distance, -distance);
    }
    if (terms.bias != nullptr) {
      float b[kLanes] = {};
      std::memcpy(b, terms.bias + j, static_cast<size_t>(smaller(kLanes, larger(0, live - j))) * sizeof(float));
      s = vec_add(s, vec_load(b));
    }
    top = vec_max(s, top);
    vec_store(x + j, s);
  }
  return vec_max_all(top);
}

/// x = -inf where the bias is -inf, whatever the product was: over columns [begin, end).
inline void hide_biased(const float* bias, int64_t begin, int64_t end, float* x) {
  for (int64_t j = begin; j < end; ++j) x[j] = bias[j] == -__builtin_inff() ? bias[j] : x[j];
}

/// out[j] = a . rows[j] for the first `count` rows of n floats.
inline void dot_rows(const float* a, const float* rows, int64_t stride, int64_t count, int64_t n, float* out) {
  for (int64_t j = 0; j < count; ++j) {
    const float* b = rows + j * stride;
    Vec sums = vec_zero();
    int64_t c = 0;
    for (; c + kLanes <= n; c += kLanes) sums = vec_fma(vec_load(a + c), vec_load(b + c), sums);
    float sum = vec_sum(sums);
    for (; c < n; ++c) sum += a[c] * b[c];
    out[j] = sum;
  }
}

/// out += weights[j] * rows[j] over the first `count` rows of n floats.
inline void add_weighted_rows(const float* weights, const float* rows, int64_t stride, int64_t count, int64_t n,
                              float* out) {
  constexpr int kVecs = 4;
  int64_t c = 0;
  for (; c + kVecs * kLanes <= n; c += kVecs * kLanes) {
    Vec sums[kVecs];
    for (int i = 0; i < kVecs; ++i) sums[i] = vec_load(out + c + i * kLanes);
    for (int64_t j = 0; j < count; ++j) {
      const Vec w = vec_set(weights[j]);
      for (int i = 0; i < kVecs; ++i) sums[i] = vec_fma(w, vec_load(rows + j * stride + c + i * kLanes), sums[i]);
    }
    for (int i = 0; i < kVecs; ++i) vec_store(out + c + i * kLanes, sums[i]);
  }
  for (; c < n; ++c)
    for (int64_t j = 0; j < count; ++j) out[c] += weights[j] * rows[j * stride + c];
}

/// The largest of columns [begin, end); NaN is passed over.
inline float largest(const float* x, int64_t begin, int64_t end) {
  Vec top = vec_set(-__builtin_inff());
  for (int64_t j = begin; j < end; j += kLanes) top = vec_max(vec_load(x + j), top);
  return vec_max_all(top);
}

/// x = e^(x - top) as left-operand words in place, over columns [begin, end). Returns the sum.
template <class Words>
inline float exponentials(float* x, int64_t begin, int64_t end, float top) {
  const Vec minus = vec_set(-top), log2e = vec_set(kLog2e);
  Vec sum = vec_zero();
  for (int64_t j = begin; j < end; j += kLanes) {
    const Vec e = vec_exp2(vec_mul(vec_add(vec_load(x + j), minus), log2e));
    sum = vec_add(sum, e);
    Words::store(reinterpret_cast<typename Words::Element*>(x) + j, e);
  }
  return vec_sum(sum);
}

constexpr int64_t kFewRows = 2;  // up to so many rows per key head, keys and values are not packed, but read once

template <class T>
class ForwardTile {
  using Words = typename WordsOf<T>::Type;

 public:
  ForwardTile(const IntervalAttentionParams& p, Arena arena)
      : p_(p),
        few_rows_(Words::kDepth == 1 && p.mask.tq * (p.heads / p.kv_heads) <= kFewRows),
        q_words_(padded_words<Words>(p.d)),
        out_cols_(RowSums::columns(p)),
        q_(arena.take<float>(kRows * q_words_)),
        k_(arena.take<float>(kKeys * q_words_)),
        kt_(arena.take<float>(kKeys * q_words_)),
        v_(arena.take<float>(kKeys * out_cols_)),
        v_pairs_(Words::kDepth == 1 ? v_ : arena.take<float>(kKeys / 2 * out_cols_)),
        scores_(arena.take<float>(kRows * kKeys)),
        hulls_(arena.take<Hull>(kGroups)),
        intervals_(arena.take<Interval>(kRows * p.mask.intervals)),
        marks_(arena.take<int32_t>(ceil_div(p.mask.tk, kKeys) + 1)),
        bytes_(arena.used()) {}

  int64_t bytes() const { return bytes_; }

  /// Adds keys [begin, end), `begin` a multiple of kKeys, to the sums of all padded rows. Sums that are not `begun` are
  /// cleared before the first key. Whether any row sees one; if not, nothing was written.
  bool add(const RowTile& rows, int64_t begin, int64_t end, const RowSums& sums, bool begun) {
    rows_ = &rows;
    sums_ = sums;
    bool any = false;
    for (int64_t slot = 0; slot < p_.slots; ++slot) {
      const VisibleKeys seen(p_.mask, rows, p_.slots > 1 ? slot : -1, begin, end, intervals_, marks_);
      if (!seen.any()) continue;
      if (!begun && !any) clear(sums, rows.padded());
      any = true;
      load_queries<Words, T>(rows, [&](int64_t row) { return query_row<T>(p_, rows, row, slot); }, p_.d, q_, q_words_);
      for (int64_t key = begin; key < end; key += kKeys)
        if (seen.touches(key / kKeys)) add_keys(seen, key);
    }
    return any;
  }

 private:
  void add_keys(const VisibleKeys& seen, int64_t key) {
    const RowTile& rows = *rows_;
    const int64_t live = smaller(kKeys, p_.mask.tk - key), groups = rows.padded() / kTileRows;
    const T* k =
        static_cast<const T*>(p_.k) + rows.b * p_.k_stride_b + key * p_.k_stride_t + rows.kv_head * p_.k_stride_h;
    const T* v =
        static_cast<const T*>(p_.v) + rows.b * p_.v_stride_b + key * p_.v_stride_t + rows.kv_head * p_.v_stride_h;
    if constexpr (Words::kDepth == 1) {
      if (few_rows_) return add_keys_to_few_rows(seen, key, live, k, v);
    }
    load_keys<Words>(k, p_.k_stride_t, live, p_.d, k_, q_words_);
    transpose_words(k_, kKeys, q_words_, kt_, kKeys);
    const bool finite = load_keys<Words>(v, p_.v_stride_t, live, p_.dv, v_, out_cols_ / Words::kDepth);
    if constexpr (Words::kDepth == 2) Words::pair_rows(v_, kKeys, out_cols_, v_pairs_);
    const bool biased = masks_by_bias(p_, rows, key, live);
    for (int64_t g = 0; g < groups; ++g) hulls_[g] = seen.hull(g, key, live);
    for (int64_t g = 0; g < groups;) {
      int64_t stop = g + 1;
      while (stop < groups && same(hulls_[g], hulls_[stop])) ++stop;
      if (hulls_[g].begin < hulls_[g].end)
        add_groups(seen, key, live, g, stop, biased, finite || (hulls_[g].full && !biased));
      g = stop;
    }
  }

  static bool same(const Hull& a, const Hull& b) { return a.begin == b.begin && a.end == b.end && a.full == b.full; }

  /// Rows of decoding: each key and value is used once, straight from memory (16-bit ones widened).
  void add_keys_to_few_rows(const VisibleKeys& seen, int64_t key, int64_t live, const T* k, const T* v) {
    const Hull hull = seen.hull(0, key, live);
    if (hull.begin >= hull.end) return;
    const float *keys = k_, *values = v_;
    int64_t key_stride = q_words_, value_stride = out_cols_;
    if constexpr (std::is_same_v<T, float>) {
      keys = k, key_stride = p_.k_stride_t;
      values = v, value_stride = p_.v_stride_t;
    } else {
      load_keys<Words>(k, p_.k_stride_t, live, p_.d, k_, q_words_);
      load_keys<Words>(v, p_.v_stride_t, live, p_.dv, v_, out_cols_);
    }
    const bool biased = masks_by_bias(p_, *rows_, key, live);
    const int64_t begin = hull.begin / kLanes * kLanes, end = round_up(hull.end, kLanes);
    for (int64_t row = 0; row < rows_->count; ++row) {
      float *x = scores_ + row * kKeys, *out = sums_.out + row * out_cols_;
      dot_rows(q_ + row * q_words_, keys + begin * key_stride, key_stride, smaller(end, live) - begin, p_.d, x + begin);
      soften(row, x, begin, end, finish_scores(seen, hull, row, key, live, biased, begin, end, x));
      if (hull.full && !biased) {
        add_weighted_rows(x, values, value_stride, live, p_.dv, out);
        continue;
      }
      const float* bias = bias_row(p_, *rows_, row, key);
      for (int64_t j = hull.begin; j < hull.end; ++j) {
        if (!seen.sees(row, key, j) || (bias != nullptr && bias[j] == -__builtin_inff())) continue;
        add_weighted_rows(x + j, values + j * value_stride, value_stride, 1, p_.dv, out);
      }
    }
  }

  /// Products become scores, -inf where hidden. Returns the largest.
  float finish_scores(const VisibleKeys& seen, const Hull& hull, int64_t row, int64_t key, int64_t live, bool biased,
                      int64_t begin, int64_t end, float* x) const {
    const ScoreTerms terms = score_terms(p_, *rows_, row, key);
    const float found = finish_products(terms, begin, end, live, x);
    const bool some_biased = biased && terms.bias != nullptr, some_hidden = !hull.full || end > live;
    if (some_biased) hide_biased(terms.bias, begin, smaller(end, live), x);
    if (some_hidden) seen.fill_hidden(row, key, begin, end, -__builtin_inff(), x);
    return some_biased || some_hidden ? largest(x, begin, end) : found;
  }

  /// Groups [g, stop) of one hull. `biased`: some bias is -inf; `direct`: hidden values may be multiplied by their
  /// weight of 0.
  void add_groups(const VisibleKeys& seen, int64_t key, int64_t live, int64_t g, int64_t stop, bool biased,
                  bool direct) {
    const Hull& hull = hulls_[g];
    const int64_t begin = hull.begin / kLanes * kLanes, end = round_up(hull.end, kLanes);
    const int64_t row = g * kTileRows, rows = (stop - g) * kTileRows;
    float* scores = scores_ + row * kKeys;
    product<Words>(rows, end - begin, q_words(), {q_ + row * q_words_, q_words_, 1}, {kt_ + begin, kKeys},
                   {scores + begin, kKeys}, false);
    for (int64_t i = 0; i < rows; ++i) {
      float* x = scores + i * kKeys;
      soften(row + i, x, begin, end, finish_scores(seen, hull, row + i, key, live, biased, begin, end, x));
    }
    if (direct) {
      const int64_t from = hull.begin / Words::kDepth, depth = ceil_div(hull.end, Words::kDepth) - from;
      product<Words>(rows, out_cols_, depth, {scores + from, kKeys, 1}, {v_pairs_ + from * out_cols_, out_cols_},
                     {sums_.out + row * out_cols_, out_cols_}, true);
    } else {
      for (int64_t i = row; i < smaller(row + rows, rows_->count); ++i) add_values(seen, i, key, hull);
    }
  }

  /// Words of the summed dimension that are not padding.
  int64_t q_words() const { return ceil_div(p_.d, Words::kDepth); }

  /// The scores x of a row, the largest of them `found`, become weights; what was summed before is scaled to the new
  /// maximum.
  void soften(int64_t row, float* x, int64_t begin, int64_t end, float found) {
    const float top = found > sums_.top[row] ? found : sums_.top[row];
    const float shift = top == -__builtin_inff() ? 0.0f : top;
    if (top != sums_.top[row]) {
      float factor[kLanes];
      vec_store(factor, vec_exp2(vec_set((sums_.top[row] - shift) * kLog2e)));
      sums_.sum[row] *= factor[0];
      float* out = sums_.out + row * out_cols_;
      for (int64_t c = 0; c < out_cols_; c += kLanes)
        vec_store(out + c, vec_mul(vec_load(out + c), vec_set(factor[0])));
      sums_.top[row] = top;
    }
    sums_.sum[row] += exponentials<Words>(x, begin, end, shift);
  }

  /// out += weights * values, visible keys only.
  void add_values(const VisibleKeys& seen, int64_t row, int64_t key, const Hull& hull) {
    const auto* weights = reinterpret_cast<const typename Words::Element*>(scores_ + row * kKeys);
    const auto* values = reinterpret_cast<const typename Words::Element*>(v_);
    const float* bias = bias_row(p_, *rows_, row, key);
    float* out = sums_.out + row * out_cols_;
    for (int64_t j = hull.begin; j < hull.end; ++j) {
      if (!seen.sees(row, key, j) || (bias != nullptr && bias[j] == -__builtin_inff())) continue;
      const float w = to_float(weights[j]);
      for (int64_t c = 0; c < p_.dv; ++c) out[c] += w * to_float(values[j * out_cols_ + c]);
    }
  }

  const IntervalAttentionParams& p_;
  const RowTile* rows_ = nullptr;
  RowSums sums_{};
  const bool few_rows_;
  const int64_t q_words_, out_cols_;
  float *const q_, *const k_, *const kt_, *const v_, *const v_pairs_, *const scores_;
  Hull* const hulls_;
  Interval* const intervals_;
  int32_t* const marks_;
  const int64_t bytes_;
};

}  // namespace subquad::cpu::SUBQUAD_ISA::interval
