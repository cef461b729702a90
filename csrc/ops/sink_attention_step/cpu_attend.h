// The new tokens of one key head attend to a range of its keys. One instruction set.
//
// Keys that are rotated where they are read come in tiles of consecutive tokens base, base + 1, ...: as
// <R(i) q, R(base + r) k> = <R(i - base) q, R(r) k>, one table of the rotations R(0), R(1), ... serves all tiles, and
// the queries, which are few, are rotated for each.
#pragma once

#include <cmath>
#include <type_traits>

#include "cpu/simd/arena.h"
#include "ops/sink_attention_step/cpu_integers.h"

namespace subquad::cpu::SUBQUAD_ISA::sink {

constexpr int64_t kRange = 512;  // tokens of a range
constexpr int64_t kRows = 64;    // query rows, (new token, head of the group) pairs, of a block
constexpr int64_t kSplitRows =
    128;                         // with more rows a block sees all its keys in one range: shares of all would be large
constexpr int64_t kFewRows = 8;  // up to so many, keys and values are widened, and keys rotated, where they are used

inline int64_t group_of(const SinkAttentionStepParams& p) { return p.heads / p.kv_heads; }
inline int64_t rows_of(const SinkAttentionStepParams& p) { return p.width * group_of(p); }
inline int64_t blocks_of(const SinkAttentionStepParams& p) { return ceil_div(rows_of(p), kRows); }
inline int64_t ranges_of(const SinkAttentionStepParams& p) {
  return rows_of(p) > kSplitRows ? 1 : larger(1, ceil_div(p.window + p.width, kRange));
}

/// Whether products with a ring of E are made in integers: their rounding would show beside elements of float.
template <class T, class E>
constexpr bool kIntegers = kShortProducts && std::is_same_v<E, Int8> && sizeof(T) < sizeof(float);

/// Rotations R(0), R(1), ... R(kTile - 1): the cosines of one, then its sines; the second table is the first in 16
/// bits.
struct Tables {
  float* floats;
  int16_t* shorts;  // or null
};

inline int64_t table_size(const SinkAttentionStepParams& p) { return p.rotated ? 0 : kTile * p.rotary; }

/// A share: sums of values of one row over one range, and their softmax behind them.
inline int64_t share_floats(const SinkAttentionStepParams& p) { return round_up(p.dv, 16) + 16; }
inline Softmax* softmax_of(const SinkAttentionStepParams& p, float* share) {
  return reinterpret_cast<Softmax*>(share + round_up(p.dv, 16));
}

/// Shares of all ranges of a head, one range after the other, become the result of row `row` of that head.
template <class T>
void finish_row(const SinkAttentionStepParams& p, int64_t b, int64_t kv_head, int64_t row, const float* shares,
                int64_t range_floats, int64_t ranges) {
  const int64_t t = row / group_of(p), h = kv_head * group_of(p) + row % group_of(p);
  const auto state = [&](int64_t r) { return *softmax_of(p, const_cast<float*>(shares + r * range_floats)); };
  const bool real = t < new_tokens(p, b), has_sink = real && p.sink_logits != nullptr;
  const float sink = has_sink ? p.sink_logits[h] : -__builtin_inff();
  float top = sink;
  for (int64_t r = 0; r < ranges; ++r) top = state(r).top > top ? state(r).top : top;
  const float shift = top == -__builtin_inff() ? 0.0f : top;
  float total = 0.0f, sums[kSinkMaxDim] = {};
  for (int64_t r = 0; r < ranges; ++r) {
    const float factor = vector_exp(state(r).top - shift), *share = shares + r * range_floats;
    total += factor * state(r).sum;
    for (int64_t c = 0; c < p.dv; ++c) sums[c] += factor * share[c];
  }
  if (has_sink) total += sink == shift ? 1.0f : vector_exp(sink - shift);
  const bool empty = total == 0.0f;
  const int64_t at = (b * p.width + t) * p.heads + h;
  T* out = static_cast<T*>(p.out) + at * p.dv;
  for (int64_t c = 0; c < p.dv; ++c) out[c] = from_float<T>(empty ? 0.0f : sums[c] / total);
  p.lse[at] = empty ? -__builtin_inff() : shift + logf(total);
}

/// Elements that are asked for before they are used, where rows of one kind come one after the other: so much takes
/// about as long to come as to use.
template <class E>
constexpr int64_t kAhead = (6 << 10) / sizeof(E);

/// Whether keys and values of a tile have room in the first-level cache together. Then the values come while the keys
/// are used, and the next keys while the values are.
template <class E>
constexpr bool kTilesFit = sizeof(E) == 1;

/// Rows of keys and values of consecutive tokens.
template <class E>
struct Tokens {
  const E *k, *v;
  int64_t k_stride, v_stride, count;
  const float *k_scale, *v_scale;  // or null
  bool entering;                   // new: apart in memory, and not yet rotated where those of the cache are

