// Products of rows of quantised weights with a few tokens: lists of rows, and how they are walked. One instruction set.
#pragma once

#include "common/integers.h"
#include "cpu/simd/quantised_planes.h"

namespace subquad::cpu::SUBQUAD_ISA::quantised {

constexpr int kMaxTokens = 16;
constexpr int kPanel = 8;            // rows that several tokens meet, slice by slice
constexpr int64_t kShortRow = 1024;  // bytes: longer rows that meet one token in planes are walked one by one

/// Tokens of a tile of R rows, bounded by registers.
template <int R>
constexpr int kTokensWith = R > 2          ? 1
                            : kLanes == 16 ? 4
                                           : 2;

/// Calls tile<T>(j) for T = kMost, kMost / 2, ..., 1 so that [0, n) is covered, the widest tiles first.
template <int kMost, class F>
inline void in_tiles(int n, const F& tile, int begin = 0) {
  int j = begin;
  for (; j + kMost <= n; j += kMost) tile.template operator()<kMost>(j);
  if constexpr (kMost > 1) in_tiles<kMost / 2>(n, tile, j);
}

/// Rows of a weight in the order in which they are used, and those that are used after them.
struct RowList {
  const uint8_t* weight;
  const int32_t* index;  // of each row, or null: 0, 1, ...
  int64_t count;
  int64_t groups;
  int64_t bytes;       // of a row
  int64_t code_bytes;  // of a group
  const RowList* then = nullptr;

