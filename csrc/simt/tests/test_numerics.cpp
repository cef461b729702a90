// The bf16 and fp16 storage types, against exact arithmetic.
#include <cmath>
#include <limits>

#include "check.h"

namespace {

template <class T>
T from_bits(unsigned bits) {
  return {static_cast<std::uint16_t>(bits)};
}

// Value of a 16-bit float by definition, with `mantissa` fraction bits; its exponent bias is that of IEEE formats.
double decode(unsigned bits, int mantissa) {
  const int exponent_bits = 15 - mantissa, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(bits >> mantissa) & ((1 << exponent_bits) - 1);
  const int fraction = static_cast<int>(bits) & ((1 << mantissa) - 1);
  const double sign = bits & 0x8000u ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) {
    return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - mantissa);
  return sign * std::ldexp(fraction + (1 << mantissa), exponent - bias - mantissa);
}

template <class T, int mantissa>
void check_format() {
  constexpr unsigned infinity = ((1u << (15 - mantissa)) - 1) << mantissa;
  for (unsigned bits = 0; bits < 0x10000u; ++bits) {
    const float value = sq::to_float(from_bits<T>(bits));
    const double exact = decode(bits, mantissa);
    if (std::isnan(exact)) {
      CHECK(std::isnan(value));
      CHECK(std::isnan(sq::to_float(sq::from_float<T>(value))));
    } else {
      CHECK_EQ(double{value}, exact);
      CHECK_EQ(std::signbit(value), std::signbit(exact));
      CHECK_EQ(sq::from_float<T>(value).bits, bits);
    }
  }
  // Between neighbours: below the midpoint, the midpoint itself, and above it. Past the largest number the next value
  // of the format would be a power of two, and from the midpoint on everything is infinite.
  for (unsigned bits = 0; bits < infinity; ++bits) {
    const double low = decode(bits, mantissa);
    const double high = bits + 1 < infinity ? decode(bits + 1, mantissa) : 2 * low - decode(bits - 1, mantissa);
    const auto middle = static_cast<float>((low + high) / 2);
    if (double{middle} != (low + high) / 2) continue;  // bf16 subnormals: fp32 has no number there
    const unsigned even = bits + (bits & 1);
    for (const unsigned sign : {0u, 0x8000u}) {
      const float s = sign ? -1.0f : 1.0f;
      CHECK_EQ(sq::from_float<T>(s * std::nextafterf(middle, 0.0f)).bits, sign | bits);
      CHECK_EQ(sq::from_float<T>(s * middle).bits, sign | even);
      CHECK_EQ(sq::from_float<T>(s * std::nextafterf(middle, HUGE_VALF)).bits, sign | (bits + 1));
    }
  }
  CHECK_EQ(sq::from_float<T>(HUGE_VALF).bits, infinity);
  CHECK_EQ(sq::from_float<T>(-HUGE_VALF).bits, 0x8000u | infinity);
  for (const std::uint32_t nan : {0x7f800001u, 0x7fc00000u, 0xff800001u, 0xffffffffu}) {
    CHECK(std::isnan(sq::to_float(sq::from_float<T>(__uint_as_float(nan)))));
  }
}

CASE(bf16_rounds_to_nearest_even) { check_format<sq::bf16, 7>(); }
CASE(fp16_rounds_to_nearest_even) { check_format<sq::fp16, 10>(); }

CASE(bit_intrinsics) {
  CHECK_EQ(__popc(0xf00fu), 8);
  CHECK_EQ(__popcll(~0ull), 64);
  CHECK_EQ(__ffs(0), 0);
  CHECK_EQ(__ffs(0x50), 5);
  CHECK_EQ(__ffsll(1ll << 40), 41);
  CHECK_EQ(__clz(0), 32);
  CHECK_EQ(__clz(1), 31);
  CHECK_EQ(__clzll(1), 63);
  CHECK_EQ(min(3, -4), -4);
  CHECK_EQ(max(3u, 4u), 4u);
  CHECK_EQ(max(NAN, 1.0f), 1.0f);
}

}  // namespace
