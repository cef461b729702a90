// The dense path of the CATS MLP: all neurons, many tokens, the mask fused between the products. One instruction set.
//
// h is kept in the type the down product multiplies: float, or bf16 where the CPU has bf16 products (as a dense bf16
// model rounds it). Here 0 * w_down enters the sum, so a non-finite w_down reaches every token, as in any dense layer.
#pragma once

#include "common/activations.h"
#include "common/integers.h"
#include "cpu/simd/products.h"
#include "ops/cats_mlp/cpu.h"

namespace subquad::cpu::SUBQUAD_ISA::cats {

using namespace products;

// The down product adds kOuterRows neurons at a time to kColumns output columns: y stays in L2, the weights' tile in
// L1.
constexpr int64_t kColumns = 256;
constexpr int kOuterRows = 32;

/// Where h of neuron i goes: in order for a neuron-major w_down, packed for the dot products of a row-major one.
template <class W>
inline int64_t hidden_index(const CatsMlpParams& p, int64_t i) {
  return p.neuron_major || sizeof(typename Input<W>::Type) == 2 ? i : packed_index<W>(i);
}

/// a[j] = act(z[j] + offset) for one neuron and all tokens of a block: a plain loop that vectorises.
template <Activation kAct>
inline void activate_block(const float* z, float offset, float* a) {
  for (int j = 0; j < kMaxTokens; ++j) a[j] = activate<kAct>(z[j] + offset);
}

inline void activate_block(Activation activation, const float* z, float offset, float* a) {
  switch (activation) {
    case Activation::kSilu:
      return activate_block<Activation::kSilu>(z, offset, a);
    case Activation::kGeluTanh:
      return activate_block<Activation::kGeluTanh>(z, offset, a);
    case Activation::kGelu:
      return activate_block<Activation::kGelu>(z, offset, a);
    default:
      return activate_block<Activation::kRelu>(z, offset, a);
  }
}

/// a [kGroup, kDenseTokens] = f(gate) of neurons [i, i + count) where active, and 0 with active = 0 elsewhere.
template <class W>
inline void dense_gate(const CatsMlpParams& p, const CatsMlpScratch& s, int64_t i, int count, float (*a)[kDenseTokens],
                       uint8_t (*active)[kDenseTokens]) {
  using X = typename Input<W>::Type;
  float z[kGroup * kMaxTokens] = {};
  for (int64_t t = 0; t < p.tokens; t += kMaxTokens) {
    const int here = static_cast<int>(p.tokens - t < kMaxTokens ? p.tokens - t : kMaxTokens);
    dense_products(Rows<W>::consecutive(p.w_gate, p.ld_gate, i, count, i + count), row<X>(s.x, t, s.ld_hidden),
                   s.ld_hidden, here, p.hidden, z);
    for (int r = 0; r < count; ++r) {
      const float limit = p.threshold[(i + r) * p.threshold_stride];
      activate_block(p.activation, z + r * kMaxTokens, bias<W>(p.b_gate, i + r), a[r] + t);
      for (int j = 0; j < kMaxTokens; ++j) active[r][t + j] = is_active(a[r][t + j], limit, p.inclusive);
    }
  }
  if (!p.union_mask) return;
  for (int r = 0; r < count; ++r) {
    uint8_t any = 0;
    for (int64_t t = 0; t < p.tokens; ++t) any |= active[r][t];
    std::memset(active[r], any, static_cast<size_t>(p.tokens));
  }
}

/// h[:, begin:end]; begin is a multiple of kGroup.
template <class W>
inline void dense_hidden(const CatsMlpParams& p, const CatsMlpScratch& s, int64_t begin, int64_t end) {
  using X = typename Input<W>::Type;
  float a[kGroup][kDenseTokens], u[kGroup * kMaxTokens] = {};
  uint8_t active[kGroup][kDenseTokens];
  int64_t place[kGroup];
  for (int64_t i = begin; i < end; i += kGroup) {
    const int count = static_cast<int>(end - i < kGroup ? end - i : kGroup);
    for (int r = 0; r < count; ++r) place[r] = hidden_index<W>(p, i + r);
    dense_gate<W>(p, s, i, count, a, active);
    for (int64_t t = 0; t < p.tokens; t += kMaxTokens) {
      const int here = static_cast<int>(p.tokens - t < kMaxTokens ? p.tokens - t : kMaxTokens);
      dense_products(Rows<W>::consecutive(p.w_up, p.ld_up, i, count, i + count), row<X>(s.x, t, s.ld_hidden),
                     s.ld_hidden, here, p.hidden, u);
      for (int r = 0; r < count; ++r) {
        const float offset = bias<W>(p.b_up, i + r);
        for (int j = 0; j < kMaxTokens; ++j) {
          const float value = a[r][t + j] * (u[r * kMaxTokens + j] + offset);
          u[r * kMaxTokens + j] = active[r][t + j] ? value : 0.0f;
        }
      }
      for (int j = 0; j < here; ++j) {
        X* h = static_cast<X*>(s.h) + (t + j) * s.ld_neurons;
        for (int r = 0; r < count; ++r) h[place[r]] = from_float<X>(u[r * kMaxTokens + j]);
      }
    }
  }
}

/// y[:, begin:end] for a row-major w_down: dot products along the neurons.
template <class W>
inline void dense_down_dots(const CatsMlpParams& p, const CatsMlpScratch& s, int64_t begin, int64_t end) {
  using X = typename Input<W>::Type;
  float sums[kGroup * kMaxTokens];
  for (int64_t o = begin; o < end; o += kGroup) {
    const int count = static_cast<int>(end - o < kGroup ? end - o : kGroup);
    for (int64_t t = 0; t < p.tokens; t += kMaxTokens) {
      const int here = static_cast<int>(p.tokens - t < kMaxTokens ? p.tokens - t : kMaxTokens);
      dense_products(Rows<W>::consecutive(p.w_down, p.ld_down, o, count, o + count), row<X>(s.h, t, s.ld_neurons),
                     s.ld_neurons, here, p.intermediate, sums);
      for (int r = 0; r < count; ++r) {
        const float offset = bias<W>(p.b_down, o + r);
        for (int j = 0; j < here; ++j)
          static_cast<W*>(p.y)[(t + j) * p.hidden + o + r] = from_float<W>(sums[r * kMaxTokens + j] + offset);
      }
    }
  }
}

/// Calls add<T>(t) for tokens t, t + T, ... so that all are covered, the widest tiles first.
template <int T, class F>
inline void by_tokens(int64_t tokens, const F& add) {
  int64_t t = 0;
  for (; t + T <= tokens; t += T) add.template operator()<T>(t);
  for (; t < tokens; ++t) add.template operator()<1>(t);
}

/// Outer products of up to kOuterRows weight rows with h, added to y [tokens, columns], whose columns are padded.
template <class W>
struct Outer {
  static int64_t index(int64_t i) { return packed_index<W>(i); }

