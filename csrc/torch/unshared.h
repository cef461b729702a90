// Memory that is written to belongs to one argument alone, as `_checks.unshared` has it in Python.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "torch/checks.h"

namespace subquad {

/// An argument and its name; no tensor where it is absent.
struct Argument {
  const Tensor* tensor;
  const char* name;

  Argument(const Tensor& given, const char* called) : tensor(&given), name(called) {}
  Argument(const OptionalTensor& given, const char* called)
      : tensor(given.has_value() ? &*given : nullptr), name(called) {}
};

/// The elements from the first to behind the last; throws where two of a tensor that is written to are the same.
inline int64_t reach_of(const Tensor& t, const char* name, bool written) {
  if (t.is_contiguous()) return t.numel();
  std::vector<std::pair<int64_t, int64_t>> steps;  // (stride, size), the shortest first
  for (int64_t i = 0; i < t.dim(); ++i) steps.emplace_back(t.stride(i), t.size(i));
  std::ranges::sort(steps);
  int64_t reach = 1;
  for (const auto& [stride, size] : steps) {
    STD_TORCH_CHECK(!written || size == 1 || stride >= reach, name,
                    ": expected elements of their own, for they are written to, got strides ", shape_text(t.strides()));
    reach += stride * (size - 1);
  }
  return reach;
}

/// The bytes from an argument's first element to behind its last; none where it is absent or empty.
struct Bytes {
  intptr_t begin = 0, end = 0;

  Bytes(const Argument& argument, bool written) {
    if (argument.tensor == nullptr || argument.tensor->numel() == 0) return;
    const Tensor& t = *argument.tensor;
    begin = reinterpret_cast<intptr_t>(t.const_data_ptr());
    end = begin + reach_of(t, argument.name, written) * static_cast<int64_t>(t.element_size());
  }
};

/// No element of a tensor that is written to is another argument's, or lies there twice. Tensors that interleave are
/// not told from those that overlap: here they have been made dense, but for the state of a convolution.
template <size_t W, size_t R>
void check_unshared(const Argument (&written)[W], const Argument (&read)[R]) {
  std::vector<Bytes> bytes;
  for (const Argument& argument : written) bytes.emplace_back(argument, true);
  for (const Argument& argument : read) bytes.emplace_back(argument, false);
  for (size_t i = 0; i < W; ++i) {
    for (size_t j = i + 1; j < W + R; ++j) {
      STD_TORCH_CHECK(bytes[i].begin >= bytes[j].end || bytes[j].begin >= bytes[i].end, written[i].name,
                      ": expected memory of its own, for it is written to, got some that ",
                      j < W ? written[j].name : read[j - W].name, " has");
    }
  }
}

}  // namespace subquad
