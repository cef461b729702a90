// Backward pass of attention to spans, second part: the gradients of a range of keys, from all pairs that see them.
#pragma once

#include "ops/span_attention/cpu_backward_scores.h"

namespace subquad::cpu::SUBQUAD_ISA::spans {

/// All queries of a batch entry, with the heads that share a key head.
inline Queries all_queries(const SpanAttentionParams& p, int64_t head) {
  return {head / p.kv_heads, head % p.kv_heads, p.heads / p.kv_heads, 0, p.tokens};
}

/// The pairs of all queries of a key head, sorted by the cell of keys in which they begin and then by `id`.
class PairList {
 public:
  PairList(const SpanAttentionParams& p, int32_t* memory)
      : p_(p),
        most_(memory),
        longest_(memory + 1),
        ends_(memory + 2),
        meetings_(ends_ + cells(p)),
        pairs_(reinterpret_cast<Pair*>(meetings_ + tiles(p))) {}

  static int64_t ints(const SpanAttentionParams& p) {
    return 2 + cells(p) + tiles(p) + 3 * p.tokens * (p.heads / p.kv_heads) * p.spans;
  }

  /// Without those that see nothing.
  void fill(const Queries& queries) {
    for (int64_t i = 0; i < cells(p_); ++i) ends_[i] = 0;
    for (int64_t i = 0; i < tiles(p_); ++i) meetings_[i] = 0;
    int64_t longest = 0, most = 0, count = 0;
    each_pair(queries, [&](const Pair& pair) {
      longest = larger(longest, pair.end - pair.begin);
      ++ends_[pair.begin / kCell];
      ++meetings_[pair.begin / kKeys];
      --meetings_[ceil_div(pair.end, kKeys)];
    });
    for (int64_t i = 0; i < cells(p_); ++i) {
      const int32_t here = ends_[i];
      ends_[i] = static_cast<int32_t>(count);
      count += here;
    }
    for (int64_t i = 0, meeting = 0; i < tiles(p_); ++i) {
      meeting += meetings_[i];
      most = larger(most, meeting);
    }
    each_pair(queries, [&](const Pair& pair) { pairs_[ends_[pair.begin / kCell]++] = pair; });
    *most_ = static_cast<int32_t>(most);
    *longest_ = static_cast<int32_t>(longest);
  }

  /// The largest number of pairs that meet the same tile.
  int64_t most() const { return *most_; }

  /// Those which may see keys from `key` on, a multiple of kCell.
  Pairs from(int64_t key) const {
    const int64_t first = before((key - *longest_) / kCell * kCell);
    return {pairs_ + first, before(cells(p_) * kCell) - first};
  }

 private:
  static constexpr int64_t kCell = 16;  // pairs that begin close to each other see much the same

  static int64_t cells(const SpanAttentionParams& p) { return ceil_div(p.keys, kCell); }
  static int64_t tiles(const SpanAttentionParams& p) { return ceil_div(p.keys, kKeys) + 1; }
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
  int32_t *const most_, *const longest_;
  int32_t* const ends_;      // [cells]: how many pairs begin in a cell or before it
  int32_t* const meetings_;  // [tiles]
  Pair* const pairs_;
};

/// dk and dv of a range of keys, tile by tile.
template <class T>
class KeyGradients {
  using Tile = KeyTile<T>;
  using Words = typename Tile::Words;

 public:
  KeyGradients(const SpanAttentionParams& p, const SpanAttentionGrads& grads, const float* terms, int64_t most,
               Arena arena)
      : p_(p),
        grads_(grads),
        terms_(terms),
        q_cols_(columns(p.d)),
        v_cols_(columns(p.dv)),
        q_(arena.take<float>(kTilePairs * q_cols_)),
        grad_(arena.take<float>(kTilePairs * v_cols_)),
        q_words_(Tile::kFloats ? q_ : arena.take<float>(kTilePairs * Tile::words(p.d))),
        grad_words_(Tile::kFloats ? grad_ : arena.take<float>(kTilePairs * Tile::words(p.dv))),
        x_(arena.take<float>(kTilePairs * kKeys)),
        d_(arena.take<float>(kTilePairs * kKeys)),
        dk_(arena.take<float>(kKeys * q_cols_)),
        dv_(arena.take<float>(kKeys * v_cols_)),
        tile_(p, arena),
        sweep_(most, arena),
        bytes_(arena.used()) {}

