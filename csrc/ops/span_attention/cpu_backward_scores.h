// Backward pass of attention to spans: the scores of a group of pairs against a tile of keys, recomputed, and their
// gradients. Keys are the rows and pairs the columns, so that keys and values are multiplied as they lie, and what
// belongs to a pair is turned once for all of its keys.
#pragma once

#include "ops/span_attention/cpu_backward_pairs.h"

namespace subquad::cpu::SUBQUAD_ISA::spans {

/// The columns of floats in which tiles hold n elements.
inline int64_t columns(int64_t n) { return padded_words<Floats>(n); }

template <class T>
inline float dot_of(const T* a, const T* b, int64_t n) {
  Vec sums = vec_zero();
  float sum = 0.0f;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sums = vec_fma(vec_load(a + i), vec_load(b + i), sums);
  for (; i < n; ++i) sum += to_float(a[i]) * to_float(b[i]);
  return sum + vec_sum(sums);
}

/// Tiles of the keys of a head and of their values, loaded when they are first asked for. Products of elements are of
/// words, in which they are exact; what was computed is multiplied as floats.
template <class T>
class KeyTiles {
 public:
  using Words = typename WordsOf<T>::Type;
  static constexpr bool kFloats = Words::kDepth == 1;

  struct Tile {
    int64_t key;  // its first
    const float *k_words, *v_words, *k;
    bool k_finite;
    const bool* mask;  // of its keys, or null
  };

  /// Remembers `capacity` tiles that follow each other; `k` of a tile is there where it is `wanted`.
  KeyTiles(const SpanAttentionParams& p, int64_t capacity, bool wanted, Arena& arena)
      : p_(p),
        capacity_(capacity),
        k_words_(arena.take<float>(capacity * kKeys * words(p.d))),
        v_words_(arena.take<float>(capacity * kKeys * words(p.dv))),
        k_(kFloats ? k_words_ : arena.take<float>(wanted ? capacity * kKeys * columns(p.d) : 0)),
        wanted_(wanted),
        tiles_(arena.take<Tile>(capacity)) {}

  static int64_t words(int64_t n) { return padded_words<Words>(n); }
  static int64_t depth(int64_t n) { return ceil_div(n, Words::kDepth); }

  void start(int64_t b, int64_t kv_head) {
    b_ = b, kv_head_ = kv_head;
    for (int64_t i = 0; i < capacity_; ++i) tiles_[i].key = -1;
  }

  const Tile& at(int64_t index) {
    const int64_t slot = index % capacity_, key = index * kKeys;
    Tile& tile = tiles_[slot];
    if (tile.key == key) return tile;
    float* k_words = k_words_ + slot * kKeys * words(p_.d);
    float* v_words = v_words_ + slot * kKeys * words(p_.dv);
    float* k = k_ + slot * kKeys * columns(p_.d);
    tile = {key, k_words, v_words, k, true, mask_of(p_, b_, key)};
    tile.k_finite = load_tile<Words, T>(p_, p_.k, p_.keys_at, b_, kv_head_, key, p_.d, k_words, words(p_.d));
    load_tile<Words, T>(p_, p_.v, p_.values_at, b_, kv_head_, key, p_.dv, v_words, words(p_.dv));
    if (!kFloats && wanted_) load_tile<Floats, T>(p_, p_.k, p_.keys_at, b_, kv_head_, key, p_.d, k, columns(p_.d));
    return tile;
  }

 private:
  const SpanAttentionParams& p_;
  const int64_t capacity_;
  float *const k_words_, *const v_words_, *const k_;
  const bool wanted_;
  Tile* const tiles_;
  int64_t b_ = 0, kv_head_ = 0;
};

/// Rows of a tile of keys.
struct TileRows {
  int64_t from, to;  // multiples of kTileRows

  int64_t count() const { return to - from; }
};

inline TileRows rows_of(const PairGroup& group, int64_t key) {
  return {clamp(group.begin - key, 0, kKeys) / kTileRows * kTileRows,
          round_up(clamp(group.end - key, 0, kKeys), kTileRows)};
}

/// The queries of a group and their gradients, and what is computed of them.
template <class T>
class GroupScores {
  using Tiles = KeyTiles<T>;
  using Words = typename Tiles::Words;

 public:
  /// `q` and `grad` are there where they are `wanted`.
  GroupScores(const SpanAttentionParams& p, const SpanAttentionGrads& grads, bool wanted, Arena& arena)
      : q_cols(columns(p.d)),
        v_cols(columns(p.dv)),
        q(arena.take<float>(Tiles::kFloats || wanted ? kPairs * q_cols : 0)),
        grad(arena.take<float>(Tiles::kFloats || wanted ? kPairs * v_cols : 0)),
        p_(p),
        grads_(grads),
        q_words_(Tiles::kFloats ? q : arena.take<float>(kPairs * Tiles::words(p.d))),
        grad_words_(Tiles::kFloats ? grad : arena.take<float>(kPairs * Tiles::words(p.dv))),
        qt_(arena.take<float>(kPairs * Tiles::words(p.d))),
        gradt_(arena.take<float>(kPairs * Tiles::words(p.dv))),
        wanted_(wanted) {}

