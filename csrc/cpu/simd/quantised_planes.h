// Products with weights of four bits in integers: a token is three planes of bytes. AVX2, where widening codes to
// floats is what takes the time; other instruction sets have no planes.
//
// A group of a token is integers of 24 bits times a power of two, their digits of base 256 in [-128, 127]. Codes meet
// digits as they stand in memory, by the instruction that multiplies unsigned and signed bytes. Sums over eight
// elements are exact; as floats they meet the scales. An element is off by at most 2^-23 of the largest of its group.
// As the largest may meet zeros, a token stays floats where all elements lose more than 2^-20 of what they are without
// these, and so does one with NaN, infinities or very large or small groups. Codes count from 0 and weights from -8: a
// sum has -8 times its elements in it.
#pragma once

#include "common/integers.h"
#include "cpu/simd/quantised.h"

namespace subquad::cpu::SUBQUAD_ISA::quantised {

#if defined(SQ_AVX2)

constexpr bool kHasPlanes = true;
constexpr int kPlanes = 3;
constexpr int kPair = 2;  // groups: their codes are a vector of bytes
constexpr int64_t kPairBytes = 32 * (2 * kPlanes + 1);
constexpr uint32_t kLeast = 87, kMost = 167;  // exponents of groups: 40 about 1, so that squares are normal numbers

/// A token in planes.
struct Planes {
  // Of a pair of groups: what meets the low halves of their codes and what meets the high ones, highest digit first; -8
  // times the sum of the eight elements that meet each four bytes of codes.
  const uint8_t* pairs;
  const float *scale, *sums;  // of a group: what its integers are multiplied by, and the sum of its elements
};

/// Floats that a token takes, a multiple of 16. The last one is 1 or 0: whether the token can be in planes.
inline int64_t planes_floats(int64_t groups) {
  return round_up(ceil_div(groups, kPair) * kPairBytes / 4 + 2 * round_up(groups, kLanes) + 1, 16);
}

inline Planes planes_at(const float* memory, int64_t groups) {
  const float* scale = memory + ceil_div(groups, kPair) * kPairBytes / 4;
  return {reinterpret_cast<const uint8_t*>(memory), scale, scale + round_up(groups, kLanes)};
}

inline bool fits_planes(const float* memory, int64_t groups) { return memory[planes_floats(groups) - 1] != 0.0f; }

/// Sums of squares: of what elements lose, of all elements, of the largest of each group.
struct Squares {
  Vec lost = vec_zero(), all = vec_zero();
  float largest = 0.0f;
  bool fit() const { return vec_sum(lost) <= (vec_sum(all) - largest) * 0x1p-40f; }  // not if any is NaN
};

/// One group; false if it does not fit.
inline bool pack_group(const float* x, uint8_t* pair, float* scale, float* sum, Squares& squares) {
  Vec most = vec_zero();
  for (int i = 0; i < kVecs; ++i) {
    const Vec part = vec_load(x + i * kLanes);
    most = vec_max(vec_max(part, -part), most);
    squares.all = vec_fma(part, part, squares.all);
  }
  // The highest digit is at most 127: what is above 127/128 of a power of two is taken for that power.
  const float largest = vec_max_all(most);
  const uint32_t exponent = largest == 0.0f ? 127 : float_to_bits(largest * (128.0f / 127.0f)) >> 23;
  if (exponent < kLeast || exponent > kMost) return false;
  squares.largest += largest * largest;
  *scale = bits_to_float((exponent - 22) << 23);
  const Vec by = vec_set(bits_to_float((2 * 127 + 22 - exponent) << 23));
  __m256i rest[kVecs];
  alignas(32) int32_t whole[kGroup];
  for (int i = 0; i < kVecs; ++i) {
    rest[i] = _mm256_cvtps_epi32(vec_load(x + i * kLanes) * by);
    _mm256_store_si256(reinterpret_cast<__m256i*>(whole + i * kLanes), rest[i]);
    const Vec lost = vec_load(x + i * kLanes) - _mm256_cvtepi32_ps(rest[i]) * vec_set(*scale);
    squares.lost = vec_fma(lost, lost, squares.lost);
  }
  int32_t total = 0;
  for (int word = 0; word < 4; ++word) {
    int32_t here = 0;
    for (int i = 4 * word; i < 4 * word + 4; ++i) here += whole[i] + whole[i + 16];
    total += here;
    here *= -8;
    std::memcpy(pair + 2 * kPlanes * 32 + 4 * word, &here, sizeof here);
  }
  *sum = static_cast<float>(total) * *scale;
  for (int plane = kPlanes - 1; plane >= 0; --plane) {
    __m256i digit[kVecs];
    for (int i = 0; i < kVecs; ++i) {
      digit[i] = _mm256_srai_epi32(_mm256_slli_epi32(rest[i], 24), 24);
      rest[i] = _mm256_srai_epi32(_mm256_sub_epi32(rest[i], digit[i]), 8);
    }
    const __m256i mixed =
        _mm256_packs_epi16(_mm256_packs_epi32(digit[0], digit[1]), _mm256_packs_epi32(digit[2], digit[3]));
    const __m256i bytes = _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(pair + 64 * plane), _mm256_castsi256_si128(bytes));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(pair + 64 * plane + 32), _mm256_extracti128_si256(bytes, 1));
  }
  return true;
}

