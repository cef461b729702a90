// Small matrix products on tiles in cache, and what packs rows of tensors into such tiles. One instruction set.
//
// A tile consists of 32-bit words: a float, or where the CPU multiplies bf16 directly, a pair of bf16 that are
// neighbours along the dimension that is summed over. Both are multiplied by the same loops, since a product takes the
// words of its left operand one at a time and those of its right operand a vector at a time.
#pragma once

#include <type_traits>

#include "common/integers.h"
#include "cpu/simd/vec.h"

namespace subquad::cpu::SUBQUAD_ISA {

constexpr int kTileRows = 4;                       // rows of a product that share the loads of its right operand
constexpr int kTileVecs = kLanes == 16 ? 4 : 2;    // vectors of a row in registers
constexpr int64_t kTileCols = kTileVecs * kLanes;  // the columns they hold

// ------------------------------------------------------------------------------------------------------------ products

/// Words are floats.
struct Floats {
  using Element = float;
  static constexpr int kDepth = 1;  // elements of the summed dimension in a word
  static Vec multiply_add(Vec a, Vec b, Vec c) { return vec_fma(a, b, c); }
  static void store(float* p, Vec a) { vec_store(p, a); }
};

/// The words that elements of type T are multiplied in.
template <class T>
struct WordsOf {
  using Type = Floats;
};

#if defined(__AVX512BF16__)
/// Words are pairs of bf16, multiplied exactly and added in float; subnormals count as zero.
struct Pairs {
  using Element = BFloat16;
  static constexpr int kDepth = 2;
  static Vec multiply_add(Vec a, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }

  /// dst[r / 2][i] = the pair (src[r][i], src[r + 1][i]): a right operand summed over rows. `rows` is even.
  static void pair_rows(const float* src, int64_t rows, int64_t elements, float* dst) {
    const auto* in = reinterpret_cast<const BFloat16*>(src);
    auto* out = reinterpret_cast<uint32_t*>(dst);
    for (int64_t r = 0; r < rows; r += 2) {
      const BFloat16 *low = in + r * elements, *high = low + elements;
      for (int64_t i = 0; i < elements; ++i)
        out[r / 2 * elements + i] = low[i].bits | static_cast<uint32_t>(high[i].bits) << 16;
    }
  }

  /// Elements, rounded.
  static void store(BFloat16* p, Vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a));
  }

  /// Words, each the pair (a[i], b[i]) rounded.
  static void store_pairs(float* p, Vec a, Vec b) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a));
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(b)), 16);
    _mm512_storeu_si512(p, _mm512_or_si512(low, high));
  }
};
template <>
struct WordsOf<BFloat16> {
  using Type = Pairs;
};
#endif

/// The left operand: word (row, depth) at words[row * row_stride + depth * depth_stride].
struct Left {
  const float* words;
  int64_t row_stride, depth_stride;
};

/// The right operand or the result: rows of floats or words, `stride` apart.
struct Block {
  float* words;
  int64_t stride;
};

template <class Words, int N>
inline void product_columns(Left a, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc, bool add) {
  Vec sums[kTileRows][N];
  for (int r = 0; r < kTileRows; ++r)
    for (int n = 0; n < N; ++n) sums[r][n] = add ? vec_load(c + r * ldc + n * kLanes) : vec_zero();
  for (int64_t t = 0; t < depth; ++t) {
    Vec right[N];
    for (int n = 0; n < N; ++n) right[n] = vec_load(b + t * ldb + n * kLanes);
    for (int r = 0; r < kTileRows; ++r) {
      const Vec left = vec_set(a.words[r * a.row_stride + t * a.depth_stride]);
      for (int n = 0; n < N; ++n) sums[r][n] = Words::multiply_add(left, right[n], sums[r][n]);
    }
  }
  for (int r = 0; r < kTileRows; ++r)
    for (int n = 0; n < N; ++n) vec_store(c + r * ldc + n * kLanes, sums[r][n]);
}

