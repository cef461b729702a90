// exp(x) in float that compilers vectorise: two ulp over the whole range, inf above, 0 below, NaN kept.
#pragma once

#include "common/half.h"

namespace subquad {
SQ_ISA_BEGIN

inline float vector_exp(float x) {
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const float above = x > 88.3f ? 88.3f : x;
  const float y = above < -87.3f ? -87.3f : above;
  const float shifted = y * kLog2e + kShift;
  const float n = shifted - kShift;
  const float r = (y - n * kLn2High) - n * kLn2Low;
  float p = 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665795e-2f;
  p = p * r + 1.6666666e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const float scale = bits_to_float((float_to_bits(shifted) << 23) + 0x3f800000u);
  const float value = p * scale;
  const float low = x < -87.3f ? 0.0f : value;
  return x > 88.3f ? __builtin_inff() : low;
}

SQ_ISA_END
}  // namespace subquad