/// to = x[0 .. 32 groups) in planes.
inline void pack_planes(const float* x, int64_t groups, float* to) {
  uint8_t* pairs = reinterpret_cast<uint8_t*>(to);
  float *scale = to + ceil_div(groups, kPair) * kPairBytes / 4, *sums = scale + round_up(groups, kLanes);
  if (groups % kPair != 0) std::memset(pairs + groups / kPair * kPairBytes, 0, kPairBytes);
  for (int64_t g = groups; g % kLanes != 0; ++g) scale[g] = sums[g] = 0.0f;
  bool fits = true;
  Squares squares;
  for (int64_t g = 0; fits && g < groups; ++g)
    fits = pack_group(x + g * kGroup, pairs + g / kPair * kPairBytes + g % kPair * 16, scale + g, sums + g, squares);
  to[planes_floats(groups) - 1] = fits && squares.fit() ? 1.0f : 0.0f;
}

/// Of each four bytes of codes, eight in all: the sum of their products with the elements that they meet.
inline __attribute__((always_inline)) __m256i dot_pair(__m256i low, __m256i high, const uint8_t* pair) {
  const auto at = [&](int i) __attribute__((always_inline)) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pair + 32 * i));
  };
  const auto products = [&](int plane) __attribute__((always_inline)) {
    return _mm256_add_epi16(_mm256_maddubs_epi16(low, at(2 * plane)), _mm256_maddubs_epi16(high, at(2 * plane + 1)));
  };
  const __m256i one = _mm256_set1_epi16(1), base = _mm256_set1_epi16(256);
  const __m256i upper = _mm256_add_epi32(_mm256_madd_epi16(products(0), base), _mm256_madd_epi16(products(1), one));
  const __m256i lowest = _mm256_add_epi32(_mm256_madd_epi16(products(2), one), at(2 * kPlanes));
  return _mm256_add_epi32(_mm256_slli_epi32(upper, 8), lowest);
}

/// `dot_rows` for tokens in planes: a chain per lane for products and one for minima. For one row with one token,
/// next[0] is fetched in the order of memory.
template <QuantisedFormat kFormat, int R, int T>
inline void dot_rows(const Row* rows, const Row* next, const Planes* x, int64_t begin, int64_t end, Vec* total,
                     int ld) {
  constexpr int64_t kCodes = code_bytes(kFormat);
  Vec sum[R][T], rest[R][T];
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) {
      sum[r][t] = begin == 0 ? vec_zero() : total[(r * ld + t) * 2];
      rest[r][t] = begin == 0 ? vec_zero() : total[(r * ld + t) * 2 + 1];
    }
  const uint8_t* ahead = next[0].codes;
  const auto fetch = [&](const void* other) __attribute__((always_inline)) {
    prefetch(R == 1 && T == 1 ? ahead : other);
    ahead += 64;
  };
  const __m256i bits = _mm256_set1_epi8(15), group_of_word = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  const auto walk = [&]<bool kWhole>(int64_t first, int64_t here) __attribute__((always_inline)) {  // up to kLanes
    Vec scale[R][T];
    for (int r = 0; r < R; ++r) {
      const Vec by = load_halves(rows[r].scale + first, kWhole ? kLanes : here);
      if (first % 32 == 0) fetch(next[r].scale + first);
      for (int t = 0; t < T; ++t) scale[r][t] = by * vec_load(x[t].scale + first);
      if constexpr (has_minimum(kFormat)) {  // q s + m = (q - 8) s + (8 s + m)
        const Vec middle = vec_fma(by, vec_set(8.0f), load_halves(rows[r].minimum + first, kWhole ? kLanes : here));
        if (first % 32 == 0) fetch(next[r].minimum + first);
        for (int t = 0; t < T; ++t) rest[r][t] = vec_fma(middle, vec_load(x[t].sums + first), rest[r][t]);
      }
    }
    const auto pair = [&](int64_t i) __attribute__((always_inline)) {
      const __m256i own = _mm256_add_epi32(group_of_word, _mm256_set1_epi32(static_cast<int>(i)));
      for (int r = 0; r < R; ++r) {
        const int64_t at = (first + i) * kCodes;
        if (i * kCodes % 64 == 0) fetch(next[r].codes + at);
        __m256i codes{};
        std::memcpy(&codes, rows[r].codes + at, kWhole || i + kPair <= here ? sizeof codes : kCodes);
        const __m256i low = _mm256_and_si256(codes, bits), high = _mm256_and_si256(_mm256_srli_epi16(codes, 4), bits);
        for (int t = 0; t < T; ++t) {
          const __m256i part = dot_pair(low, high, x[t].pairs + (first + i) / kPair * kPairBytes);
          sum[r][t] = vec_fma(_mm256_cvtepi32_ps(part), _mm256_permutevar8x32_ps(scale[r][t], own), sum[r][t]);
        }
      }
    };
    if constexpr (kWhole) {
#pragma GCC unroll 4
      for (int i = 0; i < kLanes; i += kPair) pair(i);
    } else {
      for (int64_t i = 0; i < here; i += kPair) pair(i);
    }
  };
  int64_t first = begin;
  for (; first + kLanes <= end; first += kLanes) walk.template operator()<true>(first, kLanes);
  if (first < end) walk.template operator()<false>(first, end - first);
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) {
      total[(r * ld + t) * 2] = sum[r][t];
      total[(r * ld + t) * 2 + 1] = rest[r][t];
    }
}

#else

constexpr bool kHasPlanes = false;
struct Planes {};
inline int64_t planes_floats(int64_t) { return 0; }
inline Planes planes_at(const float*, int64_t) { return {}; }
inline bool fits_planes(const float*, int64_t) { return false; }
inline void pack_planes(const float*, int64_t, float*) {}

#endif

}  // namespace subquad::cpu::SUBQUAD_ISA::quantised
