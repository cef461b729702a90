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

/// The row whose bytes begin at `codes`.
template <QuantisedFormat kFormat>
inline Row row_at(const uint8_t* codes, int64_t groups) {
  const Half* scale = reinterpret_cast<const Half*>(codes + groups * code_bytes(kFormat));
  return {codes, scale, scale + groups};
}

template <QuantisedFormat kFormat>
inline Row row_of(const uint8_t* weight, int64_t row, int64_t groups) {
  return row_at<kFormat>(weight + row * groups * group_bytes(kFormat), groups);
}

// codes_of: the integers of a group as floats; those of kInt4 less 8.
#if defined(SQ_AVX512)
/// The integers that four bits stand for.
template <QuantisedFormat kFormat>
inline Vec table_of() {
  constexpr float kLeast = kFormat == QuantisedFormat::kInt4 ? -8.0f : 0.0f;
  Vec table;
  for (int i = 0; i < kLanes; ++i) table[i] = kLeast + static_cast<float>(i);
  return table;
}

/// out = entries of `table` by the four bits of each code: the low ones of 16 bytes, then the high ones.
inline __attribute__((always_inline)) void look_up(const uint8_t* p, Vec table, Vec (&out)[kVecs]) {
  const __m512i words = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  out[0] = _mm512_permutexvar_ps(words, table);
  out[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4), table);
}

template <QuantisedFormat kFormat>
inline __attribute__((always_inline)) void codes_of(const uint8_t* p, Vec (&out)[kVecs]) {
  if constexpr (kFormat == QuantisedFormat::kInt8) {
    const auto sixteen = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * i)); };
    for (int i = 0; i < kVecs; ++i) out[i] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen(i)));
  } else {
    look_up(p, table_of<kFormat>(), out);
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
#if defined(SQ_AVX512)
  if constexpr (kFormat != QuantisedFormat::kInt8) {  // the table holds the weights themselves
    const Vec by = vec_set(scale), table = table_of<kFormat>();
    return look_up(codes, has_minimum(kFormat) ? vec_fma(table, by, vec_set(minimum)) : vec_mul(table, by), w);
  }
#endif
  codes_of<kFormat>(codes, w);
  const Vec by = vec_set(scale), least = vec_set(minimum);
  for (int i = 0; i < kVecs; ++i) w[i] = has_minimum(kFormat) ? vec_fma(w[i], by, least) : vec_mul(w[i], by);
}

/// The fp16 numbers from[0 .. n), zeros beyond; n <= kLanes.
inline __attribute__((always_inline)) Vec load_halves(const Half* from, int64_t n) {
#if defined(SQ_AVX512)
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), from));
#else
  return n == kLanes ? vec_load(from) : vec_load_part<false>(from, n);
#endif
}

// Rows are walked several at a time: about kInFlight bytes, for more streams than that slow each other. What comes
// kAhead bytes later is fetched into the first cache meanwhile.
constexpr int64_t kInFlight = 10240, kAhead = 8192;

/// group(g, weights) for each group in [begin, end); weights(r, w) gives those of row r, or
/// its integers if not kScaled: then the rows are codes alone. The same groups of the rows `next` are fetched
/// meanwhile.
template <QuantisedFormat kFormat, bool kScaled, int R, class Group>
inline __attribute__((always_inline)) void walk_rows(const Row* rows, const Row* next, int64_t begin, int64_t end,
                                                     const Group& group) {
  constexpr int64_t kCodes = code_bytes(kFormat), kStep = 64 / kCodes;  // groups of a cache line
  for (int64_t first = begin; first < end; first += kLanes) {
    const int64_t here = end - first < kLanes ? end - first : kLanes;
    float scale[R][kLanes], minimum[R][kLanes];
    for (int r = 0; kScaled && r < R; ++r) {
      vec_store(scale[r], load_halves(rows[r].scale + first, here));
      prefetch(next[r].scale + first);
      if constexpr (has_minimum(kFormat)) {
        vec_store(minimum[r], load_halves(rows[r].minimum + first, here));
        prefetch(next[r].minimum + first);
      }
    }
    const auto one = [&](int64_t i) __attribute__((always_inline)) {
      group(first + i, [&](int r, Vec(&w)[kVecs]) __attribute__((always_inline)) {
        const uint8_t* codes = rows[r].codes + (first + i) * kCodes;
        if constexpr (kScaled) {
          weights_of<kFormat>(codes, scale[r][i], has_minimum(kFormat) ? minimum[r][i] : 0.0f, w);
        } else {
          codes_of<kFormat>(codes, w);
        }
      });
    };
    int64_t i = 0;
    for (; i + kStep <= here; i += kStep) {
      for (int r = 0; r < R; ++r) prefetch(next[r].codes + (first + i) * kCodes);
      for (int step = 0; step < kStep; ++step) one(i + step);
    }
    for (; i < here; ++i) one(i);
  }
}

