// Rows of queries, keys and values: widened, rotated, quantised. One instruction set.
#pragma once

#include "cpu/simd/vec.h"
#include "ops/sink_attention_step/params.h"

namespace subquad::cpu::SUBQUAD_ISA::sink {

using SUBQUAD_ISA::vec_load;

// -------------------------------------------------------------------------------------------------------------- bytes

struct Int8 {
  int8_t bits;
};

struct Float8 {  // e4m3fn: exponents from -6 on, 448 at most, no infinity
  uint8_t bits;
};

inline float to_float(Int8 x) { return static_cast<float>(x.bits); }

/// As a half with the exponent of a number 256 times as small; NaN stays NaN.
inline float to_float(Float8 x) {
  const uint16_t magnitude = x.bits & 0x7fu, sign = static_cast<uint16_t>((x.bits & 0x80u) << 8);
  const uint16_t bits = magnitude == 0x7fu ? 0x7fffu : static_cast<uint16_t>(magnitude << 7);
  return subquad::to_float(Half{static_cast<uint16_t>(sign | bits)}) * 256.0f;
}

// The compiler's own conversions between vectors of bytes and of wider types take the bytes out one by one.
#if defined(SQ_AVX512)
inline __attribute__((always_inline)) Vec vec_load(const Int8* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline __attribute__((always_inline)) Vec vec_load(const Float8* p) {
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i magnitude = _mm256_and_si256(wide, _mm256_set1_epi16(0x7f));
  const __m256i nan = _mm256_srli_epi16(_mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f)), 1);
  const __m256i sign = _mm256_slli_epi16(_mm256_xor_si256(wide, magnitude), 8);
  const __m256i bits = _mm256_or_si256(_mm256_or_si256(sign, nan), _mm256_slli_epi16(magnitude, 7));
  return _mm512_mul_ps(_mm512_cvtph_ps(bits), _mm512_set1_ps(256.0f));
}
#elif defined(SQ_AVX2)
inline __attribute__((always_inline)) Vec vec_load(const Int8* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline __attribute__((always_inline)) Vec vec_load(const Float8* p) {
  const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i magnitude = _mm_and_si128(wide, _mm_set1_epi16(0x7f));
  const __m128i nan = _mm_srli_epi16(_mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f)), 1);
  const __m128i sign = _mm_slli_epi16(_mm_xor_si128(wide, magnitude), 8);
  const __m128i bits = _mm_or_si128(_mm_or_si128(sign, nan), _mm_slli_epi16(magnitude, 7));
  return _mm256_mul_ps(_mm256_cvtph_ps(bits), _mm256_set1_ps(256.0f));
}
#else
template <class E>
inline Vec vec_load_bytes(const E* p) {
  Vec a;
  for (int i = 0; i < kLanes; ++i) a[i] = to_float(p[i]);
  return a;
}
inline Vec vec_load(const Int8* p) { return vec_load_bytes(p); }
inline Vec vec_load(const Float8* p) { return vec_load_bytes(p); }
#endif

/// The nearest integer, the even one of two, of a magnitude below 2^22.
inline float nearest(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
  return (x + kShift) - kShift;
}

inline Int8 narrow(float x, Int8) { return {static_cast<int8_t>(nearest(x))}; }

inline Float8 narrow(float x, Float8) {
  const uint32_t bits = float_to_bits(x), magnitude = bits & 0x7fffffffu, sign = bits >> 24 & 0x80u;
  constexpr float kSmallestNormal = 0.015625f, kSubnormals = 512.0f;
  const float size = bits_to_float(magnitude);
  if (size < kSmallestNormal) return {static_cast<uint8_t>(sign | static_cast<uint32_t>(nearest(size * kSubnormals)))};
  const uint32_t rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1u);
  return {static_cast<uint8_t>(sign | ((rounded >> 20) - (120u << 3)))};
}

inline float largest_of(Int8) { return 127.0f; }
inline float largest_of(Float8) { return 448.0f; }

/// row[0 .. n) = x / scale, the scale being such that the largest magnitude is the largest number of the type. NaN and
/// infinity make the scale NaN or infinite, and the numbers that they would be 0.
template <class E>
float quantise(const float* x, int64_t n, E* row) {
  float most = 0.0f;
  bool nan = false;
  for (int64_t i = 0; i < n; ++i) {
    const float size = x[i] < 0.0f ? -x[i] : x[i];
    nan |= size != size;
    most = size > most ? size : most;
  }
  const float limit = largest_of(E{}), scale = nan ? __builtin_nanf("") : most == 0.0f ? 1.0f : most / limit;
  for (int64_t i = 0; i < n; ++i) {
    const float ratio = x[i] / scale, finite = ratio - ratio == 0.0f ? ratio : 0.0f;
    row[i] = narrow(finite > limit ? limit : finite < -limit ? -limit : finite, E{});
  }
  return scale;
}

