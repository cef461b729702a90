// One vector of floats in the widest registers of the instruction set this file is compiled for, and loads that widen
// weights.
//
// Included by *.isa.cpp only, once per instruction set; everything lives in a namespace of that name, and nothing from
// the standard library with external linkage is used, so that no AVX-512 copy of a shared template can reach an older
// CPU.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/half.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef SUBQUAD_ISA
#error "compile through python/subquad/_build.py, which defines SUBQUAD_ISA"
#endif

namespace subquad::cpu::SUBQUAD_ISA {

#if defined(__AVX512F__) && defined(__AVX512BW__)

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;
};
inline Vec vec_zero() { return {_mm512_setzero_ps()}; }
inline Vec vec_set(float x) { return {_mm512_set1_ps(x)}; }
inline Vec vec_load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void vec_store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline Vec vec_add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec vec_fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline float vec_sum(Vec a) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
#define SQ_VEC_SUMS
/// out[i] = vec_sum(a[i]) for 16 vectors: the same additions in the same order, by transposing while reducing.
inline void vec_sums(const Vec* a, float* out) {
  __m512 q[4];
  for (int i = 0; i < 4; ++i) {
    __m512 two[2];
    for (int j = 0; j < 2; ++j) {
      const __m512 u = a[4 * i + 2 * j].v, v = a[4 * i + 2 * j + 1].v;
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
inline void widen(const BFloat16* p, Vec& even, Vec& odd) {
  const __m512i bits = _mm512_loadu_si512(p);
  even.v = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  odd.v = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline void widen(const Half* p, Vec& low, Vec& high) {
  low.v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  high.v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;
};
inline Vec vec_zero() { return {_mm256_setzero_ps()}; }
inline Vec vec_set(float x) { return {_mm256_set1_ps(x)}; }
inline Vec vec_load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void vec_store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline Vec vec_add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec vec_fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline float vec_sum(Vec a) {
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline void widen(const BFloat16* p, Vec& even, Vec& odd) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even.v = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  odd.v = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline void widen(const Half* p, Vec& low, Vec& high) {
  low.v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  high.v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
}

#else

struct Vec {
  static constexpr int kLanes = 4;
  float v[4];
};
inline Vec vec_set(float x) { return {{x, x, x, x}}; }
inline Vec vec_zero() { return vec_set(0.0f); }
inline Vec vec_load(const float* p) {
  Vec a;
  std::memcpy(a.v, p, sizeof a.v);
  return a;
}
inline void vec_store(float* p, Vec a) { std::memcpy(p, a.v, sizeof a.v); }
inline Vec vec_add(Vec a, Vec b) {
  for (int i = 0; i < 4; ++i) a.v[i] += b.v[i];
  return a;
}
inline Vec vec_fma(Vec a, Vec b, Vec c) {
  for (int i = 0; i < 4; ++i) c.v[i] += a.v[i] * b.v[i];
  return c;
}
inline float vec_sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline void widen(const BFloat16* p, Vec& even, Vec& odd) {
  for (int i = 0; i < 4; ++i) even.v[i] = to_float(p[2 * i]), odd.v[i] = to_float(p[2 * i + 1]);
}
inline void widen(const Half* p, Vec& low, Vec& high) {
  for (int i = 0; i < 4; ++i) low.v[i] = to_float(p[i]), high.v[i] = to_float(p[i + 4]);
}

#endif

constexpr int kLanes = Vec::kLanes;

#if !defined(SQ_VEC_SUMS)
inline void vec_sums(const Vec* a, float* out) {
  for (int i = 0; i < 16; ++i) out[i] = vec_sum(a[i]);
}
#endif

// Weights are consumed in blocks of two vectors. Narrow types are widened without shuffling lanes across registers, so
// the float side (x, partial y) is kept in the matching order: see `packed_index`.
constexpr int kBlock = 2 * Vec::kLanes;

inline void widen(const float* p, Vec& low, Vec& high) {
  low = vec_load(p);
  high = vec_load(p + Vec::kLanes);
}

/// Position in packed order of logical element i: bf16 pairs split into even and odd halves, other types stay in order.
template <class W>
inline int64_t packed_index(int64_t i) {
  return i;
}
template <>
inline int64_t packed_index<BFloat16>(int64_t i) {
  const int64_t r = i % kBlock;
  return i - r + r / 2 + (r % 2) * Vec::kLanes;
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
inline Vec vec_dot(__m512bh a, __m512bh b, Vec c) { return {_mm512_dpbf16_ps(c.v, a, b)}; }
#endif

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace subquad::cpu::SUBQUAD_ISA
