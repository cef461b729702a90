// The same products and sums for keys and values of int8, in integers: queries and weights are rounded to 16 bits, a
// scale per row beside them. Sums of integers are exact, so these have the same bits for any number of rows, too.
//
// Errors, relative to the largest element of a row: 2^-16 of weights, and of queries where keys are not rotated here;
// where they are, 2^-14 of keys, and of queries, too, with 16 lanes and 128 words, twice as much with half as many
// lanes or twice as many words.
#pragma once

#include "ops/sink_attention_step/cpu_products.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#define SQ_SHORT_PRODUCTS true
#else
#define SQ_SHORT_PRODUCTS false
#endif

namespace subquad::cpu::SUBQUAD_ISA::sink {

/// Whether the CPU multiplies and adds pairs of 16-bit integers in one instruction. Without it floats are faster.
constexpr bool kShortProducts = SQ_SHORT_PRODUCTS;
constexpr int kShorts = 2 * kLanes;

typedef int16_t Shorts __attribute__((vector_size(kShorts * 2)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));

// -------------------------------------------------------------------------------------------------------- instructions

inline Shorts shorts_load(const int16_t* p) {
  Shorts a;
  std::memcpy(&a, p, sizeof a);
  return a;
}

// shorts_load: widened.
// shorts_store: rounded to the nearest, magnitudes of 2^15 and more to the largest there is.
// multiply_high: a b / 2^16, rounded down.
// add_products: c[i] + a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1].
// interleave: pairs (a[i], b[i]), in an order that in_order undoes on sums over them.
// pairs_set: the same pair everywhere.
#if defined(SQ_AVX512)
inline Shorts shorts_load(const Int8* p) {
  return (Shorts)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void shorts_store(int16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(a)));
}
inline Shorts multiply_high(Shorts a, Shorts b) { return (Shorts)_mm512_mulhi_epi16((__m512i)a, (__m512i)b); }
inline Ints add_products(Shorts a, Shorts b, Ints c) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpwssd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
#else
  return c + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
}
inline void interleave(Shorts a, Shorts b, Shorts& low, Shorts& high) {
  low = (Shorts)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b),
  high = (Shorts)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
}
inline void in_order(Ints& low, Ints& high) {
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  const __m512i a = (__m512i)low, b = (__m512i)high;
  low = (Ints)_mm512_permutex2var_epi64(a, first, b), high = (Ints)_mm512_permutex2var_epi64(a, second, b);
}
inline Vec to_floats(Ints a) { return _mm512_cvtepi32_ps((__m512i)a); }
#elif defined(SQ_AVX2)
inline Shorts shorts_load(const Int8* p) {
  return (Shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void shorts_store(int16_t* p, Vec a) {
  const __m256i x = _mm256_cvtps_epi32(a);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}
inline Shorts multiply_high(Shorts a, Shorts b) { return (Shorts)_mm256_mulhi_epi16((__m256i)a, (__m256i)b); }
inline Ints add_products(Shorts a, Shorts b, Ints c) { return c + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
inline void interleave(Shorts a, Shorts b, Shorts& low, Shorts& high) {
  low = (Shorts)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b),
  high = (Shorts)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b);
}
inline void in_order(Ints& low, Ints& high) {
  const __m256i a = (__m256i)low, b = (__m256i)high;
  low = (Ints)_mm256_permute2x128_si256(a, b, 0x20), high = (Ints)_mm256_permute2x128_si256(a, b, 0x31);
}
inline Vec to_floats(Ints a) { return _mm256_cvtepi32_ps((__m256i)a); }
#elif defined(__SSE2__)
inline Shorts shorts_load(const Int8* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (Shorts)_mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
}
inline void shorts_store(int16_t* p, Vec a) {
  const __m128i x = _mm_cvtps_epi32(a);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(x, x));
}
inline Shorts multiply_high(Shorts a, Shorts b) { return (Shorts)_mm_mulhi_epi16((__m128i)a, (__m128i)b); }
inline Ints add_products(Shorts a, Shorts b, Ints c) { return c + (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b); }
inline void interleave(Shorts a, Shorts b, Shorts& low, Shorts& high) {
  low = (Shorts)_mm_unpacklo_epi16((__m128i)a, (__m128i)b), high = (Shorts)_mm_unpackhi_epi16((__m128i)a, (__m128i)b);
}
inline void in_order(Ints&, Ints&) {}
inline Vec to_floats(Ints a) { return _mm_cvtepi32_ps((__m128i)a); }
#else  // declared only: see kShortProducts
Shorts shorts_load(const Int8* p);
void shorts_store(int16_t* p, Vec a);
Shorts multiply_high(Shorts a, Shorts b);
Ints add_products(Shorts a, Shorts b, Ints c);
void interleave(Shorts a, Shorts b, Shorts& low, Shorts& high);
void in_order(Ints& low, Ints& high);
Vec to_floats(Ints a);
#endif

inline Shorts pairs_set(const int16_t* pair) {
  int32_t bits;
  std::memcpy(&bits, pair, sizeof bits);
  return (Shorts)(bits - Ints{});
}

/// to[0 .. n) = x / scale, rounded, the largest magnitude being `most`; n is a multiple of kLanes. The scale is NaN
/// where an x is NaN or infinite.
inline float round_row(const float* x, int64_t n, float most, int16_t* to) {
  constexpr float kLeast = 0x1p-149f;  // for rows of zeros
  Vec top = vec_set(kLeast), wrong = vec_zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec a = vec_load(x + i);
    top = vec_max(a, vec_max(-a, top));
    wrong += a - a;
  }
  const float largest = vec_max_all(top);
  const float lift = largest < 0x1p-64f ? 0x1p64f : 1.0f;  // without it the inverse might be infinite
  const float factor = most / (largest * lift);
  for (int64_t i = 0; i < n; i += kLanes) shorts_store(to + i, vec_load(x + i) * lift * factor);
  return largest / most + vec_sum(wrong);
}

