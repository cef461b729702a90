// The dense path of the CATS MLP where the CPU multiplies pairs of bf16. One instruction set; see cpu_dense.h.
//
// What many rows are multiplied with lies in panels: words of two neighbours along the summed dimension, a row of words
// for all tokens (or columns) beside each other. A tile of eight rows takes its left words one at a time and a panel's
// a vector at a time, so that no sum is left to add up across lanes. x is a panel, h another; weights are left operands
// as they lie, but a neuron-major w_down, whose pairs of rows are interleaved block by block.
#pragma once

#if defined(__AVX512BF16__)

#include "common/integers.h"
#include "cpu/simd/tile.h"
#include "ops/cats_mlp/cpu_dense.h"

namespace subquad::cpu::SUBQUAD_ISA::cats {

constexpr int kTall = 8;              // rows of a tile: sixteen sums, enough to hide an addition's latency
constexpr int64_t kPairNeurons = 24;  // of a group, whose gate and up rows share a pass over x
constexpr int kMostTiles = 2 * static_cast<int>(kPairNeurons) / kTall;
constexpr int64_t kPairSlice = 128;  // pairs of the hidden dimension per pass: the panel's piece stays in L1
constexpr int64_t kPairDepth = 64, kPairColumns = 256;  // pairs and columns of an interleaved block: it stays in L2

inline int64_t panel_tokens(int64_t tokens) { return round_up(tokens, kTokenBlock); }

/// Left words: word (row, depth) begins at first + row * row_stride + depth * depth_stride.
struct PairLeft {
  const BFloat16* first;
  int64_t row_stride, depth_stride;
};

/// Rows that will be needed soon, asked for a line at a time between products: all at once they would hold those up.
class Ahead {
 public:
  Ahead() = default;

  /// Elements [0, n) of `count` rows from `first` on, in the course of `pairs` pairs of products.
  Ahead(const BFloat16* first, int64_t ld, int64_t count, int64_t n, int64_t pairs)
      : row_(first), ld_(ld), lines_(ceil_div(n, kBlock)), left_(count * lines_) {
    every_ = left_ == 0 ? pairs : larger(pairs / left_, 1);
  }

  int64_t every() const { return every_; }

  void fetch() {
    if (left_ == 0) return;
    prefetch(row_ + line_ * kBlock);
    --left_;
    if (++line_ == lines_) line_ = 0, row_ += ld_;
  }