  static void add(const W* const* rows, int count, int64_t columns, const float* h, int64_t ldh, float* y, int64_t ldy,
                  int64_t tokens) {
    constexpr int kV = kLanes == 16 ? 4 : 2;
    float tile[kOuterRows * kColumns];
    for (int r = 0; r < count; ++r) widen_row(rows[r], columns, tile + r * kColumns);
    const int64_t n = round_up(columns, kBlock);
    int64_t k = 0;
    const auto whole = [&]<int T>(int64_t t) {
      outer_tile<kV, T>(tile + k, kColumns, count, h + t * ldh, ldh, y + t * ldy + k, ldy);
    };
    const auto rest = [&]<int T>(int64_t t) {
      outer_tile<1, T>(tile + k, kColumns, count, h + t * ldh, ldh, y + t * ldy + k, ldy);
    };
    for (; k + kV * kLanes <= n; k += kV * kLanes) by_tokens<4>(tokens, whole);
    for (; k < n; k += kLanes) by_tokens<4>(tokens, rest);
  }
};

#if defined(__AVX512BF16__)
/// The same with bf16 products: the tile interleaves two rows, so that one instruction adds both neurons of a pair.
template <>
struct Outer<BFloat16> {
  static constexpr int kPairs = kOuterRows / 2;

  /// Interleaving works inside 128-bit lanes: of every 8 columns, the first 4 go to the low vector, the others to the
  /// high one.
  static int64_t index(int64_t i) {
    const int64_t c = i % kBlock, eight = c / 8, four = c % 8 / 4;
    return i - c + four * kLanes + eight * 4 + c % 4;
  }

  static void interleave(const BFloat16* a, const BFloat16* b, BFloat16* out) {
    const __m512i even = _mm512_loadu_si512(a), odd = _mm512_loadu_si512(b);
    _mm512_storeu_si512(out, _mm512_unpacklo_epi16(even, odd));
    _mm512_storeu_si512(out + kBlock, _mm512_unpackhi_epi16(even, odd));
  }

