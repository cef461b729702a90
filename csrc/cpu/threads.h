// Work items on torch's threads, and large memory. Torch-free: threads.cpp asks torch.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>

namespace subquad::cpu {

int64_t thread_count();

/// worker(context, i) for i in [0, workers), on as many threads; the same thread has the same i each time.
void run_workers(int64_t workers, void (*worker)(void* context, int64_t index), void* context);

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
  const auto work = [&](int64_t) { worker(next); };
  run_workers(
      workers, [](void* context, int64_t index) { (*static_cast<decltype(work)*>(context))(index); },
      const_cast<void*>(static_cast<const void*>(&work)));
}

/// body(i) for i in [0, n), each exactly once, taken in turn by torch's threads; on one thread when the work is small.
template <class Body>
void parallel_items(int64_t n, bool small, const Body& body) {
  parallel_workers(n, small, [&](const auto& next) {
    for (int64_t i = next(); i < n; i = next()) body(i);
  });
}

/// body(i) likewise, but each thread has the same share of [0, n) in every call: for short work on memory that is still
/// in that core's cache from the call before.
template <class Body>
void parallel_shares(int64_t n, bool small, const Body& body) {
  const int64_t threads = small ? 1 : thread_count(), workers = n < threads ? n : threads;
  const auto work = [&](int64_t index) {
    for (int64_t i = n * index / workers; i < n * (index + 1) / workers; ++i) body(i);
  };
  if (workers <= 1) return workers == 1 ? work(0) : void();
  run_workers(
      workers, [](void* context, int64_t index) { (*static_cast<decltype(work)*>(context))(index); },
      const_cast<void*>(static_cast<const void*>(&work)));
}

/// Memory to work in, aligned to a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : memory_(::operator new(static_cast<size_t>(bytes), kCacheLine)) {}
  ~Scratch() { ::operator delete(memory_, kCacheLine); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* at(int64_t offset) const { return static_cast<char*>(memory_) + offset; }

 private:
  static constexpr std::align_val_t kCacheLine{64};
  void* memory_;
};

/// body(i, scratch) likewise; each thread has `bytes` of its own.
template <class Body>
void parallel_items_with_scratch(int64_t n, bool small, int64_t bytes, const Body& body) {
  parallel_workers(n, small, [&](const auto& next) {
    const Scratch scratch(bytes);
    for (int64_t i = next(); i < n; i = next()) body(i, scratch.at(0));
  });
}

}  // namespace subquad::cpu