  __attribute__((always_inline)) void fetch_first() const {  // as `fetch`
    if (entering) return;
    fetch(Ahead<E>{k, count * k_stride}, 0, kTilesFit<E> ? kTile * k_stride : kAhead<E>);
    if (!kTilesFit<E>) fetch(Ahead<E>{v, count * v_stride}, 0, kAhead<E>);
  }
  Ahead<E> ahead_of_keys(int64_t n) const {
    if (entering) return {};
    return kTilesFit<E> ? Ahead<E>{v, n * v_stride} : behind(k, kAhead<E>, count * k_stride);
  }
  Ahead<E> ahead_of_values(int64_t n) const {
    if (entering) return {};
    return kTilesFit<E> ? behind(k, n * k_stride, count * k_stride) : behind(v, kAhead<E>, count * v_stride);
  }
  static Ahead<E> behind(const E* rows, int64_t skip, int64_t size) {
    return skip < size ? Ahead<E>{rows + skip, size - skip} : Ahead<E>{};
  }

  Tokens from(int64_t i) const {
    Tokens rest = *this;
    rest.k += i * k_stride, rest.v += i * v_stride, rest.count -= i;
    if (k_scale != nullptr) rest.k_scale += i, rest.v_scale += i;
    return rest;
  }
};

/// T: of the tokens, E: of the ring.
template <class T, class E>
class Attention {
 public:
  Attention(const SinkAttentionStepParams& p, Tables tables, Arena arena)
      : p_(p),
        tables_(tables),
        half_(p.rotary / 2),
        words_(round_up(p.d, kLanes)),
        columns_(round_up(p.dv, kLanes)),
        rows_(smaller(kRows, rows_of(p))),
        plain_(arena.take<float>(rows_ * kQueryStride)),
        turned_(arena.take<float>(rows_ * kQueryStride)),
        far_(arena.take<float>(rows_ * kQueryStride)),
        keys_(arena.take<float>(kTile * words_)),
        values_(arena.take<float>(kTile * columns_)),
        scores_(arena.take<float>(rows_ * kTile)),
        cos_(arena.take<float>(half_)),
        sin_(arena.take<float>(half_)),
        spare_(arena.take<float>(words_)),
        k_factors_(arena.take<float>(kTile)),
        v_factors_(arena.take<float>(kTile)),
        short_queries_(arena.take<int16_t>(kIntegers<T, E> ? rows_ * kQueryStride : 0)),
        short_weights_(arena.take<int16_t>(kIntegers<T, E> ? rows_ * kTile : 0)),
        row_scales_(arena.take<float>(rows_)),
        views_(arena.take<SinkView>(rows_)),
        shares_(arena.take<float>(rows_ * share_floats(p))),
        bytes_(arena.used()) {}

  int64_t bytes() const { return bytes_; }

  /// Block `block` of the rows of a head over range `range` of its keys. `shares`, one for each row of the block, or
  /// null where there is one range: then these are the results.
  void run(int64_t b, int64_t kv_head, int64_t block, int64_t range, float* shares) {
    b_ = b, head_ = kv_head, first_ = block * kRows;
    count_ = smaller(kRows, rows_of(p_) - first_);
    before_ = tokens_before(p_, b), tokens_ = new_tokens(p_, b);
    out_ = shares == nullptr ? shares_ : shares;
    for (int64_t row = 0; row < count_; ++row) {
      float* share = out_ + row * share_floats(p_);
      for (int64_t c = 0; c < columns_; ++c) share[c] = 0.0f;
      *softmax_of(p_, share) = {-__builtin_inff(), 0.0f};
      views_[row] = token(row) < tokens_ ? sink_view(p_, before_, tokens_, p_.first[b], token(row)) : SinkView{};
    }
    const int64_t last_token = smaller(token(count_ - 1), tokens_ - 1);
    if (token(0) <= last_token) {
      const SinkView& last = views_[smaller(count_, (last_token + 1) * group_of(p_) - first_) - 1];
      load_queries();
      if (range == 0) add_tokens(0, last.sink_stop, true);
      // Ranges are counted from what the first row sees, be it in the block or not.
      const int64_t oldest = block == 0 ? views_[0].begin : sink_view(p_, before_, tokens_, p_.first[b], 0).begin;
      const bool whole = ranges_of(p_) == 1;
      const int64_t begin = whole ? views_[0].begin : larger(views_[0].begin, oldest + range * kRange);
      add_tokens(begin, whole ? last.stop : smaller(last.stop, oldest + (range + 1) * kRange), false);
    }
    if (shares != nullptr) return;
    for (int64_t row = 0; row < count_; ++row)
      finish_row<T>(p_, b, kv_head, first_ + row, out_ + row * share_floats(p_), 0, 1);
  }