 private:
  const BFloat16* row_ = nullptr;
  int64_t ld_ = 0, lines_ = 0, left_ = 0, line_ = 0, every_ = 1;
};

/// z[r][0 : V vectors] = left row r times the panel, or += that, for kTall rows; panel and z with rows `ldp` and `ldz`
/// apart.
template <int V>
inline void pair_tile(PairLeft left, int64_t pairs, const BFloat16* panel, int64_t ldp, float* z, int64_t ldz, bool add,
                      Ahead& ahead) {
  Vec sum[kTall][V];
  for (int r = 0; r < kTall; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = add ? vec_load(z + r * ldz + v * kLanes) : vec_zero();
  for (int64_t j = 0; j < pairs;) {
    ahead.fetch();
    for (const int64_t until = smaller(pairs, j + ahead.every()); j < until; ++j) {
      __m512bh right[V];
      for (int v = 0; v < V; ++v) right[v] = pairs_load(panel + j * ldp + v * kBlock);
      const BFloat16* word = left.first + j * left.depth_stride;
      for (int r = 0; r < kTall; ++r) {
        int pair;
        std::memcpy(&pair, word + r * left.row_stride, sizeof pair);
        const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
        for (int v = 0; v < V; ++v) sum[r][v] = vec_dot(both, right[v], sum[r][v]);
      }
    }
  }
  for (int r = 0; r < kTall; ++r)
    for (int v = 0; v < V; ++v) vec_store(z + r * ldz + v * kLanes, sum[r][v]);
}

/// Calls tile<V>(column) for two or three vectors at a time; `columns` is a multiple of 16, at least 32.
template <class F>
inline void by_columns(int64_t columns, const F& tile) {
  int64_t c = 0;
  for (; columns - c > 3 * kLanes; c += 2 * kLanes) tile.template operator()<2>(c);
  columns - c == 3 * kLanes ? tile.template operator()<3>(c) : tile.template operator()<2>(c);
}

/// Up to kTall consecutive rows of a weight.
struct TallRows {
  const BFloat16* first;
  int64_t ld;
  int count;
};

/// z[r] = row r times the panel of n elements and `tokens` columns, for the rows of all tiles, kTall for each.
/// Meanwhile the next slice of the same tile is fetched, or the first of `next`.
inline void panel_products(const TallRows* tiles, const TallRows* next, int count, int64_t n, const BFloat16* panel,
                           int64_t tokens, float* z, int64_t ldz) {
  BFloat16 edge[kTall * 2 * kPairSlice];
  for (int64_t k = 0; k < n; k += 2 * kPairSlice) {
    const int64_t length = smaller(n - k, 2 * kPairSlice), left = n - k - length;
    for (int i = 0; i < count; ++i) {
      const TallRows& rows = tiles[i];
      const TallRows& coming = left > 0 ? rows : next[i];
      const int64_t pairs = ceil_div(length, 2), from = left > 0 ? k + length : 0;
      Ahead ahead(coming.first + from, coming.ld, coming.count, smaller(n - from, 2 * kPairSlice),
                  pairs * (tokens / kLanes / 2));
      PairLeft words{rows.first + k, rows.ld, 2};
      if (rows.count < kTall || length % 2 != 0) {
        std::memset(edge, 0, sizeof edge);
        for (int r = 0; r < rows.count; ++r)
          std::memcpy(edge + r * 2 * kPairSlice, words.first + r * rows.ld, static_cast<size_t>(length) * sizeof *edge);
        words = {edge, 2 * kPairSlice, 2};
      }
      by_columns(tokens, [&]<int V>(int64_t c) {
        pair_tile<V>(words, pairs, panel + k * tokens + 2 * c, 2 * tokens, z + i * kTall * ldz + c, ldz, k > 0, ahead);
      });
    }
  }
}

/// `count` rows from `first` on in tiles; returns how many.
inline int tall_tiles(const void* weight, int64_t ld, int64_t first, int64_t count, TallRows* tiles) {
  int n = 0;
  for (int64_t r = 0; r < count; r += kTall)
    tiles[n++] = {row<BFloat16>(weight, first + r, ld), ld, static_cast<int>(smaller(kTall, count - r))};
  return n;
}

/// The panel [n / 2, padded tokens] of x [tokens, n], zeros beyond both.
inline void pack_panel(const BFloat16* x, int64_t tokens, int64_t n, BFloat16* panel) {
  const int64_t padded = panel_tokens(tokens), words = ceil_div(n, 2);
  float block[16 * 16], turned[16 * 16];
  for (int64_t t = 0; t < tokens; t += 16) {
    for (int64_t k = 0; k < n; k += 32) {
      std::memset(block, 0, sizeof block);
      for (int64_t i = 0; i < smaller(16, tokens - t); ++i)
        std::memcpy(block + 16 * i, x + (t + i) * n + k, static_cast<size_t>(smaller(32, n - k)) * sizeof *x);
      transpose_block(block, 16, turned, 16);
      for (int64_t w = 0; w < smaller(16, words - k / 2); ++w)
        std::memcpy(panel + ((k / 2 + w) * padded + t) * 2, turned + 16 * w, 64);
    }
  }
}

/// h of neurons [i, i + count), rows of floats, into the panel; i is even. What lies beyond the last is zero.
inline void store_hidden(const float* h, int64_t ldh, int64_t i, int64_t count, int64_t tokens, BFloat16* panel) {
  for (int64_t r = 0; r < count; r += 2) {
    float* words = reinterpret_cast<float*>(panel + (i + r) * tokens);
    for (int64_t t = 0; t < tokens; t += kLanes) {
      const Vec low = vec_load(h + r * ldh + t), high = r + 1 < count ? vec_load(h + (r + 1) * ldh + t) : vec_zero();
      Pairs::store_pairs(words + t, low, high);
    }
  }
}

/// h[:, begin:end]; begin is even.
inline void pairs_hidden(const CatsMlpParams& p, const CatsMlpScratch& s, int64_t begin, int64_t end) {
  const int64_t tokens = panel_tokens(p.tokens);
  float z[2 * kPairNeurons * kDenseTokens];
  uint8_t active[kDenseTokens];
  TallRows tiles[kMostTiles], next[kMostTiles];
  const auto rows_of = [&](int64_t i, TallRows* out) {
    const int64_t count = smaller(kPairNeurons, end - i);
    const int n = tall_tiles(p.w_gate, p.ld_gate, i, count, out);
    return n + tall_tiles(p.w_up, p.ld_up, i, count, out + n);
  };
  for (int64_t i = begin; i < end; i += kPairNeurons) {
    const int64_t count = smaller(kPairNeurons, end - i);
    const int n = rows_of(i, tiles);
    for (TallRows& rows : next) rows = {};
    if (i + kPairNeurons < end) rows_of(i + kPairNeurons, next);
    panel_products(tiles, next, n, p.hidden, static_cast<const BFloat16*>(s.x), tokens, z, kDenseTokens);
    float* up = z + n / 2 * kTall * kDenseTokens;
    for (int64_t r = 0; r < count; ++r) {
      float *a = z + r * kDenseTokens, *u = up + r * kDenseTokens;
      for (int64_t t = 0; t < tokens; t += kMaxTokens) gate_block<BFloat16>(p, i + r, a + t, a + t, active + t);
      if (p.union_mask) unite(p.tokens, active);
      for (int64_t t = 0; t < tokens; t += kMaxTokens) hidden_block<BFloat16>(p, i + r, a + t, active + t, u + t);
    }
    store_hidden(up, kDenseTokens, i, count, tokens, static_cast<BFloat16*>(s.h));
  }
}

/// y[t][first : first + count] = sums + bias, rounded.
inline void store_columns(const CatsMlpParams& p, int64_t t, int64_t first, int64_t count, const float* sums) {
  auto* y = static_cast<BFloat16*>(p.y) + t * p.hidden + first;
  for (int64_t c = 0; c < count; ++c) y[c] = from_float<BFloat16>(sums[c] + bias<BFloat16>(p.b_down, first + c));
}

/// y[:, begin:end] for a row-major w_down: its rows times the panel of h.
inline void pairs_down_rows(const CatsMlpParams& p, const CatsMlpScratch& s, int64_t begin, int64_t end) {
  constexpr int64_t kChannels = 2 * kPairNeurons;
  const int64_t tokens = panel_tokens(p.tokens);
  float z[kChannels * kDenseTokens], sums[kChannels];
  TallRows tiles[kMostTiles], next[kMostTiles];
  for (int64_t o = begin; o < end; o += kChannels) {
    const int64_t count = smaller(kChannels, end - o);
    const int n = tall_tiles(p.w_down, p.ld_down, o, count, tiles);
    for (TallRows& rows : next) rows = {};
    if (o + kChannels < end)
      tall_tiles(p.w_down, p.ld_down, o + kChannels, smaller(kChannels, end - o - kChannels), next);
    panel_products(tiles, next, n, p.intermediate, static_cast<const BFloat16*>(s.h), tokens, z, kDenseTokens);
    for (int64_t t = 0; t < p.tokens; ++t) {
      for (int64_t r = 0; r < count; ++r) sums[r] = z[r * kDenseTokens + t];
      store_columns(p, t, o, count, sums);
    }
  }
}

/// Words (a[i], b[i]) of kBlock columns, in order.
inline void interleave(const BFloat16* a, const BFloat16* b, BFloat16* out) {
  alignas(64) static constexpr uint16_t kFirst[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kFirst), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512i even = _mm512_loadu_si512(a), odd = _mm512_loadu_si512(b);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi16(even, low, odd));
  _mm512_storeu_si512(out + kBlock, _mm512_permutex2var_epi16(even, high, odd));
}

/// block[column tile][pair] = rows [i, i + count) of w_down, columns [o, o + columns), interleaved, zeros beyond.
inline void interleave_block(const CatsMlpParams& p, int64_t i, int64_t count, int64_t o, int64_t columns,
                             BFloat16* block) {
  for (int64_t j = 0; 2 * j < count; ++j) {
    const auto* even = row<BFloat16>(p.w_down, i + 2 * j, p.ld_down) + o;
    const bool both = 2 * j + 1 < count;
    for (int64_t k = 0; k < columns; k += kBlock) {
      BFloat16* out = block + (k * kPairDepth + j * kBlock) * 2;
      if (both && columns - k >= kBlock) {
        interleave(even + k, even + p.ld_down + k, out);
      } else {
        const int64_t left = smaller(columns - k, kBlock);
        const Tail<BFloat16> a(even + k, left), b(both ? even + p.ld_down + k : even, both ? left : 0);
        interleave(a.values, b.values, out);
      }
    }
  }
}

/// y[:, begin:end] for a neuron-major w_down: h times its rows, some neurons at a time, in order.
inline void pairs_down_columns(const CatsMlpParams& p, const CatsMlpScratch& s, int64_t begin, int64_t end) {
  constexpr int64_t kNeurons = 2 * kPairDepth;
  const int64_t tokens = panel_tokens(p.tokens);
  alignas(64) BFloat16 block[kNeurons * kPairColumns];
  for (int64_t o = begin; o < end; o += kPairColumns) {
    const int64_t columns = smaller(kPairColumns, end - o);
    for (int64_t i = 0; i < p.intermediate; i += kNeurons) {
      const int64_t count = smaller(kNeurons, p.intermediate - i), after = p.intermediate - i - count;
      interleave_block(p, i, count, o, columns, block);
      const auto* h = static_cast<const BFloat16*>(s.h) + i * tokens;
      const int64_t pairs = ceil_div(count, 2), calls = ceil_div(columns, kBlock) * ceil_div(p.tokens, kTall);
      Ahead ahead(row<BFloat16>(p.w_down, i + count, p.ld_down) + o, p.ld_down, smaller(after, kNeurons), columns,
                  calls * pairs);
      for (int64_t k = 0; k < columns; k += kBlock)
        for (int64_t t = 0; t < p.tokens; t += kTall)
          pair_tile<2>({h + 2 * t, 2, 2 * tokens}, pairs, block + 2 * k * kPairDepth, 2 * kBlock,
                       s.partial + t * s.ld_hidden + o + k, s.ld_hidden, i > 0, ahead);
    }
    for (int64_t t = 0; t < p.tokens; ++t) store_columns(p, t, o, columns, s.partial + t * s.ld_hidden + o);
  }
}

inline void pairs_down(const CatsMlpParams& p, const CatsMlpScratch& s, int64_t begin, int64_t end) {
  p.neuron_major ? pairs_down_columns(p, s, begin, end) : pairs_down_rows(p, s, begin, end);
}

}  // namespace subquad::cpu::SUBQUAD_ISA::cats

#endif
