// Work items on torch's threads, and large memory. Torch-free: threads.cpp asks torch.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>

namespace subquad::cpu {

int64_t thread_count();

/// worker(context) on `workers` threads.
void run_workers(int64_t workers, void (*worker)(void* context), void* context);

/// Ask for huge pages below new memory, where it is large: filling it then costs a few page faults instead of
/// thousands, which otherwise take longer than the filling.
void advise_huge_pages(const void* memory, int64_t bytes);

/// worker(next) on each of torch's threads, at most n of them; `next()` hands out 0 .. n - 1, each once, then n or
/// more.
template <class Worker>
void parallel_workers(int64_t n, bool small, const Worker& worker) {
  const int64_t threads = small ? 1 : thread_count(), workers = n < threads ? n : threads;
  std::atomic<int64_t> counter{0};
  const auto next = [&] { return counter.fetch_add(1); };
  if (workers <= 1) return worker(next);
  const auto work = [&] { worker(next); };
  run_workers(
      workers, [](void* context) { (*static_cast<decltype(work)*>(context))(); },
      const_cast<void*>(static_cast<const void*>(&work)));
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
