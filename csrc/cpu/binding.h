// What the CPU bindings share: element types, checks that protect memory, and threads. Only torch's stable headers.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <optional>

#include "common/dtype.h"

namespace subquad::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kHalf;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}

inline void check_contiguous(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

/// Distance between thresholds of neighbouring neurons: 0 for a single one.
inline int64_t threshold_stride(const Tensor& threshold, int64_t neurons) {
  STD_TORCH_CHECK(threshold.scalar_type() == ScalarType::Float, "threshold: expected float32");
  STD_TORCH_CHECK(threshold.dim() == 1 && (threshold.size(0) == 1 || threshold.size(0) == neurons),
                  "threshold: expected shape [1] or [", neurons, "]");
  return threshold.size(0) == 1 ? 0 : threshold.stride(0);
}

inline Tensor empty(std::initializer_list<int64_t> size, ScalarType dtype) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(size.begin(), size.size()), dtype);
}

/// Ask for huge pages below a large new tensor: filling it then costs a few page faults instead of thousands, which
/// otherwise take longer than the filling.
inline void advise_huge_pages(const Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 12, kWorthwhile = uintptr_t{1} << 23;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(tensor.numel()) * tensor.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (end - begin >= kWorthwhile) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

/// worker(next) on each of torch's threads, at most n of them; `next()` hands out 0 .. n - 1, each once, then n or
/// more.
template <class Worker>
void parallel_workers(int64_t n, bool small, const Worker& worker) {
  const int64_t workers = small ? 1 : std::min<int64_t>(n, torch::stable::get_num_threads());
  std::atomic<int64_t> counter{0};
  const auto next = [&] { return counter.fetch_add(1); };
  if (workers <= 1) return worker(next);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) { worker(next); });
}

/// body(i) for i in [0, n), each exactly once, taken in turn by torch's threads; on one thread when the work is small.
template <class Body>
void parallel_items(int64_t n, bool small, const Body& body) {
  parallel_workers(n, small, [&](const auto& next) {
    for (int64_t i = next(); i < n; i = next()) body(i);
  });
}

/// body(i, scratch) likewise; each thread has `bytes` of its own, aligned to a cache line.
template <class Body>
void parallel_items_with_scratch(int64_t n, bool small, int64_t bytes, const Body& body) {
  constexpr std::align_val_t kCacheLine{64};
  parallel_workers(n, small, [&](const auto& next) {
    void* scratch = ::operator new(static_cast<size_t>(bytes), kCacheLine);
    for (int64_t i = next(); i < n; i = next()) body(i, scratch);
    ::operator delete(scratch, kCacheLine);
  });
}

}  // namespace subquad::cpu
