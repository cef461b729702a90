// Pairs of a query and one of its spans, met tile of keys by tile of keys, and products of rows that lie anywhere. One
// instruction set.
#pragma once

#include "cpu/simd/arena.h"
#include "cpu/simd/tile.h"
#include "ops/span_attention/params.h"

namespace subquad::cpu::SUBQUAD_ISA::spans {

constexpr int64_t kKeys = 64;  // keys of a tile, which begins at a multiple of it
constexpr int kTileBits = 6;   // log2 of kKeys

/// Queries [first, first + count) of one batch entry, with the heads that share one key head. Their rows are (query,
/// head of the group) pairs, query by query.
struct Queries {
  int64_t b, kv_head, group, first, count;

  int64_t rows() const { return count * group; }
  int64_t token(int64_t row) const { return first + row / group; }
  int64_t head(int64_t row) const { return kv_head * group + row % group; }
  /// Which of all (b, t, h) the row is.
  int64_t at(const SpanAttentionParams& p, int64_t row) const {
    return (b * p.tokens + token(row)) * p.heads + head(row);
  }
};

/// Slot `id % spans` of row `id / spans`; it sees keys [begin, end).
struct Pair {
  int32_t id, begin, end;
};

/// A list of pairs, each of which sees a key of the tile.
struct Pairs {
  const Pair* pairs;
  int64_t count;
};

/// The pairs of some queries, tile by tile. In a tile they come in the order of the tile in which each begins, and of
/// `id` where that is the same; what is summed over them in this order has the same bits every time.
class PairSweep {
 public:
  /// For up to `capacity` pairs.
  PairSweep(int64_t capacity, Arena& arena)
      : sorted_(arena.take<Pair>(capacity)),
        active_(arena.take<Pair>(capacity)),
        full_(arena.take<Pair>(capacity)),
        edges_(arena.take<Pair>(capacity)) {}

  /// Starts over with the pairs of `queries` that see any of keys [begin, end), cut to those keys.
  void start(const SpanAttentionParams& p, const Queries& queries, int64_t begin, int64_t end) {
    count_ = taken_ = active_count_ = 0;
    from_ = begin / kKeys * kKeys;
    Pair* found = full_;
    for (int64_t row = 0, id = 0; row < queries.rows(); ++row) {
      for (int64_t s = 0; s < p.spans; ++s, ++id) {
        const Span span = span_of(p, queries.b, queries.token(row), queries.head(row), s);
        const int64_t from = larger(span.begin, begin), to = smaller(span.end, end);
        if (from < to)
          found[count_++] = {static_cast<int32_t>(id), static_cast<int32_t>(from), static_cast<int32_t>(to)};
      }
    }
    sort(found);
    pairs_ = sorted_;
  }

  /// Goes on to the next tile that some pair sees; false after the last.
  bool next() {
    if (active_count_ == 0) {
      if (taken_ == count_) return false;
      key_ = larger(from_, pairs_[taken_].begin / kKeys * kKeys);
    } else {
      key_ += kKeys;
    }
    int64_t kept = 0;
    full_count_ = edge_count_ = 0;
    const auto meet = [&](const Pair& pair) {
      if (pair.end > key_ + kKeys) active_[kept++] = pair;
      if (pair.begin <= key_ && pair.end >= key_ + kKeys) {
        full_[full_count_++] = pair;
      } else {
        edges_[edge_count_++] = pair;
      }
    };
    for (int64_t i = 0; i < active_count_; ++i) meet(active_[i]);
    for (; taken_ < count_ && pairs_[taken_].begin < key_ + kKeys; ++taken_)
      if (pairs_[taken_].end > key_) meet(pairs_[taken_]);
    active_count_ = kept;
    return true;
  }

  /// The first key of the tile, the pairs that see all of its keys, and those that see some.
  int64_t key() const { return key_; }
  Pairs full() const { return {full_, full_count_}; }
  Pairs edges() const { return {edges_, edge_count_}; }

 private:
  /// Sorts by the tile in which a pair begins, stably: the pairs of `found` (which is full_) end up in sorted_.
  void sort(Pair* found) {
    constexpr int kBits = 11;
    int32_t low = INT32_MAX, high = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const int32_t tile = found[i].begin >> kTileBits;
      low = tile < low ? tile : low;
      high = tile > high ? tile : high;
    }
    Pair *from = found, *to = active_;
    for (int shift = 0; count_ > 0 && (high - low) >> shift != 0; shift += kBits) {
      int32_t places[1 << kBits] = {};
      const auto digit = [&](const Pair& pair) {
        return (((pair.begin >> kTileBits) - low) >> shift) & ((1 << kBits) - 1);
      };
      for (int64_t i = 0; i < count_; ++i) ++places[digit(from[i])];
      int32_t before = 0;
      for (int32_t& place : places) {
        const int32_t here = place;
        place = before;
        before += here;
      }
      for (int64_t i = 0; i < count_; ++i) to[places[digit(from[i])]++] = from[i];
      Pair* const done = to;
      to = from, from = done;
    }
    std::memcpy(sorted_, from, static_cast<size_t>(count_) * sizeof(Pair));
  }

  Pair *const sorted_, *const active_, *const full_, *const edges_;
  const Pair* pairs_ = nullptr;
  int64_t from_ = 0, count_ = 0, taken_ = 0, active_count_ = 0, full_count_ = 0, edge_count_ = 0, key_ = 0;
};

