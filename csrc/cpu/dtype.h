// Element types of tensors, as the torch-free kernels see them.
#pragma once

namespace subquad::cpu {

enum class DType : int { kFloat = 0, kBFloat16 = 1, kHalf = 2 };

}  // namespace subquad::cpu
