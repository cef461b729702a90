// Element types of tensors as torch-free code sees them, and the one switch over them.
#pragma once

#include "common/isa.h"

namespace subquad {

enum class DType : int { kFloat, kBFloat16, kHalf };

SQ_ISA_BEGIN

/// fn(T{}), where T is float, or BF16 or FP16: the types that the caller stores bfloat16 and float16 in.
template <class BF16, class FP16, class Fn>
inline decltype(auto) by_dtype(DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::kBFloat16:
      return fn(BF16{});
    case DType::kHalf:
      return fn(FP16{});
    default:
      return fn(float{});
  }
}

SQ_ISA_END

}  // namespace subquad
