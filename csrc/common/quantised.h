// Weights in few bits: rows of groups of 32 codes with an fp16 scale each, and in one format an fp16 minimum. A row is
// one run of bytes: its codes, then its scales, then its minima. The numbers are those of GGUF's Q8_0, Q4_0 and Q4_1;
// four bits: byte j of a group holds element j in its low half and element j + 16 in its high one.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace subquad {

enum class QuantisedFormat : int {
  kInt8 = 0,
  kInt4 = 1,
  kInt4Min = 2
};  // positions in reference.quantised_linear.FORMATS
constexpr int64_t kQuantisedFormats = 3;

SQ_ISA_BEGIN

constexpr int kQuantisedGroup = 32;

SQ_HD constexpr bool has_minimum(QuantisedFormat format) { return format == QuantisedFormat::kInt4Min; }

/// Of the codes of a group.
SQ_HD constexpr int64_t code_bytes(QuantisedFormat format) {
  return format == QuantisedFormat::kInt8 ? kQuantisedGroup : kQuantisedGroup / 2;
}

/// Of a group, with its scale and minimum.
SQ_HD constexpr int64_t group_bytes(QuantisedFormat format) {
  return code_bytes(format) + (has_minimum(format) ? 4 : 2);
}

/// fn<kFormat>() for the format of a call.
template <class Fn>
inline decltype(auto) by_format(QuantisedFormat format, const Fn& fn) {
  switch (format) {
    case QuantisedFormat::kInt8:
      return fn.template operator()<QuantisedFormat::kInt8>();
    case QuantisedFormat::kInt4:
      return fn.template operator()<QuantisedFormat::kInt4>();
    default:
      return fn.template operator()<QuantisedFormat::kInt4Min>();
  }
}

SQ_ISA_END

}  // namespace subquad