  int64_t bytes() const { return bytes_; }

  /// Keys [first, last), `first` a multiple of kKeys.
  void run(const Queries& queries, const PairList& list, int64_t first, int64_t last) {
    queries_ = &queries;
    sweep_.start(list.from(first), first);
    bool more = sweep_.next();
    for (int64_t key = first; key < last; key += kKeys) {
      zero_words(dk_, kKeys * q_cols_);
      zero_words(dv_, kKeys * v_cols_);
      if (more && sweep_.key() == key) {
        tile_.load(queries.b, queries.kv_head, key, false);
        add(sweep_.full(), true);
        add(sweep_.edges(), false);
        more = sweep_.next();
      }
      store(key, smaller(kKeys, last - key));
    }
  }

 private:
  void add(const Pairs& pairs, bool full) {
    for (int64_t i = 0; i < pairs.count; i += kTilePairs)
      add_pairs(pairs.pairs + i, smaller(kTilePairs, pairs.count - i), full);
  }

  void add_pairs(const Pair* pairs, int64_t count, bool full) {
    const bool finite = load_rows(pairs, count);
    const int64_t rows = round_up(count, kTileRows), step = full ? rows : kTileRows;
    Hull hulls[kTilePairs / kTileRows];
    for (int64_t i = 0; i < rows; i += step) {
      const int64_t here = smaller(step, count - i);
      const Hull hull = full ? Hull{0, kKeys} : hull_of(pairs + i, here, sweep_.key());
      hulls[i / kTileRows] = hull;
      add_scores(pairs + i, i, here, full, hull);
    }
    if (!finite) {
      for (int64_t i = 0; i < count; ++i) add_pair(pairs[i], i);
    } else if (full) {
      add_keys(0, kKeys, 0, rows);
    } else {
      constexpr int64_t kColumns = 16;
      for (int64_t j = 0; j < kKeys; j += kColumns) {
        int64_t from = rows, to = 0;
        for (int64_t i = 0; i < rows; i += kTileRows) {
          const Hull hull = hulls[i / kTileRows];
          if (hull.begin >= j + kColumns || hull.end <= j) continue;
          from = smaller(from, i);
          to = i + kTileRows;
        }
        if (from < to) add_keys(j, kColumns, from, to - from);
      }
    }
  }

  /// Whether all of the pairs' rows are finite.
  bool load_rows(const Pair* pairs, int64_t count) {
    bool finite = true;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = pairs[i].id / p_.spans;
      const T* q = static_cast<const T*>(p_.q) + queries_->b * p_.q_stride_b + queries_->token(row) * p_.q_stride_t +
                   queries_->head(row) * p_.q_stride_h;
      const T* grad = static_cast<const T*>(grads_.grad_out) + queries_->at(p_, row) * p_.dv;
      finite &= load_row<Floats>(q, p_.d, q_ + i * q_cols_, q_cols_);
      finite &= load_row<Floats>(grad, p_.dv, grad_ + i * v_cols_, v_cols_);
      if constexpr (Tile::kFloats) continue;
      load_row<Words>(q, p_.d, q_words_ + i * Tile::words(p_.d), Tile::words(p_.d));
      load_row<Words>(grad, p_.dv, grad_words_ + i * Tile::words(p_.dv), Tile::words(p_.dv));
    }
    const int64_t padding = round_up(count, kTileRows) - count;
    zero_words(q_ + count * q_cols_, padding * q_cols_);
    zero_words(grad_ + count * v_cols_, padding * v_cols_);
    return finite;
  }

