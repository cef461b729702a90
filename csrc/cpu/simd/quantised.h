// Quantised weights as vectors of floats: groups of codes in their natural order. One instruction set; see vec.h.
#pragma once

#include "common/quantised.h"
#include "cpu/simd/vec.h"

namespace subquad::cpu::SUBQUAD_ISA::quantised {

constexpr int kGroup = kQuantisedGroup;
constexpr int kVecs = kGroup / kLanes;  // vectors of a group

/// A row of weights: codes, scales and, if the format has them, minima.
struct Row {
  const uint8_t* codes;
  const Half *scale, *minimum;
};

template <QuantisedFormat kFormat>
inline Row row_of(const uint8_t* weight, int64_t row, int64_t groups) {
  const uint8_t* codes = weight + row * groups * group_bytes(kFormat);
  const Half* scale = reinterpret_cast<const Half*>(codes + groups * code_bytes(kFormat));
  return {codes, scale, scale + groups};
}

// codes_of: the integers of a group as floats; those of kInt4 less 8.
#if defined(SQ_AVX512)
template <QuantisedFormat kFormat>
inline __attribute__((always_inline)) void codes_of(const uint8_t* p, Vec (&out)[kVecs]) {
  const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if constexpr (kFormat == QuantisedFormat::kInt8) {
    const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16));
    out[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(first));
    out[1] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(second));
  } else {  // a table of 16 floats, looked up by the low four bits of each word
    constexpr float kLeast = kFormat == QuantisedFormat::kInt4 ? -8.0f : 0.0f;
    const __m512 table = _mm512_setr_ps(kLeast, kLeast + 1, kLeast + 2, kLeast + 3, kLeast + 4, kLeast + 5, kLeast + 6,
                                        kLeast + 7, kLeast + 8, kLeast + 9, kLeast + 10, kLeast + 11, kLeast + 12,
                                        kLeast + 13, kLeast + 14, kLeast + 15);
    const __m512i words = _mm512_cvtepu8_epi32(first);
    out[0] = _mm512_permutexvar_ps(words, table);
    out[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4), table);
  }
}
#elif defined(SQ_AVX2)
template <QuantisedFormat kFormat>
inline __attribute__((always_inline)) void codes_of(const uint8_t* p, Vec (&out)[kVecs]) {
  const auto eight = [&](int i) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * i)); };
  if constexpr (kFormat == QuantisedFormat::kInt8) {
    for (int i = 0; i < kVecs; ++i) out[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight(i)));
  } else {
    const __m256i low = _mm256_set1_epi32(15), middle = _mm256_set1_epi32(kFormat == QuantisedFormat::kInt4 ? 8 : 0);
    for (int i = 0; i < 2; ++i) {
      const __m256i words = _mm256_cvtepu8_epi32(eight(i));
      out[i] = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(words, low), middle));
      out[i + 2] = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(words, 4), middle));
    }
  }
}
#else
template <QuantisedFormat kFormat>
inline void codes_of(const uint8_t* p, Vec (&out)[kVecs]) {
  constexpr int kMiddle = kFormat == QuantisedFormat::kInt4 ? 8 : 0;
  for (int i = 0; i < kGroup; ++i) {
    const int code = kFormat == QuantisedFormat::kInt8 ? static_cast<int8_t>(p[i])
                     : i < 16                          ? p[i] & 15
                                                       : p[i - 16] >> 4;
    out[i / kLanes][i % kLanes] = static_cast<float>(code - kMiddle);
  }
}
#endif

/// w = the weights of a group, given its scale and minimum: exact but for the sum with the minimum, which is rounded.
template <QuantisedFormat kFormat>
inline __attribute__((always_inline)) void weights_of(const uint8_t* codes, float scale, float minimum,
                                                      Vec (&w)[kVecs]) {
  codes_of<kFormat>(codes, w);
  const Vec by = vec_set(scale), least = vec_set(minimum);
  for (int i = 0; i < kVecs; ++i) w[i] = has_minimum(kFormat) ? vec_fma(w[i], by, least) : vec_mul(w[i], by);
}

/// out[0 .. 32 groups) = the weights of groups [first, first + groups) of a row.
template <QuantisedFormat kFormat>
inline void dequantise(const Row& row, int64_t first, int64_t groups, float* out) {
  for (int64_t g = first; g < first + groups; ++g, out += kGroup) {
    Vec w[kVecs];
    weights_of<kFormat>(row.codes + g * code_bytes(kFormat), to_float(row.scale[g]),
                        has_minimum(kFormat) ? to_float(row.minimum[g]) : 0.0f, w);
    for (int i = 0; i < kVecs; ++i) vec_store(out + i * kLanes, w[i]);
  }
}

/// to[0 .. n) = the fp16 numbers at `from`, n <= kLanes.
inline void load_halves(const Half* from, int64_t n, float* to) {
  vec_store(to, n == kLanes ? vec_load(from) : vec_load_part<false>(from, n));
}

/// out[r][t] = row r . x[t], x [T, 32 groups]; each in one chain per lane whatever R and T are. Rows `next` are fetched
/// meanwhile.
template <QuantisedFormat kFormat, int R, int T>
inline void dot_rows(const Row* rows, const Row* next, const float* x, int64_t ldx, int64_t groups, float (*out)[T]) {
  constexpr int64_t kCodes = code_bytes(kFormat), kLine = 64;
  Vec total[R][T];
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) total[r][t] = vec_zero();
  for (int64_t first = 0; first < groups; first += kLanes) {
    const int64_t here = groups - first < kLanes ? groups - first : kLanes;
    float scale[R][kLanes], minimum[R][kLanes];
    for (int r = 0; r < R; ++r) {
      load_halves(rows[r].scale + first, here, scale[r]);
      prefetch(next[r].scale + first);
      if constexpr (has_minimum(kFormat)) {
        load_halves(rows[r].minimum + first, here, minimum[r]);
        prefetch(next[r].minimum + first);
      }
    }
    for (int64_t i = 0; i < here; ++i) {
      const int64_t g = first + i;
      const float* at = x + g * kGroup;
      for (int r = 0; r < R; ++r) {
        Vec w[kVecs];
        weights_of<kFormat>(rows[r].codes + g * kCodes, scale[r][i], has_minimum(kFormat) ? minimum[r][i] : 0.0f, w);
        if (i % (kLine / kCodes) == 0) prefetch(next[r].codes + g * kCodes);
        for (int t = 0; t < T; ++t)
          for (int j = 0; j < kVecs; ++j) total[r][t] = vec_fma(w[j], vec_load(at + t * ldx + j * kLanes), total[r][t]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) out[r][t] = vec_sum(total[r][t]);
}

}  // namespace subquad::cpu::SUBQUAD_ISA::quantised
