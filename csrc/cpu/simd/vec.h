// One vector of floats in the widest registers of the instruction set this file is compiled for: the compiler's own
// vector type, so that arithmetic may be written with operators, and functions for what operators do not say.
//
// Included by *.isa.cpp only, once per instruction set; everything lives in a namespace of that name, and nothing from
// the standard library with external linkage is used, so that no AVX-512 copy of a shared template can reach an older
// CPU.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/exp.h"
#include "common/half.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef SUBQUAD_ISA
#error "compile through python/subquad/_build.py, which defines SUBQUAD_ISA"
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define SQ_AVX512
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define SQ_AVX2
#endif

namespace subquad::cpu::SUBQUAD_ISA {

#if defined(SQ_AVX512)
constexpr int kLanes = 16;
#elif defined(SQ_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecBits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecHalves __attribute__((vector_size(kLanes * 2)));

// ---------------------------------------------------------------------------------------------------------- arithmetic

inline Vec vec_zero() { return Vec{}; }
inline Vec vec_set(float x) { return x - Vec{}; }
inline Vec vec_add(Vec a, Vec b) { return a + b; }
inline Vec vec_mul(Vec a, Vec b) { return a * b; }

// vec_fma: a b + c, rounded once where the CPU can.
// vec_max: max(a, b); b where either is NaN.
// vec_max_all: the largest element; any of them when one is NaN.
// vec_sum: the sum of the elements, in an order of its own.
#if defined(SQ_AVX512)
inline Vec vec_fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec vec_max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline float vec_max_all(Vec a) { return _mm512_reduce_max_ps(a); }
inline float vec_sum(Vec a) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
#elif defined(SQ_AVX2)
inline Vec vec_fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec vec_max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline float vec_max_all(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline float vec_sum(Vec a) {
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
#else
inline Vec vec_fma(Vec a, Vec b, Vec c) { return c + a * b; }
inline Vec vec_max(Vec a, Vec b) { return a > b ? a : b; }
inline float vec_max_all(Vec a) {
  const float low = a[0] > a[1] ? a[0] : a[1], high = a[2] > a[3] ? a[2] : a[3];
  return low > high ? low : high;
}
inline float vec_sum(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }
#endif

#if defined(SQ_AVX512)
/// out[i] = vec_sum(a[i]) for 16 vectors: the same additions in the same order, by transposing while reducing.
inline void vec_sums(const Vec* a, float* out) {
  __m512 q[4];
  for (int i = 0; i < 4; ++i) {
    __m512 two[2];
    for (int j = 0; j < 2; ++j) {
      const __m512 u = a[4 * i + 2 * j], v = a[4 * i + 2 * j + 1];
      two[j] = _mm512_add_ps(_mm512_shuffle_f32x4(u, v, 0x44), _mm512_shuffle_f32x4(u, v, 0xee));
    }
    q[i] = _mm512_add_ps(_mm512_shuffle_f32x4(two[0], two[1], 0x88), _mm512_shuffle_f32x4(two[0], two[1], 0xdd));
  }
  // The 128-bit lanes of q are now one vector each, four partial sums wide.
  __m512 pair[2];
  for (int i = 0; i < 2; ++i) {
    const __m512d u = _mm512_castps_pd(q[2 * i]), v = _mm512_castps_pd(q[2 * i + 1]);
    pair[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(u, v)), _mm512_castpd_ps(_mm512_unpackhi_pd(u, v)));
  }
  const __m512 sums =
      _mm512_add_ps(_mm512_shuffle_ps(pair[0], pair[1], 0x88), _mm512_shuffle_ps(pair[0], pair[1], 0xdd));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_ps(out, _mm512_permutexvar_ps(order, sums));
}
#else
inline void vec_sums(const Vec* a, float* out) {
  for (int i = 0; i < 16; ++i) out[i] = vec_sum(a[i]);
}
#endif

// ----------------------------------------------------------------------------------- loads and stores, elements in
// order

inline __attribute__((always_inline)) Vec vec_load(const float* p) {
  Vec a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
// By name, because the compiler's conversion between these vectors takes four instructions instead of one.
inline __attribute__((always_inline)) Vec vec_load(const BFloat16* p) {
#if defined(SQ_AVX512)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#elif defined(SQ_AVX2)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
#else
  VecHalves bits;
  std::memcpy(&bits, p, sizeof bits);
  return same_bits<Vec>(__builtin_convertvector(bits, VecBits) << 16);
#endif
}
inline __attribute__((always_inline)) Vec vec_load(const Half* p) {
#if defined(SQ_AVX512)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(SQ_AVX2)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec a;
  for (int i = 0; i < kLanes; ++i) a[i] = to_float(p[i]);
  return a;
#endif
}

inline __attribute__((always_inline)) void vec_store(float* p, Vec a) { std::memcpy(p, &a, sizeof a); }
inline __attribute__((always_inline)) void vec_store(BFloat16* p, Vec a) {
  const VecBits bits = same_bits<VecBits>(a);
  const VecBits rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  const VecBits chosen = (bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : rounded;  // NaN stays NaN
  const VecHalves halves = __builtin_convertvector(chosen >> 16, VecHalves);
  std::memcpy(p, &halves, sizeof halves);
}
inline __attribute__((always_inline)) void vec_store(Half* p, Vec a) {
#if defined(SQ_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
#elif defined(SQ_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<Half>(a[i]);
#endif
}

/// p[0 .. n) as floats, zeros beyond; kWhole: n is kLanes.
template <bool kWhole, class T>
inline __attribute__((always_inline)) Vec vec_load_part(const T* p, int64_t n) {
  if constexpr (kWhole) return vec_load(p);
  T part[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return vec_load(part);
}

/// p[0 .. n) = a, rounded.
template <bool kWhole, class T>
inline __attribute__((always_inline)) void vec_store_part(T* p, Vec a, int64_t n) {
  if constexpr (kWhole) return vec_store(p, a);
  T part[kLanes];
  vec_store(part, a);
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

// --------------------------------------------------------------------------------------------- weights, in packed
// order

// Weights are consumed in blocks of two vectors. Narrow types are widened without shuffling lanes across registers, so
// the float side (x, partial y) is kept in the matching order: see `packed_index`.
constexpr int kBlock = 2 * kLanes;

inline void widen(const float* p, Vec& low, Vec& high) { low = vec_load(p), high = vec_load(p + kLanes); }
inline void widen(const Half* p, Vec& low, Vec& high) { low = vec_load(p), high = vec_load(p + kLanes); }
#if defined(SQ_AVX512)
inline void widen(const BFloat16* p, Vec& even, Vec& odd) {
  const __m512i bits = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
#elif defined(SQ_AVX2)
inline void widen(const BFloat16* p, Vec& even, Vec& odd) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  odd = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
#else
inline void widen(const BFloat16* p, Vec& even, Vec& odd) {
  for (int i = 0; i < kLanes; ++i) even[i] = to_float(p[2 * i]), odd[i] = to_float(p[2 * i + 1]);
}
#endif

/// Position in packed order of logical element i: bf16 pairs split into even and odd halves, other types stay in order.
template <class W>
inline int64_t packed_index(int64_t i) {
  return i;
}
template <>
inline int64_t packed_index<BFloat16>(int64_t i) {
  const int64_t r = i % kBlock;
  return i - r + r / 2 + (r % 2) * kLanes;
}

/// What a row of weights W is multiplied with: floats in packed order, or bf16 pairs where the CPU multiplies those
/// directly (exact products, float accumulators; bf16 subnormals count as zero).
template <class W>
struct Input {
  using Type = float;
};

#if defined(__AVX512BF16__)
template <>
struct Input<BFloat16> {
  using Type = BFloat16;
};
inline __m512bh pairs_load(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline Vec vec_dot(__m512bh a, __m512bh b, Vec c) { return _mm512_dpbf16_ps(c, a, b); }
#endif

/// Inlined by force: GCC takes a function that only fetches for one without effects, and drops calls of it.
inline __attribute__((always_inline)) void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// ---------------------------------------------------------------------------------------------------------
// exponentials

// Two exponentials. e^x is common/exp.h, for one float or a vector alike. 2^x is for softmax, whose scores come in
// units of log2: a shorter way to the result, in AVX-512 with an instruction for the power, and not the same bits as
// e^(x ln 2).

// Coefficients of (2^r - 1) / r on [-1/2, 1/2], relative error 2e-9.
constexpr float kExp2[] = {0.6931472f, 0.24022648f, 0.055503324f, 0.009618437f, 0.0013398875f, 0.0001535336f};

/// 2^x to two ulp; 0 below -150, NaN kept. x <= 126.
inline Vec vec_exp2(Vec x) {
#if defined(SQ_AVX512)
  const __m512 y = _mm512_max_ps(_mm512_set1_ps(-160.0f), x);
  const __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec r = _mm512_sub_ps(y, n);
  Vec p = vec_set(kExp2[5]);
  for (int i = 4; i >= 0; --i) p = vec_fma(p, r, vec_set(kExp2[i]));
  return _mm512_scalef_ps(vec_fma(p, r, vec_set(1.0f)), n);
#else
  float e[kLanes];
  vec_store(e, x);
  for (int i = 0; i < kLanes; ++i) {
    constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
    const float low = e[i] < -125.0f ? -125.0f : e[i];
    const float shifted = low + kShift;
    const float r = low - (shifted - kShift);
    float p = kExp2[5];
    for (int j = 4; j >= 0; --j) p = p * r + kExp2[j];
    const float value = (p * r + 1.0f) * bits_to_float((float_to_bits(shifted) << 23) + 0x3f800000u);
    e[i] = e[i] < -125.0f ? 0.0f : value;
  }
  return vec_load(e);
#endif
}

// Coefficients of (tanh(y) - y) / y^3 by powers of y^2, |y| <= 0.625, relative error of tanh 2e-8.
constexpr float kTanh[] = {-0.33333329f, 0.1333277f, -0.05385091f, 0.020997179f, -0.0060967142f};

/// tanh to three ulp; NaN kept.
inline Vec vec_tanh(Vec x) {
  const Vec z = x * x, y = vec_max(-x, x);
  Vec p = vec_set(kTanh[4]);
  for (int i = 3; i >= 0; --i) p = vec_fma(p, z, vec_set(kTanh[i]));
  const Vec small = vec_fma(p * z, x, x);
  constexpr float kLarge = 10.0f, kTwoLog2e = 2.8853900817779268f;  // tanh(10) is 1 in float32
  const Vec least = y < kLarge ? y : vec_set(kLarge);               // NaN takes the last branch below
  const Vec large = 1.0f - 2.0f / (1.0f + vec_exp2(least * kTwoLog2e));
  return y < 0.625f ? small : (x < 0.0f ? -large : x > 0.0f ? large : x);
}

}  // namespace subquad::cpu::SUBQUAD_ISA