/// out[0 .. 32 groups) = the weights of groups [first, first + groups) of a row, or its integers if not kScaled; the
/// same groups of the row `next` are fetched meanwhile.
template <QuantisedFormat kFormat, bool kScaled = true>
inline void dequantise(const Row& row, const Row& next, int64_t first, int64_t groups, float* out) {
  walk_rows<kFormat, kScaled, 1>(&row, &next, first, first + groups,
                                 [&](int64_t g, const auto& weights) __attribute__((always_inline)) {
                                   Vec w[kVecs];
                                   weights(0, w);
                                   for (int i = 0; i < kVecs; ++i)
                                     vec_store(out + (g - first) * kGroup + i * kLanes, w[i]);
                                 });
}

/// total[(r ld + t) 2 ..] += row r . x[t] over the groups [begin, end), = where begin is 0; two chains per lane
/// whatever R and T are: their sum has the same bits in every tile.
template <QuantisedFormat kFormat, int R, int T>
inline void dot_rows(const Row* rows, const Row* next, const float* const* x, int64_t begin, int64_t end, Vec* total,
                     int ld) {
  Vec sum[R][T][2];
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t)
      for (int c = 0; c < 2; ++c) sum[r][t][c] = begin == 0 ? vec_zero() : total[(r * ld + t) * 2 + c];
  walk_rows<kFormat, true, R>(rows, next, begin, end,
                              [&](int64_t g, const auto& weights) __attribute__((always_inline)) {
                                Vec at[T][kVecs];
                                for (int t = 0; t < T; ++t)
                                  for (int j = 0; j < kVecs; ++j) at[t][j] = vec_load(x[t] + g * kGroup + j * kLanes);
                                for (int r = 0; r < R; ++r) {
                                  Vec w[kVecs];
                                  weights(r, w);
                                  for (int t = 0; t < T; ++t)
                                    for (int j = 0; j < kVecs; ++j)
                                      sum[r][t][j % 2] = vec_fma(w[j], at[t][j], sum[r][t][j % 2]);
                                }
                              });
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t)
      for (int c = 0; c < 2; ++c) total[(r * ld + t) * 2 + c] = sum[r][t][c];
}

/// y[0 .. 32 groups) += sum over r, in order, of h[r] * row r.
template <QuantisedFormat kFormat, bool kScaled, int R>
inline void add_weighted(const Row* rows, const Row* next, const float* h, int64_t groups, float* y) {
  Vec factor[R];
  for (int r = 0; r < R; ++r) factor[r] = vec_set(h[r]);
  walk_rows<kFormat, kScaled, R>(rows, next, 0, groups,
                                 [&](int64_t g, const auto& weights) __attribute__((always_inline)) {
                                   Vec sum[kVecs];
                                   for (int j = 0; j < kVecs; ++j) sum[j] = vec_load(y + g * kGroup + j * kLanes);
                                   for (int r = 0; r < R; ++r) {
                                     Vec w[kVecs];
                                     weights(r, w);
                                     for (int j = 0; j < kVecs; ++j) sum[j] = vec_fma(w[j], factor[r], sum[j]);
                                   }
                                   for (int j = 0; j < kVecs; ++j) vec_store(y + g * kGroup + j * kLanes, sum[j]);
                                 });
}

}  // namespace subquad::cpu::SUBQUAD_ISA::quantised