 private:
  int64_t token(int64_t row) const { return (first_ + row) / group_of(p_); }

  /// The queries as floats; where keys are rotated on reading, their pairs parted as those of the keys will be. Where
  /// keys in the cache are rotated, the queries are now.
  void load_queries() {
    for (int64_t row = 0; row < count_; ++row) {
      const int64_t h = head_ * group_of(p_) + (first_ + row) % group_of(p_);
      const int64_t at = row * kQueryStride;
      float* x = plain_ + at;
      if (token(row) >= tokens_) {
        for (int64_t c = 0; c < words_; ++c) x[c] = turned_[at + c] = far_[at + c] = 0.0f;
        continue;
      }
      widen_row(static_cast<const T*>(p_.q) + b_ * p_.q_stride_b + token(row) * p_.q_stride_t + h * p_.q_stride_h, p_.d,
                x);
      for (int64_t c = 0; c < p_.rotary; ++c) x[c] *= p_.rotary_scale;
      if (half_ == 0) continue;
      if (p_.rotated) {
        turn(row, before_ + token(row), turned_);
        turn(row, before_ + token(row) - back(row), far_);
      } else if (p_.interleaved) {
        for (int64_t c = 0; c < p_.rotary; ++c) spare_[c] = x[c];
        part_pairs(spare_, half_, x);
      }
    }
  }

  /// How many positions nearer the sinks are than in the sequence.
  int64_t back(int64_t row) const { return p_.absolute ? 0 : views_[row].forgotten; }

  /// A query rotated by `position` into the same row of `out`.
  void turn(int64_t row, int64_t position, float* out) {
    float* y = out + row * kQueryStride;
    std::memcpy(y, plain_ + row * kQueryStride, static_cast<size_t>(words_) * sizeof(float));
    rotation(p_.turns, half_, position, cos_, sin_);
    rotate_row(y, p_.interleaved, cos_, sin_, half_);
  }

  /// The queries for a tile whose first token is `base`.
  const float* queries(int64_t base, bool sinks) {
    if (half_ == 0) return plain_;
    if (p_.rotated) return sinks ? far_ : turned_;
    int64_t known = -1;  // the token whose rotation is there
    for (int64_t row = 0; row < count_ && token(row) < tokens_; ++row) {
      if (token(row) != known) {
        known = token(row);
        rotation(p_.turns, half_, before_ + known - (sinks ? back(row) : 0) - base, cos_, sin_);
      }
      const float* x = plain_ + row * kQueryStride;
      float* y = turned_ + row * kQueryStride;
      rotate_halves(x, cos_, sin_, half_, y);
      for (int64_t c = p_.rotary; c < words_; ++c) y[c] = x[c];
    }
    return turned_;
  }

  /// Tokens [begin, end), all of them sinks or none: from the cache, where those of the ring are at most two runs of
  /// places, and from the new ones.
  void add_tokens(int64_t begin, int64_t end, bool sinks) {
    const int64_t head = b_ * p_.kv_heads + head_;
    for (int64_t token = begin; token < smaller(end, before_);) {
      const int64_t left = smaller(end, before_) - token;
      if (sinks) {
        const int64_t at = head * p_.sinks + token;
        add_run(Tokens<T>{static_cast<const T*>(p_.sink_k) + at * p_.d, static_cast<const T*>(p_.sink_v) + at * p_.dv,
                          p_.d, p_.dv, left, nullptr, nullptr, false},
                token, true);
        token += left;
      } else {
        const int64_t place = (token - p_.sinks) % p_.ring, n = smaller(left, p_.ring - place);
        const int64_t at = head * p_.ring + place;
        const bool scaled = p_.k_scale != nullptr;
        add_run(
            Tokens<E>{static_cast<const E*>(p_.ring_k) + at * p_.d, static_cast<const E*>(p_.ring_v) + at * p_.dv, p_.d,
                      p_.dv, n, scaled ? p_.k_scale + at : nullptr, scaled ? p_.v_scale + at : nullptr, false},
            token, false);
        token += n;
      }
    }
    const int64_t fresh = larger(begin, before_), t = fresh - before_;
    if (fresh >= end) return;
    add_run(Tokens<T>{static_cast<const T*>(p_.k) + b_ * p_.k_stride_b + t * p_.k_stride_t + head_ * p_.k_stride_h,
                      static_cast<const T*>(p_.v) + b_ * p_.v_stride_b + t * p_.v_stride_t + head_ * p_.v_stride_h,
                      p_.k_stride_t, p_.v_stride_t, end - fresh, nullptr, nullptr, true},
            fresh, sinks);
  }

