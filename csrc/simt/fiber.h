// Fibers: computations with a stack of their own that give way to each other only where they ask to.
#pragma once

#include <cstddef>

namespace simt::detail {

/// One stack and the computation suspended on it. resume() and suspend() alternate, always on one OS thread.
class Fiber {
 public:
  using Entry = void (*)(void*);

  /// Nothing runs before the first resume(). `entry` must not return and must not let an exception out.
  Fiber(Entry entry, void* argument);
  /// Drops the computation without unwinding it.
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  /// Runs the fiber until it suspends itself.
  void resume();
  /// Called on the fiber: goes back to whoever resumed it.
  void suspend();

 private:
  static void start(Fiber* fiber);

  Entry entry_;
  void* argument_;
  char* mapping_;               // guard page, then the stack
  void* context_;               // where the fiber stands while it is suspended
  void* resumer_;               // where the resumer stands while the fiber runs
  void* fake_stack_ = nullptr;  // AddressSanitizer's bookkeeping, of the fiber and of the resumer's stack
  const void* resumer_stack_ = nullptr;
  std::size_t resumer_stack_bytes_ = 0;
};

}  // namespace simt::detail