// --------------------------------------------------------------------------------------------------------------- tiles

/// The masked keys of a batch entry, from `key` on, or null.
inline const bool* mask_of(const SpanAttentionParams& p, int64_t b, int64_t key) {
  return p.key_mask == nullptr ? nullptr : p.key_mask + b * p.keys + key;
}

/// Whether a tile has all of its keys and none of them is masked.
inline bool is_whole(const SpanAttentionParams& p, int64_t b, int64_t key) {
  if (key + kKeys > p.keys) return false;
  const bool* mask = mask_of(p, b, key);
  bool whole = true;
  for (int64_t j = 0; mask != nullptr && j < kKeys; ++j) whole &= mask[j];
  return whole;
}

/// A tile of keys or values of n elements as kKeys rows of `words` words. Keys that there are not, or that are masked,
/// are rows of zeros. Returns whether all elements are finite.
template <class Words, class T>
inline bool load_tile(const SpanAttentionParams& p, const void* base, const PagedRows& rows, int64_t b, int64_t kv_head,
                      int64_t key, int64_t n, float* dst, int64_t words) {
  const bool* mask = mask_of(p, b, key);
  const int64_t live = smaller(kKeys, p.keys - key);
  bool finite = true;
  for (int64_t j = 0; j < kKeys; ++j) {
    if (j < live && (mask == nullptr || mask[j])) {
      const T* src = static_cast<const T*>(base) + row_offset(rows, b, key + j, kv_head);
      finite &= load_row<Words>(src, n, dst + j * words, words);
    } else {
      zero_words(dst + j * words, words);
    }
  }
  return finite;
}

/// x = -inf for the keys of a tile that a pair does not see, over columns [begin, end).
inline void hide(const SpanAttentionParams& p, int64_t b, const Pair& pair, int64_t key, int64_t begin, int64_t end,
                 float* x) {
  const float hidden = -__builtin_inff();
  const int64_t from = clamp(pair.begin - key, begin, end), to = clamp(pair.end - key, begin, end);
  for (int64_t j = begin; j < from; ++j) x[j] = hidden;
  for (int64_t j = to; j < end; ++j) x[j] = hidden;
  const bool* mask = mask_of(p, b, key);
  for (int64_t j = from; mask != nullptr && j < to; ++j) x[j] = mask[j] ? x[j] : hidden;
}

/// Columns of a tile that some of a few pairs see: begin and end are multiples of kLanes.
struct Hull {
  int64_t begin, end;
};

inline Hull hull_of(const Pair* pairs, int64_t count, int64_t key) {
  int64_t begin = kKeys, end = 0;
  for (int64_t i = 0; i < count; ++i) {
    begin = smaller(begin, clamp(pairs[i].begin - key, 0, kKeys));
    end = larger(end, clamp(pairs[i].end - key, 0, kKeys));
  }
  return {begin / kLanes * kLanes, round_up(end, kLanes)};
}

// ------------------------------------------------------------------------------------------------------------ products

template <class Words, int N>
inline void product_columns_of_rows(const float* const* left, const float* b, int64_t ldb, int64_t depth,
                                    float* const* out, int64_t col, bool add) {
  Vec sums[kTileRows][N];
  for (int r = 0; r < kTileRows; ++r)
    for (int n = 0; n < N; ++n) sums[r][n] = add ? vec_load(out[r] + col + n * kLanes) : vec_zero();
  const float *a0 = left[0], *a1 = left[1], *a2 = left[2], *a3 = left[3];
  static_assert(kTileRows == 4);
  for (int64_t t = 0; t < depth; ++t) {
    Vec right[N];
    for (int n = 0; n < N; ++n) right[n] = vec_load(b + t * ldb + n * kLanes);
    const Vec words[kTileRows] = {vec_set(a0[t]), vec_set(a1[t]), vec_set(a2[t]), vec_set(a3[t])};
    for (int r = 0; r < kTileRows; ++r)
      for (int n = 0; n < N; ++n) sums[r][n] = Words::multiply_add(words[r], right[n], sums[r][n]);
  }
  for (int r = 0; r < kTileRows; ++r)
    for (int n = 0; n < N; ++n) vec_store(out[r] + col + n * kLanes, sums[r][n]);
}

/// As `product`, where row r of the left operand is left[r][0 .. depth) and that of the result out[r][0 .. cols).
template <class Words>
inline void product_of_rows(int64_t rows, int64_t cols, int64_t depth, const float* const* left, Block b,
                            float* const* out, bool add) {
  for (int64_t col = 0; col < cols; col += kTileCols) {
    const int64_t vecs = smaller(cols - col, kTileCols) / kLanes;
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const float* right = b.words + col;
      const float* const* a = left + row;
      float* const* c = out + row;
      switch (vecs) {
        case 1:
          product_columns_of_rows<Words, 1>(a, right, b.stride, depth, c, col, add);
          break;
        case 2:
          product_columns_of_rows<Words, 2>(a, right, b.stride, depth, c, col, add);
          break;
        case 3:
          if constexpr (kTileVecs >= 3) product_columns_of_rows<Words, 3>(a, right, b.stride, depth, c, col, add);
          break;
        default:
          if constexpr (kTileVecs >= 4) product_columns_of_rows<Words, 4>(a, right, b.stride, depth, c, col, add);
      }
    }
  }
}

}  // namespace subquad::cpu::SUBQUAD_ISA::spans
