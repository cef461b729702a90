// exp(x) of a float, or of each element of a compiler's vector of floats: two ulp over the whole range, inf above, 0
// below, NaN kept. Loops over floats vectorise. Both have the same bits, since both are this text.
#pragma once

#include "common/half.h"

namespace subquad {

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

SQ_ISA_BEGIN

/// The same bits as another type of that size.
template <class To, class From>
inline __attribute__((always_inline)) To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

/// The bits of F as integers without a sign.
template <class F>
struct BitsOf {
  typedef uint32_t Type __attribute__((vector_size(sizeof(F))));
};
template <>
struct BitsOf<float> {
  using Type = uint32_t;
};

template <class F>
inline __attribute__((always_inline)) F vector_exp(F x) {
  constexpr float kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const F zero{}, most = 88.3f - zero, least = -87.3f - zero, infinity = __builtin_inff() - zero;
  const F above = x > most ? most : x;
  const F y = above < least ? least : above;
  const F shifted = y * kLog2e + kShift;
  const F n = shifted - kShift;
  const F r = (y - n * kLn2High) - n * kLn2Low;
  F p = 1.3981999e-3f - zero;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665795e-2f;
  p = p * r + 1.6666666e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const F scale = same_bits<F>((same_bits<typename BitsOf<F>::Type>(shifted) << 23) + 0x3f800000u);
  const F value = p * scale;
  const F low = x < least ? zero : value;
  return x > most ? infinity : low;
}

SQ_ISA_END
}  // namespace subquad