/// c = a b, or c += a b: [rows, depth] x [depth, cols]. rows is a multiple of kTileRows, cols of kLanes; depth in
/// words.
template <class Words>
inline void product(int64_t rows, int64_t cols, int64_t depth, Left a, Block b, Block c, bool add) {
  for (int64_t col = 0; col < cols; col += kTileCols) {
    const int64_t vecs = (cols - col < kTileCols ? cols - col : kTileCols) / kLanes;
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const Left left{a.words + row * a.row_stride, a.row_stride, a.depth_stride};
      float* out = c.words + row * c.stride + col;
      const float* right = b.words + col;
      switch (vecs) {
        case 1:
          product_columns<Words, 1>(left, right, b.stride, depth, out, c.stride, add);
          break;
        case 2:
          product_columns<Words, 2>(left, right, b.stride, depth, out, c.stride, add);
          break;
        case 3:
          if constexpr (kTileVecs >= 3) product_columns<Words, 3>(left, right, b.stride, depth, out, c.stride, add);
          break;
        default:
          if constexpr (kTileVecs >= 4) product_columns<Words, 4>(left, right, b.stride, depth, out, c.stride, add);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- packing

/// Words of `n` elements along the summed dimension, padded so that as many rows of them can be transposed.
template <class Words>
inline int64_t padded_words(int64_t n) {
  return round_up(ceil_div(n, Words::kDepth), 16);
}

inline bool is_finite_bits(float x) { return (float_to_bits(x) & 0x7f800000u) != 0x7f800000u; }

inline bool all_finite(const float* x, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = float_to_bits(x[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest < 0x7f800000u;
}

inline bool all_finite(const BFloat16* x, int64_t n) {
  uint16_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t magnitude = x[i].bits & 0x7fff;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest < 0x7f80;
}

inline void zero_words(float* dst, int64_t words) { std::memset(dst, 0, static_cast<size_t>(words) * sizeof(float)); }

/// One row of `n` elements into words, the rest of `words` words zero. Returns whether all are finite.
template <class Words, class T>
inline bool load_row(const T* __restrict src, int64_t n, float* __restrict dst, int64_t words) {
  auto* out = reinterpret_cast<typename Words::Element*>(dst);
  if constexpr (std::is_same_v<T, typename Words::Element>) {
    std::memcpy(out, src, static_cast<size_t>(n) * sizeof(T));
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i] = to_float(src[i]);
  }
  const int64_t all = words * Words::kDepth;
  if (n < all) std::memset(out + n, 0, static_cast<size_t>(all - n) * sizeof(*out));
  return all_finite(out, n);
}

#if defined(SQ_AVX512)
constexpr int kTransposed = 16;
inline void transpose_block(const float* src, int64_t lds, float* dst, int64_t ldd) {
  __m512 r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(src + i * lds);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(t[i + j]), high = _mm512_castps_pd(t[i + j + 2]);
      r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // r[4a + b] holds column b of each 128-bit lane for rows 4a .. 4a + 3.
  for (int b = 0; b < 4; ++b) {
    const __m512 x = _mm512_shuffle_f32x4(r[b], r[4 + b], 0x88), y = _mm512_shuffle_f32x4(r[b], r[4 + b], 0xdd);
    const __m512 z = _mm512_shuffle_f32x4(r[8 + b], r[12 + b], 0x88),
                 w = _mm512_shuffle_f32x4(r[8 + b], r[12 + b], 0xdd);
    _mm512_storeu_ps(dst + b * ldd, _mm512_shuffle_f32x4(x, z, 0x88));
    _mm512_storeu_ps(dst + (4 + b) * ldd, _mm512_shuffle_f32x4(y, w, 0x88));
    _mm512_storeu_ps(dst + (8 + b) * ldd, _mm512_shuffle_f32x4(x, z, 0xdd));
    _mm512_storeu_ps(dst + (12 + b) * ldd, _mm512_shuffle_f32x4(y, w, 0xdd));
  }
}
#elif defined(SQ_AVX2)
constexpr int kTransposed = 8;
inline void transpose_block(const float* src, int64_t lds, float* dst, int64_t ldd) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(src + i * lds);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m256d low = _mm256_castps_pd(t[i + j]), high = _mm256_castps_pd(t[i + j + 2]);
      r[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
      r[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
    }
  }
  for (int b = 0; b < 4; ++b) {
    _mm256_storeu_ps(dst + b * ldd, _mm256_permute2f128_ps(r[b], r[4 + b], 0x20));
    _mm256_storeu_ps(dst + (4 + b) * ldd, _mm256_permute2f128_ps(r[b], r[4 + b], 0x31));
  }
}
#else
constexpr int kTransposed = 4;
inline void transpose_block(const float* src, int64_t lds, float* dst, int64_t ldd) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) dst[j * ldd + i] = src[i * lds + j];
}
#endif

/// dst[w][r] = src[r][w]: a right operand whose summed dimension is that of the rows. Both multiples of 16.
inline void transpose_words(const float* src, int64_t rows, int64_t words, float* dst, int64_t ldd) {
  for (int64_t w = 0; w < words; w += kTransposed)
    for (int64_t r = 0; r < rows; r += kTransposed) transpose_block(src + r * words + w, words, dst + w * ldd + r, ldd);
}

}  // namespace subquad::cpu::SUBQUAD_ISA