// ---------------------------------------------------------------------------------------------------------------- keys

// A table of rotations has kTableOne for 1. Rotated keys are 1 / kTurnedUnit times as large as those of the ring.
constexpr float kTableOne = 32767.0f, kTurnedUnit = 0x1p8f / kTableOne, kPlainMost = 32767.0f;

/// The largest element of a query for rotated keys: each of kLanes sums of `words` / kLanes products stays below 2^31.
/// Below 2^15, as there are 4 kLanes words or more.
inline float turned_most(int64_t words) {
  constexpr float kLargestKey = 23172.0f;  // 2^7.5 * 128, and 2 for rounding
  return static_cast<float>(static_cast<int64_t>(0x1p31f / kLargestKey) * kLanes / words);
}

/// As dot_keys for floats; scores in units of q's scale and, with kTurn, of kTurnedUnit.
template <int R, bool kTurn>
__attribute__((noinline)) void dot_keys(const int16_t* q, const Keys<Int8, int16_t>& keys, int64_t n, float* scores) {
  constexpr int K = kSums / R;
  const int64_t pairs = kTurn ? keys.pairs : 0;
  for (int64_t j = 0; j < n; j += K) {
    const Int8* at[K];
    const int16_t* turn[K];
    for (int k = 0; k < K; ++k) {
      at[k] = keys.rows + smaller(j + k, n - 1) * keys.stride;
      if constexpr (kTurn) turn[k] = keys.table + (j + k) * 2 * pairs;
    }
    fetch(keys.ahead, j * keys.stride, (j + K) * keys.stride);
    Ints sums[kSums] = {};
    for (int64_t f = 0; f < pairs; f += kShorts) {
      Shorts x[R], y[R];
      for (int r = 0; r < R; ++r)
        x[r] = shorts_load(q + r * kQueryStride + f), y[r] = shorts_load(q + r * kQueryStride + pairs + f);
      for (int k = 0; k < K; ++k) {
        const Shorts a = shorts_load(at[k] + f) << 8, b = shorts_load(at[k] + pairs + f) << 8;
        const Shorts c = shorts_load(turn[k] + f), s = shorts_load(turn[k] + pairs + f);
        // Both are differences, so that what rounding down takes away is taken away twice.
        const Shorts first = multiply_high(a, c) - multiply_high(b, s);
        const Shorts second = multiply_high(b, c) - multiply_high(a, -s);
        for (int r = 0; r < R; ++r) sums[r * K + k] = add_products(x[r], first, sums[r * K + k]);
        for (int r = 0; r < R; ++r) sums[r * K + k] = add_products(y[r], second, sums[r * K + k]);
      }
    }
    for (int64_t c = 2 * pairs; c < keys.words; c += kShorts) {
      Shorts x[R];
      for (int r = 0; r < R; ++r) x[r] = shorts_load(q + r * kQueryStride + c);
      for (int k = 0; k < K; ++k) {
        const Shorts a = shorts_load(at[k] + c) << (kTurn ? 7 : 0);
        for (int r = 0; r < R; ++r) sums[r * K + k] = add_products(x[r], a, sums[r * K + k]);
      }
    }
    Vec found[16] = {};
    for (int i = 0; i < kSums; ++i) found[i] = to_floats(sums[i]);
    store_sums<R>(found, scores + j);
  }
}

// -------------------------------------------------------------------------------------------------------------- values

template <int R, int C>
__attribute__((noinline)) void add_columns(const int16_t* weights, const float* scales, const Values<Int8>& v,
                                           int64_t column, float* out, int64_t out_stride) {
  for (; column + C * kShorts <= v.columns; column += C * kShorts) {
    Ints sums[R][2 * C] = {};
    for (int64_t j = 0; j < v.stop; j += 2) {
      const int64_t at = j * v.stride + column, next = smaller(j + 1, v.stop - 1) * v.stride + column;
      fetch(v.ahead, at, at + C * kShorts);
      fetch(v.ahead, at + v.stride, at + v.stride + C * kShorts);
      Shorts value[2 * C];
      for (int c = 0; c < C; ++c)
        interleave(shorts_load(v.rows + at + c * kShorts), shorts_load(v.rows + next + c * kShorts), value[2 * c],
                   value[2 * c + 1]);
      for (int r = 0; r < R; ++r) {
        const Shorts weight = pairs_set(weights + r * kTile + j);
        for (int c = 0; c < 2 * C; ++c) sums[r][c] = add_products(weight, value[c], sums[r][c]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) {
        in_order(sums[r][2 * c], sums[r][2 * c + 1]);
        for (int i = 0; i < 2; ++i) {
          float* to = out + r * out_stride + column + (2 * c + i) * kLanes;
          vec_store(to, vec_load(to) + to_floats(sums[r][2 * c + i]) * scales[r]);
        }
      }
  }
  if constexpr (C > 1) add_columns<R, C / 2>(weights, scales, v, column, out, out_stride);
}

/// out[r] += scales[r] * weights[r * kTile + j] * row j of the values, for R rows. Weights behind the last are 0.
template <int R>
inline void add_values(const int16_t* weights, const float* scales, const Values<Int8>& v, float* out,
                       int64_t out_stride) {
  constexpr int C = kSums / (2 * R) < 4 ? kSums / (2 * R) : 4;
  add_columns<R, C>(weights, scales, v, 0, out, out_stride);
}

}  // namespace subquad::cpu::SUBQUAD_ISA::sink
