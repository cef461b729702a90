// One vector of floats in the compiler's own vector type, with loads and stores of every element type in their order,
// whole or in part, and silu. Arithmetic is written with operators. Included by *.isa.cpp only, like vec.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/half.h"
#include "cpu/simd/vec.h"

namespace subquad::cpu::SUBQUAD_ISA {

typedef float Lanes __attribute__((vector_size(kLanes * 4)));
typedef uint32_t LaneBits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t LaneHalves __attribute__((vector_size(kLanes * 2)));

inline Lanes lanes_set(float x) { return x - Lanes{}; }

template <class To, class From>
inline __attribute__((always_inline)) To lanes_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline __attribute__((always_inline)) Lanes lanes_widen(const float* p) {
  Lanes a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
inline __attribute__((always_inline)) Lanes lanes_widen(const BFloat16* p) {
  LaneHalves bits;
  std::memcpy(&bits, p, sizeof bits);
  return lanes_cast<Lanes>(__builtin_convertvector(bits, LaneBits) << 16);
}
inline __attribute__((always_inline)) Lanes lanes_widen(const Half* p) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return lanes_cast<Lanes>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__) && defined(__F16C__)
  return lanes_cast<Lanes>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Lanes a;
  for (int i = 0; i < kLanes; ++i) a[i] = to_float(p[i]);
  return a;
#endif
}

inline __attribute__((always_inline)) void lanes_narrow(float* p, Lanes a) { std::memcpy(p, &a, sizeof a); }
inline __attribute__((always_inline)) void lanes_narrow(BFloat16* p, Lanes a) {
  const LaneBits bits = lanes_cast<LaneBits>(a);
  const LaneBits rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  const LaneBits chosen = (bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : rounded;  // NaN stays NaN
  const LaneHalves halves = __builtin_convertvector(chosen >> 16, LaneHalves);
  std::memcpy(p, &halves, sizeof halves);
}
inline __attribute__((always_inline)) void lanes_narrow(Half* p, Lanes a) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(lanes_cast<__m512>(a), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(lanes_cast<__m256>(a), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<Half>(a[i]);
#endif
}

/// p[0 .. n) as floats, zeros beyond; kWhole: n is kLanes.
template <bool kWhole, class T>
inline __attribute__((always_inline)) Lanes lanes_load(const T* p, int64_t n) {
  if constexpr (kWhole) return lanes_widen(p);
  T part[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return lanes_widen(part);
}

/// p[0 .. n) = a, rounded.
template <bool kWhole, class T>
inline __attribute__((always_inline)) void lanes_store(T* p, Lanes a, int64_t n) {
  if constexpr (kWhole) return lanes_narrow(p, a);
  T part[kLanes];
  lanes_narrow(part, a);
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

/// exp as in common/exp.h.
inline __attribute__((always_inline)) Lanes lanes_exp(Lanes x) {
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
  constexpr float kShift = 12582912.0f;
  const Lanes above = x > 88.3f ? lanes_set(88.3f) : x;
  const Lanes y = above < -87.3f ? lanes_set(-87.3f) : above;
  const Lanes shifted = y * kLog2e + kShift;
  const Lanes n = shifted - kShift;
  const Lanes r = (y - n * kLn2High) - n * kLn2Low;
  Lanes p = lanes_set(1.3981999e-3f);
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665795e-2f;
  p = p * r + 1.6666666e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const Lanes scale = lanes_cast<Lanes>((lanes_cast<LaneBits>(shifted) << 23) + 0x3f800000u);
  const Lanes low = x < -87.3f ? lanes_set(0.0f) : p * scale;
  return x > 88.3f ? lanes_set(__builtin_inff()) : low;
}

inline __attribute__((always_inline)) Lanes lanes_silu(Lanes x) { return x / (1.0f + lanes_exp(-x)); }

inline __attribute__((always_inline)) Lanes lanes_silu_grad(Lanes x) {
  const Lanes s = 1.0f / (1.0f + lanes_exp(-x));
  return s * (1.0f + x * (1.0f - s));
}

}  // namespace subquad::cpu::SUBQUAD_ISA