  Row at(int64_t j) const {
    const uint8_t* codes = weight + (index == nullptr ? j : index[j]) * bytes;
    const Half* scale = reinterpret_cast<const Half*>(codes + groups * code_bytes);
    return {codes, scale, scale + groups};
  }
  /// Row j, which may be one of those after these; row `other` where nothing is known of it.
  Row ahead(int64_t j, int64_t other) const {
    const RowList* list = this;
    for (; list != nullptr && j >= list->count; list = list->then) j -= list->count;
    return list == nullptr ? at(other) : list->at(j);
  }
  /// Rows that make kAhead bytes, a multiple of `tile`.
  int64_t distance(int64_t tile) const { return round_up(ceil_div(kAhead, larger(bytes, 1)), tile); }
  /// Fetch what nothing before these rows could.
  void fetch_first() const {
    if (count == 0) return;
    for (int64_t j = 0; j < distance(1); ++j) {
      const uint8_t* row = ahead(j, 0).codes;
      for (int64_t i = 0; i < bytes; i += 64) prefetch(row + i);
    }
  }
};

/// Tokens as floats and, for weights of four bits, in planes.
struct Tokens {
  const float* x;
  int64_t ld;
  const float* planes;  // null where no weight has four bits
  int64_t ld_planes;
  int64_t groups;
  int count;  // up to kMaxTokens
  template <bool kInPlanes>
  auto at(int64_t t) const {
    if constexpr (kInPlanes) {
      return planes_at(planes + t * ld_planes, groups);
    } else {
      return x + t * ld;
    }
  }
  /// Groups of a slice of the tokens that stays in the first cache.
  int64_t slice() const { return count <= 2 ? 64 : count <= 4 ? 32 : 16; }
  /// Bit t: token t can be in planes.
  unsigned in_planes() const {
    unsigned bits = 0;
    for (int t = 0; planes != nullptr && t < count; ++t)
      bits |= static_cast<unsigned>(fits_planes(planes + t * ld_planes, groups)) << t;
    return bits;
  }
};

/// out[t ld + j] = row j . token t, for the tokens among `some` of which bit t of wanted[j] is set (null: for all), and
/// perhaps others among them; tiles of R rows, kRows at a time in one slice after the other.
template <QuantisedFormat kFormat, bool kInPlanes, int kRows, int R>
inline void products(const RowList& list, const Tokens& x, unsigned some, int64_t slice, const uint16_t* wanted,
                     float* out, int64_t ld) {
  Vec total[kRows * kMaxTokens * 2];
  Row rows[kRows], next[kRows];
  int token[kRows][kMaxTokens], tokens[kRows];  // of the tile that begins at a row
  const int64_t distance = kRows == R ? list.distance(R) : kRows;
  for (int64_t first = 0; first < list.count; first += kRows) {
    const int here = static_cast<int>(smaller(kRows, list.count - first));
    const auto for_tiles = [&](const auto& tile) {
      int r = 0;
      for (; r + R <= here; r += R) tile.template operator()<R>(r);
      for (; r < here; ++r) tile.template operator()<1>(r);
    };
    for_tiles([&]<int N>(int r) {
      unsigned bits = 0;
      for (int i = r; i < r + N; ++i) {
        rows[i] = list.at(first + i);
        bits |= wanted == nullptr ? some : wanted[first + i] & some;
      }
      int n = 0;
      for (; bits != 0; bits &= bits - 1) token[r][n++] = __builtin_ctz(bits);
      tokens[r] = n;
    });
    for (int64_t begin = 0; begin == 0 || begin < list.groups; begin += slice) {  // once for rows of nothing
      const int64_t end = smaller(list.groups, begin + slice);
      const bool last = end == list.groups;
      const int64_t by = last ? -begin : slice;
      for (int i = 0; i < here; ++i) {
        const Row then = last ? list.ahead(first + distance + i, first + i) : rows[i];
        next[i] = {then.codes + by * list.code_bytes, then.scale + by, then.minimum + by};
      }
      for_tiles([&]<int N>(int r) {
        decltype(x.at<kInPlanes>(0)) at[kMaxTokens];
        for (int k = 0; k < tokens[r]; ++k) at[k] = x.at<kInPlanes>(token[r][k]);
        in_tiles<kTokensWith<N>>(tokens[r], [&]<int T>(int k) {
          dot_rows<kFormat, N, T>(rows + r, next + r, at + k, begin, end, total + (r * kMaxTokens + k) * 2, kMaxTokens);
        });
      });
    }
    for_tiles([&]<int N>(int r) {
      for (int i = r; i < r + N; ++i)
        for (int k = 0; k < tokens[r]; ++k) {
          Vec* sum = total + (i * kMaxTokens + k) * 2;
          float y = vec_sum(vec_add(sum[0], sum[1]));
          if (kInPlanes && !(y - y == 0.0f)) {  // an infinite scale: what floats make of it
            const float* at = x.at<false>(token[r][k]);
            dot_rows<kFormat, 1, 1>(rows + i, rows + i, &at, 0, list.groups, sum, 1);
            y = vec_sum(vec_add(sum[0], sum[1]));
          }
          out[token[r][k] * ld + first + i] = y;
        }
    });
  }
}

/// The same with tiles that fit the number of tokens and the length of the rows.
template <QuantisedFormat kFormat, bool kInPlanes>
inline void products(const RowList& list, const Tokens& x, unsigned some, const uint16_t* wanted, float* out,
                     int64_t ld) {
  if (x.count > 1) {
    products<kFormat, kInPlanes, kPanel, 2>(list, x, some, x.slice(), wanted, out, ld);
  } else if (kInPlanes && list.bytes > kShortRow) {
    products<kFormat, kInPlanes, 1, 1>(list, x, some, larger(list.groups, 1), wanted, out, ld);
  } else if (4 * list.bytes > kInFlight) {
    products<kFormat, kInPlanes, 2, 2>(list, x, some, larger(list.groups, 1), wanted, out, ld);
  } else {
    products<kFormat, kInPlanes, 4, 4>(list, x, some, larger(list.groups, 1), wanted, out, ld);
  }
}

/// The same for all tokens: those that can be are in planes where weights have four bits.
inline void products(QuantisedFormat format, const RowList& list, const Tokens& x, const uint16_t* wanted, float* out,
                     int64_t ld) {
  const unsigned all = (1u << x.count) - 1;
  by_format(format, [&]<QuantisedFormat kFormat>() {
    unsigned floats = all;
    if constexpr (kHasPlanes && kFormat != QuantisedFormat::kInt8) {
      floats &= ~x.in_planes();
      if (floats != all) products<kFormat, true>(list, x, all & ~floats, wanted, out, ld);
    }
    if (floats != 0) products<kFormat, false>(list, x, floats, wanted, out, ld);
  });
}

}  // namespace subquad::cpu::SUBQUAD_ISA::quantised