// ----------------------------------------------------------------------------------------------------------- rotation

/// Cosines and sines of position * turns: the product wraps modulo one turn, so that no position is too large.
/// Absolute error 1e-7.
inline void rotation(const uint64_t* turns, int64_t n, int64_t position, float* __restrict cos, float* __restrict sin) {
  const uint64_t factor = static_cast<uint64_t>(position);
  for (int64_t f = 0; f < n; ++f) {
    const uint32_t phase = static_cast<uint32_t>(factor * turns[f] >> 32);
    const uint32_t quadrant = (phase + 0x20000000u) >> 30;
    const int32_t rest = static_cast<int32_t>(phase - (quadrant << 30));  // within an eighth of a turn of 0
    const float x = static_cast<float>(rest) * 1.46291807926715968e-9f, y = x * x;
    float c = y * 2.48015873e-5f - 1.38888889e-3f;
    c = (c * y + 4.16666667e-2f) * y - 0.5f;
    c = c * y + 1.0f;
    float s = y * 2.75573192e-6f - 1.98412698e-4f;
    s = (s * y + 8.33333333e-3f) * y - 1.66666667e-1f;
    s = s * y * x + x;
    const uint32_t odd = 0u - (quadrant & 1u), c_bits = float_to_bits(c), s_bits = float_to_bits(s);
    cos[f] = bits_to_float(((c_bits & ~odd) | (s_bits & odd)) ^ ((quadrant + 1u) & 2u) << 30);
    sin[f] = bits_to_float(((s_bits & ~odd) | (c_bits & odd)) ^ (quadrant & 2u) << 30);
  }
}

/// y = x with its n pairs (f, f + n) rotated. y may be x.
inline void rotate_halves(const float* x, const float* cos, const float* sin, int64_t n, float* y) {
  int64_t f = 0;
  for (; f + kLanes <= n; f += kLanes) {
    const Vec a = vec_load(x + f), b = vec_load(x + n + f), c = vec_load(cos + f), s = vec_load(sin + f);
    vec_store(y + f, a * c - b * s);
    vec_store(y + n + f, b * c + a * s);
  }
  for (; f < n; ++f) {
    const float a = x[f], b = x[n + f];
    y[f] = a * cos[f] - b * sin[f];
    y[n + f] = b * cos[f] + a * sin[f];
  }
}

/// The n pairs (2 f, 2 f + 1) of x become the pairs (f, f + n) of y, which is not x.
inline void part_pairs(const float* __restrict x, int64_t n, float* __restrict y) {
  for (int64_t f = 0; f < n; ++f) y[f] = x[2 * f], y[n + f] = x[2 * f + 1];
}

/// x in place with its n pairs rotated, wherever they lie.
inline void rotate_row(float* x, bool interleaved, const float* cos, const float* sin, int64_t n) {
  if (!interleaved) return rotate_halves(x, cos, sin, n, x);
  for (int64_t f = 0; f < n; ++f) {
    const float a = x[2 * f], b = x[2 * f + 1];
    x[2 * f] = a * cos[f] - b * sin[f];
    x[2 * f + 1] = b * cos[f] + a * sin[f];
  }
}

// --------------------------------------------------------------------------------------------------------------- rows

/// out[0 .. n) = row, zeros up to a whole vector.
template <class E>
inline void widen_row(const E* row, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) vec_store(out + i, vec_load(row + i));
  if (i < n) vec_store(out + i, vec_load_part<false>(row + i, n - i));
}

/// The same with the first 2 pairs elements rotated, their pairs parted. `spare` holds a row.
template <class E>
inline void widen_rotated(const E* row, int64_t n, bool interleaved, const float* cos, const float* sin, int64_t pairs,
                          float* spare, float* out) {
  if (!interleaved && pairs % kLanes == 0) {
    for (int64_t f = 0; f < pairs; f += kLanes) {
      const Vec a = vec_load(row + f), b = vec_load(row + pairs + f), c = vec_load(cos + f), s = vec_load(sin + f);
      vec_store(out + f, a * c - b * s);
      vec_store(out + pairs + f, b * c + a * s);
    }
    widen_row(row + 2 * pairs, n - 2 * pairs, out + 2 * pairs);
    return;
  }
  widen_row(row, n, interleaved ? spare : out);
  if (interleaved) {
    part_pairs(spare, pairs, out);
    for (int64_t i = 2 * pairs; i < round_up(n, kLanes); ++i) out[i] = spare[i];
  }
  rotate_halves(out, cos, sin, pairs, out);
}

/// row[0 .. n) = x, rounded.
template <class T>
inline void store_row(const float* x, int64_t n, T* row) {
  for (int64_t i = 0; i < n; ++i) row[i] = from_float<T>(x[i]);
}

}  // namespace subquad::cpu::SUBQUAD_ISA::sink