  template <int V, int T>
  static void tile_pairs(const BFloat16* tile, int pairs, const BFloat16* h, int64_t ldh, float* y, int64_t ldy) {
    Vec sum[T][V];
    for (int t = 0; t < T; ++t)
      for (int v = 0; v < V; ++v) sum[t][v] = vec_load(y + t * ldy + v * kLanes);
    for (int j = 0; j < pairs; ++j) {
      __m512bh w[V];
      for (int v = 0; v < V; ++v) w[v] = pairs_load(tile + j * 2 * kColumns + v * kBlock);
      for (int t = 0; t < T; ++t) {
        int pair;
        std::memcpy(&pair, h + t * ldh + 2 * j, sizeof pair);
        const __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
        for (int v = 0; v < V; ++v) sum[t][v] = vec_dot(w[v], factor, sum[t][v]);
      }
    }
    for (int t = 0; t < T; ++t)
      for (int v = 0; v < V; ++v) vec_store(y + t * ldy + v * kLanes, sum[t][v]);
  }

  static void add(const BFloat16* const* rows, int count, int64_t columns, const BFloat16* h, int64_t ldh, float* y,
                  int64_t ldy, int64_t tokens) {
    BFloat16 tile[kOuterRows * kColumns];
    const int pairs = (count + 1) / 2;
    for (int j = 0; j < pairs; ++j) {
      const bool both = 2 * j + 1 < count;
      for (int64_t k = 0; k < columns; k += kBlock) {
        BFloat16* out = tile + (j * kColumns + k) * 2;
        const int64_t left = columns - k < kBlock ? columns - k : kBlock;
        if (both && left == kBlock) {
          interleave(rows[2 * j] + k, rows[2 * j + 1] + k, out);
        } else {
          const Tail<BFloat16> a(rows[2 * j] + k, left), b(rows[both ? 2 * j + 1 : 2 * j] + k, both ? left : 0);
          interleave(a.values, b.values, out);
        }
      }
    }
    const int64_t n = round_up(columns, kBlock);
    int64_t k = 0;
    const auto whole = [&]<int T>(int64_t t) {
      tile_pairs<4, T>(tile + 2 * k, pairs, h + t * ldh, ldh, y + t * ldy + k, ldy);
    };
    const auto rest = [&]<int T>(int64_t t) {
      tile_pairs<2, T>(tile + 2 * k, pairs, h + t * ldh, ldh, y + t * ldy + k, ldy);
    };
    for (; k + 2 * kBlock <= n; k += 2 * kBlock) by_tokens<4>(tokens, whole);
    for (; k < n; k += kBlock) by_tokens<4>(tokens, rest);
  }
};
#endif

/// y[:, begin:end] for a neuron-major w_down: outer products, a group of neurons at a time, in neuron order.
template <class W>
inline void dense_down_outer(const CatsMlpParams& p, const CatsMlpScratch& s, int64_t begin, int64_t end) {
  using X = typename Input<W>::Type;
  for (int64_t o = begin; o < end; o += kColumns) {
    const int64_t columns = end - o < kColumns ? end - o : kColumns;
    float* y = s.partial + o;
    const int64_t padded = round_up(columns, kBlock);
    for (int64_t t = 0; t < p.tokens; ++t)
      std::memset(y + t * s.ld_hidden, 0, static_cast<size_t>(padded) * sizeof(float));
    for (int64_t i = 0; i < p.intermediate; i += kOuterRows) {
      const int count = static_cast<int>(p.intermediate - i < kOuterRows ? p.intermediate - i : kOuterRows);
      const W* rows[kOuterRows];
      for (int r = 0; r < count; ++r) {
        rows[r] = row<W>(p.w_down, i + r, p.ld_down) + o;
        if (i + kOuterRows + r >= p.intermediate) continue;
        for (int64_t k = 0; k < columns; k += kBlock) prefetch_block(rows[r] + kOuterRows * p.ld_down, k);
      }
      Outer<W>::add(rows, count, columns, static_cast<const X*>(s.h) + i, s.ld_neurons, y, s.ld_hidden, p.tokens);
    }
    for (int64_t t = 0; t < p.tokens; ++t) {
      W* out = static_cast<W*>(p.y) + t * p.hidden + o;
      for (int64_t c = 0; c < columns; ++c) {
        out[c] = from_float<W>(y[t * s.ld_hidden + Outer<W>::index(c)] + bias<W>(p.b_down, o + c));
      }
    }
  }
}

template <class W>
inline void dense_down(const CatsMlpParams& p, const CatsMlpScratch& s, int64_t begin, int64_t end) {
  p.neuron_major ? dense_down_outer<W>(p, s, begin, end) : dense_down_dots<W>(p, s, begin, end);
}

}  // namespace subquad::cpu::SUBQUAD_ISA::cats
