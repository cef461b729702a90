// Memory that is written to belongs to one argument alone. What `_checks.unshared` is in Python, for operators that
// move states on; both read alike.
#pragma once

#include <functional>
#include <numeric>
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

/// (stride, size) of the dimensions of more than one element, in bytes, the longest first; then an element.
using Steps = std::vector<std::pair<int64_t, int64_t>>;

inline Steps steps_of(const Tensor& t) {
  const auto element = static_cast<int64_t>(t.element_size());
  Steps steps;
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) > 1) steps.emplace_back(t.stride(i) * element, t.size(i));
  }
  std::ranges::sort(steps, std::greater{});
  steps.emplace_back(1, element);
  return steps;
}

/// Bytes from the first of `steps` to behind the last, those before `from` left out.
inline int64_t extent_of(const Steps& steps, size_t from = 0) {
  return std::accumulate(steps.begin() + static_cast<int64_t>(from), steps.end(), int64_t{1},
                         [](int64_t sum, const auto& step) { return sum + step.first * (step.second - 1); });
}

/// Whether some stride is too short for the dimensions within it.
inline bool overlaps_itself(const Steps& steps) {
  for (size_t i = 0; i + 1 < steps.size(); ++i) {
    if (steps[i].first < extent_of(steps, i + 1)) return true;
  }
  return false;
}

/// Whether the bytes of b from its dimension `from` on, which begin `distance` behind a's, are some of a's; true where
/// that is too hard to say.
inline bool meet(int64_t distance, const Steps& a, const Steps& b, size_t from = 0) {
  if (distance >= extent_of(a, from) || -distance >= extent_of(b, from)) return false;
  if (a.size() <= from + 1 || b.size() <= from + 1) return true;
  const int64_t stride = a[from].first;
  if (stride != b[from].first || extent_of(a, from + 1) > stride || extent_of(b, from + 1) > stride) return true;
  // Rows of the same length: b's begin somewhere in a row of a, and may reach into the next.
  const int64_t into = ((distance % stride) + stride) % stride;
  return meet(into, a, b, from + 1) || meet(into - stride, a, b, from + 1);
}

/// An argument's bytes, from its first element to behind its last.
struct Reach {
  intptr_t begin = 0, end = 0;

  explicit Reach(const Argument& argument) {
    if (argument.tensor == nullptr) return;
    const Tensor& t = *argument.tensor;
    begin = reinterpret_cast<intptr_t>(t.const_data_ptr());
    end = begin + (t.is_contiguous() ? t.numel() * static_cast<int64_t>(t.element_size()) : extent_of(steps_of(t)));
  }
};

inline void check_apart(const Argument& written, const Reach& reach, const Argument& other, const Reach& of_other) {
  if (reach.begin >= of_other.end || of_other.begin >= reach.end) return;
  STD_TORCH_CHECK(!meet(of_other.begin - reach.begin, steps_of(*written.tensor), steps_of(*other.tensor)), written.name,
                  ": expected memory of its own, for it is written to, got some that ", other.name, " has");
}

/// No element of a tensor that is written to is another argument's, or lies there twice. Slices of one buffer that
/// interleave are told apart from those that overlap.
template <size_t W, size_t R>
void check_unshared(const Argument (&written)[W], const Argument (&read)[R]) {
  std::vector<Reach> reaches(written, written + W), others(read, read + R);
  for (size_t i = 0; i < W; ++i) {
    const Tensor* t = written[i].tensor;
    if (t == nullptr) continue;
    STD_TORCH_CHECK(t->is_contiguous() || !overlaps_itself(steps_of(*t)), written[i].name,
                    ": expected elements of their own, for they are written to, got strides ",
                    shape_text(t->strides()));
    for (size_t j = i + 1; j < W; ++j) check_apart(written[i], reaches[i], written[j], reaches[j]);
    for (size_t j = 0; j < R; ++j) check_apart(written[i], reaches[i], read[j], others[j]);
  }
}

}  // namespace subquad