  /// Weights and gradients of the scores of rows [row, row + count) of the tile; 0 outside the hull, and in its
  /// padding.
  void add_scores(const Pair* pairs, int64_t row, int64_t count, bool full, const Hull& hull) {
    const int64_t rows = round_up(count, kTileRows), width = hull.end - hull.begin;
    const int64_t q_words = Tile::words(p_.d), v_words = Tile::words(p_.dv);
    float *x = x_ + row * kKeys, *d = d_ + row * kKeys;
    product<Words>(rows, width, Tile::depth(p_.d), {q_words_ + row * q_words, q_words, 1},
                   {tile_.kt + hull.begin, kKeys}, {x + hull.begin, kKeys}, false);
    product<Words>(rows, width, Tile::depth(p_.dv), {grad_words_ + row * v_words, v_words, 1},
                   {tile_.vt + hull.begin, kKeys}, {d + hull.begin, kKeys}, false);
    for (int64_t i = 0; i < rows; ++i, x += kKeys, d += kKeys) {
      if (i >= count) {
        zero_words(x, kKeys), zero_words(d, kKeys);
        continue;
      }
      const int64_t id = pairs[i].id, at = queries_->at(p_, id / p_.spans), s = id % p_.spans;
      const int64_t softmax = at * p_.softmaxes + s % p_.softmaxes;
      const float gate = p_.gate == nullptr ? 1.0f : p_.gate[softmax];
      const float norm = terms_[2 * softmax], c = terms_[2 * softmax + 1];
      tile_.finish(pairs[i], full, hull, {p_.lse[softmax], gate * norm, c * norm}, x, d);
      zero_words(x, hull.begin), zero_words(x + hull.end, kKeys - hull.end);
      zero_words(d, hull.begin), zero_words(d + hull.end, kKeys - hull.end);
    }
  }

  /// Adds the shares of rows [row, row + count) of the tile to keys [j, j + keys).
  void add_keys(int64_t j, int64_t keys, int64_t row, int64_t count) {
    const int64_t at = row * kKeys + j;
    product<Floats>(keys, v_cols_, count, {x_ + at, 1, kKeys}, {grad_ + row * v_cols_, v_cols_},
                    {dv_ + j * v_cols_, v_cols_}, true);
    product<Floats>(keys, q_cols_, count, {d_ + at, 1, kKeys}, {q_ + row * q_cols_, q_cols_},
                    {dk_ + j * q_cols_, q_cols_}, true);
  }

  /// The same for one pair, which is kept from the keys that it does not see.
  void add_pair(const Pair& pair, int64_t row) {
    for (int64_t j = 0; j < kKeys; ++j) {
      if (!tile_.sees(pair, j)) continue;
      add_row(dv_ + j * v_cols_, grad_ + row * v_cols_, v_cols_, x_[row * kKeys + j]);
      add_row(dk_ + j * q_cols_, q_ + row * q_cols_, q_cols_, d_[row * kKeys + j]);
    }
  }

  void store(int64_t key, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
      const int64_t at = (queries_->b * p_.keys + key + j) * p_.kv_heads + queries_->kv_head;
      T *dk = static_cast<T*>(grads_.dk) + at * p_.d, *dv = static_cast<T*>(grads_.dv) + at * p_.dv;
      for (int64_t i = 0; i < p_.d; ++i) dk[i] = from_float<T>(dk_[j * q_cols_ + i] * p_.scale);
      for (int64_t i = 0; i < p_.dv; ++i) dv[i] = from_float<T>(dv_[j * v_cols_ + i]);
    }
  }

  const SpanAttentionParams& p_;
  const SpanAttentionGrads& grads_;
  const float* const terms_;
  const Queries* queries_ = nullptr;
  const int64_t q_cols_, v_cols_;
  float *const q_, *const grad_, *const q_words_, *const grad_words_, *const x_, *const d_, *const dk_, *const dv_;
  Tile tile_;
  PairSweep sweep_;
  const int64_t bytes_;
};

}  // namespace subquad::cpu::SUBQUAD_ISA::spans