  /// Tokens from `token` on, tile by tile.
  template <class Element>
  void add_run(const Tokens<Element>& run, int64_t token, bool sinks) {
    run.fetch_first();
    for (int64_t i = 0; i < run.count; i += kTile) add_tile(run.from(i), token + i, sinks);
  }

  /// The first tile of tokens, which are `base` and those after it.
  template <class Element>
  void add_tile(const Tokens<Element>& tokens, int64_t base, bool sinks) {
    const int64_t n = smaller(kTile, tokens.count), padded = round_up(n, kLanes);
    for (int64_t row = 0; row < count_; ++row) row_scales_[row] = 1.0f;
    score(queries(base, sinks), tokens, base, n);
    load_factors(tokens, n);
    for (int64_t row = 0; row < count_; ++row) {
      const Range seen = range_of(row, base, n, sinks);
      if (seen.begin >= seen.end) continue;
      float *x = scores_ + row * kTile, *share = out_ + row * share_floats(p_);
      soften(x, seen.begin, seen.end, padded, k_factors_, row_scales_[row], *softmax_of(p_, share), share, columns_);
      if (tokens.v_scale == nullptr) continue;
      for (int64_t j = 0; j < padded; j += kLanes) vec_store(x + j, vec_load(x + j) * vec_load(v_factors_ + j));
    }
    const Ahead<Element> ahead = tokens.ahead_of_values(n);
    if constexpr (kIntegers<T, Element>) {
      if (p_.dv % kShorts == 0)
        return add_all_integers({tokens.v, tokens.v_stride, 0, n, columns_, ahead}, base, padded);
    }
    if (p_.dv % kLanes == 0 && (std::is_same_v<Element, float> || count_ <= kFewRows))
      return add_all_values(tokens.v, tokens.v_stride, base, n, sinks, ahead);
    for (int64_t j = 0; j < n; ++j) widen_row(tokens.v + j * tokens.v_stride, p_.dv, values_ + j * columns_);
    add_all_values(values_, columns_, base, n, sinks, {});
  }

  /// What products with keys, and weights of values, are multiplied with.
  template <class Element>
  void load_factors(const Tokens<Element>& tokens, int64_t n) {
    for (int64_t j = 0; j < kTile; ++j) k_factors_[j] = p_.scale, v_factors_[j] = 1.0f;
    if (tokens.k_scale == nullptr) return;
    for (int64_t j = 0; j < n; ++j) k_factors_[j] = p_.scale * tokens.k_scale[j], v_factors_[j] = tokens.v_scale[j];
  }

  /// scores_ = products of the queries with the keys, in units of row_scales_. Keys are rotated as their tile wants it:
  /// where there are few rows, or integers, as they come from memory, otherwise once for all rows.
  template <class Element>
  void score(const float* q, const Tokens<Element>& tokens, int64_t base, int64_t n) {
    const bool by_table = half_ > 0 && !p_.rotated, by_token = half_ > 0 && p_.rotated && tokens.entering;
    const bool whole = !(by_table && p_.interleaved);
    const Ahead<Element> ahead = tokens.ahead_of_keys(n);
    if constexpr (kIntegers<T, Element>) {
      if (p_.d % kShorts == 0 && whole && (!by_table || half_ % kShorts == 0)) {
        const float most = by_table ? turned_most(words_) : kPlainMost, unit = by_table ? kTurnedUnit : 1.0f;
        for (int64_t row = 0; row < count_; ++row) {
          const int64_t at = row * kQueryStride;
          row_scales_[row] = round_row(q + at, words_, most, short_queries_ + at) * unit;
        }
        const Keys<Element, int16_t> keys{tokens.k, tokens.k_stride, words_, half_, tables_.shorts, ahead};
        return by_table ? dots<true>(short_queries_, keys, n) : dots<false>(short_queries_, keys, n);
      }
    }
    const int64_t pairs = half_ % kLanes == 0 ? half_ : 0;
    const bool direct = p_.d % kLanes == 0 && !by_token && whole && (!by_table || pairs > 0) &&
                        (count_ <= kFewRows || (std::is_same_v<Element, float> && !by_table));
    if (!direct) {
      load_keys(tokens, base, n);
      return dots<false>(q, Keys<float>{keys_, words_, words_, pairs, nullptr, {}}, n);
    }
    const Keys<Element> keys{tokens.k, tokens.k_stride, words_, pairs, tables_.floats, ahead};
    by_table ? dots<true>(q, keys, n) : dots<false>(q, keys, n);
  }