  /// Returns whether all of their elements are finite.
  bool load(const Queries& queries, const PairGroup& group) {
    const int64_t q_words = Tiles::words(p_.d), v_words = Tiles::words(p_.dv), padded = round_up(group.count, 16);
    bool finite = true;
    for (int64_t i = 0; i < group.count; ++i) {
      const int64_t row = group.pairs[i].id / p_.spans;
      const T* from_q = static_cast<const T*>(p_.q) + queries.b * p_.q_stride_b + queries.token(row) * p_.q_stride_t +
                        queries.head(row) * p_.q_stride_h;
      const T* from_grad = static_cast<const T*>(grads_.grad_out) + queries.at(p_, row) * p_.dv;
      finite &= load_row<Words>(from_q, p_.d, q_words_ + i * q_words, q_words);
      finite &= load_row<Words>(from_grad, p_.dv, grad_words_ + i * v_words, v_words);
      begin_[i] = group.pairs[i].begin, end_[i] = group.pairs[i].end;
      if (Tiles::kFloats || !wanted_) continue;
      load_row<Floats>(from_q, p_.d, q + i * q_cols, q_cols);
      load_row<Floats>(from_grad, p_.dv, grad + i * v_cols, v_cols);
    }
    zero_words(q_words_ + group.count * q_words, (padded - group.count) * q_words);
    zero_words(grad_words_ + group.count * v_words, (padded - group.count) * v_words);
    for (int64_t i = group.count; i < kPairs; ++i) begin_[i] = end_[i] = 0, lse[i] = factor[i] = shift[i] = 0.0f;
    transpose_words(q_words_, padded, q_words, qt_, kPairs);
    transpose_words(grad_words_, padded, v_words, gradt_, kPairs);
    return finite;
  }

  /// x = e^(score - lse) and d = <grad_out, v> for rows of a tile: [kKeys, kPairs].
  void weigh(const PairGroup& group, const typename Tiles::Tile& tile, const TileRows& rows, float* x, float* d) const {
    const int64_t lanes = group.lanes(), q_words = Tiles::words(p_.d), v_words = Tiles::words(p_.dv);
    product<Words>(rows.count(), lanes, Tiles::depth(p_.d), {tile.k_words + rows.from * q_words, q_words, 1},
                   {qt_, kPairs}, {x + rows.from * kPairs, kPairs}, false);
    product<Words>(rows.count(), lanes, Tiles::depth(p_.dv), {tile.v_words + rows.from * v_words, v_words, 1},
                   {gradt_, kPairs}, {d + rows.from * kPairs, kPairs}, false);
    const Vec scale = vec_set(p_.scale), log2e = vec_set(kLog2e);
    for (int64_t i = 0; i < lanes; i += kLanes) {
      const Vec minus_lse = vec_zero() - vec_load(lse + i);
      for (int64_t j = rows.from; j < rows.to; ++j) {
        float* at = x + j * kPairs + i;
        vec_store(at, vec_exp2(vec_mul(vec_fma(vec_load(at), scale, minus_lse), log2e)));
      }
    }
  }

  /// d becomes the gradients of the scores, x * (factor * d - shift), and x the weights, x * factor, if they are
  /// wanted.
  void differentiate(const PairGroup& group, const TileRows& rows, float* x, float* d) const {
    for (int64_t i = 0; i < group.lanes(); i += kLanes) {
      const Vec by = vec_load(factor + i), minus_shift = vec_zero() - vec_load(shift + i);
      for (int64_t j = rows.from; j < rows.to; ++j) {
        const int64_t at = j * kPairs + i;
        const Vec weight = vec_load(x + at);
        vec_store(d + at, vec_mul(weight, vec_fma(vec_load(d + at), by, minus_shift)));
        if (wanted_) vec_store(x + at, vec_mul(weight, by));
      }
    }
  }

  /// x = d = 0 where a pair does not see a key.
  void hide(const PairGroup& group, const typename Tiles::Tile& tile, const TileRows& rows, float* x, float* d) const {
    for (int64_t j = rows.from; j < rows.to; ++j) {
      const int64_t key = tile.key + j;
      if (key >= group.all_begin && key < group.all_end && (tile.mask == nullptr || tile.mask[j])) continue;
      const bool there = key < p_.keys && (tile.mask == nullptr || tile.mask[j]);
      const auto place = static_cast<int32_t>(key);
      float *a = x + j * kPairs, *b = d + j * kPairs;
      for (int64_t i = 0; i < group.lanes(); ++i) {
        const bool seen = there & (place >= begin_[i]) & (place < end_[i]);
        a[i] = seen ? a[i] : 0.0f;
        b[i] = seen ? b[i] : 0.0f;
      }
    }
  }

  bool sees(const typename Tiles::Tile& tile, int64_t j, int64_t i) const {
    const int64_t key = tile.key + j;
    return key >= begin_[i] && key < end_[i] && (tile.mask == nullptr || tile.mask[j]);
  }

  const int64_t q_cols, v_cols;
  float *const q, *const grad;                       // [kPairs, q_cols] and [kPairs, v_cols]
  float lse[kPairs], factor[kPairs], shift[kPairs];  // of each pair, to be filled after `load`

 private:
  const SpanAttentionParams& p_;
  const SpanAttentionGrads& grads_;
  float *const q_words_, *const grad_words_, *const qt_, *const gradt_;
  const bool wanted_;
  int32_t begin_[kPairs], end_[kPairs];
};

}  // namespace subquad::cpu::SUBQUAD_ISA::spans