  template <bool kTurn, class Query, class Some>
  void dots(const Query* q, Some keys, int64_t n) {
    by_rows(0, count_, [&]<int R>(int64_t row) {
      dot_keys<R, kTurn>(q + row * kQueryStride, keys, n, scores_ + row * kTile);
      keys.ahead.left = 0;
    });
  }

  /// keys_ = keys as floats, rotated as their tile wants it.
  template <class Element>
  void load_keys(const Tokens<Element>& tokens, int64_t base, int64_t n) {
    const bool by_table = half_ > 0 && !p_.rotated, by_token = half_ > 0 && p_.rotated && tokens.entering;
    for (int64_t j = 0; j < n; ++j) {
      const Element* row = tokens.k + j * tokens.k_stride;
      float* key = keys_ + j * words_;
      if (by_table) {
        const float* cos = tables_.floats + j * p_.rotary;
        widen_rotated(row, p_.d, p_.interleaved, cos, cos + half_, half_, spare_, key);
        continue;
      }
      widen_row(row, p_.d, key);
      if (by_token) {
        rotation(p_.turns, half_, base + j, cos_, sin_);
        rotate_row(key, p_.interleaved, cos_, sin_, half_);
      }
    }
  }

  struct Range {
    int64_t begin, end;
  };

  /// What a row sees of a tile.
  Range range_of(int64_t row, int64_t base, int64_t n, bool sinks) const {
    const SinkView& view = views_[row];
    if (sinks) return {0, clamp(view.sink_stop - base, 0, n)};
    return {clamp(view.begin - base, 0, n), clamp(view.stop - base, 0, n)};
  }

  /// Rows that see the same keys together; what a row does not see is not even multiplied by 0.
  template <class Element>
  void add_all_values(const Element* v, int64_t stride, int64_t base, int64_t n, bool sinks, Ahead<Element> ahead) {
    const int64_t floats = share_floats(p_);
    for (int64_t row = 0; row < count_;) {
      const Range seen = range_of(row, base, n, sinks);
      int64_t stop = row + 1;
      for (; stop < count_; ++stop) {
        const Range other = range_of(stop, base, n, sinks);
        if (other.begin != seen.begin || other.end != seen.end) break;
      }
      by_rows(row, stop, [&]<int R>(int64_t first) {
        const Values<Element> values{v, stride, seen.begin, seen.end, columns_, ahead};
        add_values<R>(scores_ + first * kTile, values, out_ + first * floats, floats);
        ahead.left = 0;
      });
      row = stop;
    }
  }

  /// The same for all rows together: integers that are multiplied by 0 leave no trace.
  void add_all_integers(Values<Int8> values, int64_t base, int64_t padded) {
    const int64_t floats = share_floats(p_);
    for (int64_t row = 0; row < count_; ++row) {
      const Range seen = range_of(row, base, values.stop, false);
      float* x = scores_ + row * kTile;
      for (int64_t j = 0; j < seen.begin; ++j) x[j] = 0.0f;
      for (int64_t j = larger(seen.begin, seen.end); j < padded; ++j) x[j] = 0.0f;
      row_scales_[row] = round_row(x, padded, kPlainMost, short_weights_ + row * kTile);
    }
    by_rows(0, count_, [&]<int R>(int64_t row) {
      add_values<R>(short_weights_ + row * kTile, row_scales_ + row, values, out_ + row * floats, floats);
      values.ahead.left = 0;
    });
  }

  const SinkAttentionStepParams& p_;
  const Tables tables_;
  const int64_t half_, words_, columns_, rows_;
  float *const plain_, *const turned_, *const far_, *const keys_, *const values_, *const scores_;
  float *const cos_, *const sin_, *const spare_, *const k_factors_, *const v_factors_;
  int16_t *const short_queries_, *const short_weights_;
  float* const row_scales_;
  SinkView* const views_;
  float* const shares_;
  const int64_t bytes_;

  int64_t b_ = 0, head_ = 0, first_ = 0, count_ = 0, before_ = 0, tokens_ = 0;
  float* out_ = nullptr;
};

}  // namespace subquad::cpu::SUBQUAD_ISA::sink
