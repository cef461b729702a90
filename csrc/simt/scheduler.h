// Runs the threads of a block as fibers, and makes barriers and warp operations meet.
#pragma once

#include <array>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "shared_memory.h"
#include "simt.h"

namespace simt::detail {

/// One emulated streaming multiprocessor with room for one block. Belongs to one OS thread.
class Scheduler {
 public:
  using Body = void (*)(const void*);

  /// Runs the whole grid. Fibers and their stacks are kept for the next launch.
  void run(const LaunchConfig& config, std::uint64_t seed, Body body, const void* args);

  // What kernels call, on the fiber of the current thread.
  int block_barrier(const char* name, int predicate, int (*reduce)(int, int), Site site);
  unsigned vote(const char* name, unsigned mask, bool predicate, Site site);
  std::uint64_t shuffle(const char* name, unsigned mask, std::uint64_t value, unsigned source, Site site);
  void* static_shared(const void* identity, const char* name, std::size_t bytes, std::size_t alignment);
  /// Lets other threads run first, now and then.
  void maybe_yield();
  unsigned lane() const { return current_->lane; }

  /// An error that names the kernel, the block and the current thread.
  Error error(const std::string& what) const { return error(what, *current_); }

  SharedMemory& shared_memory() { return shared_memory_; }
  Stats& counters() { return counters_; }

 private:
  /// A call that waits for other threads. `mask` is 0 for a block barrier.
  struct Wait {
    const char* name = nullptr;
    unsigned mask = 0;
    Site site;
  };

  struct Thread {
    Thread(Scheduler* scheduler, unsigned rank)
        : scheduler(scheduler), warp(rank / 32), lane(rank % 32), fiber(&Scheduler::thread_main, this) {}
    Scheduler* scheduler;
    unsigned warp, lane;
    uint3 index{};
    bool started = false, exited = false;
    Wait wait;                  // valid while the thread is not ready
    std::uint64_t value = 0;    // handed to a shuffle
    unsigned source = kNoLane;  // lane whose value a shuffle gives; none for a vote
    std::uint64_t result = 0;   // of the last warp operation
    Fiber fiber;
  };

  /// A warp operation that some lanes of its mask have reached.
  struct WarpOperation {
    Wait wait;
    unsigned arrived = 0, ballot = 0;
  };

  struct Warp {
    unsigned ready = 0, at_barrier = 0;  // lanes
    std::array<WarpOperation, 32> pending;
    int pending_count = 0;
  };

  struct Barrier {
    Wait wait;
    unsigned arrived = 0;
    int value = 0, result = 0;
  };

  static constexpr unsigned kNoLane = ~0u;

  static void thread_main(void* thread);

  void prepare_threads();
  void run_block(uint3 index, std::uint64_t seed);
  Thread& pick();
  void set_ready(unsigned warp, unsigned lanes);
  void wait_here();
  void thread_exited(Thread& thread);
  void release_barrier();
  std::uint64_t warp_operation(Wait call, bool predicate, std::uint64_t value, unsigned source);
  void finish(const WarpOperation& operation, unsigned warp);
  void unwind_block();
  std::uint64_t random();

  Thread& thread(unsigned rank) { return *threads_[rank]; }
  const Thread& thread(unsigned rank) const { return *threads_[rank]; }
  std::string deadlock_report() const;
  std::string absent_lanes(const Thread& waiting) const;
  std::string block_name() const;
  Error error(const std::string& what, const Thread& thread) const;
  static std::string describe(const Wait& wait);

  std::vector<std::unique_ptr<Thread>> threads_;  // by rank in the block; never shrinks
  std::array<Warp, 32> warps_;
  Barrier barrier_;
  SharedMemory shared_memory_;
  Stats counters_;

  LaunchConfig config_{};
  Body body_ = nullptr;
  const void* args_ = nullptr;
  unsigned thread_count_ = 0;
  unsigned alive_ = 0;        // threads that have not exited
  unsigned ready_warps_ = 0;  // warps with a ready lane
  Thread* current_ = nullptr;
  unsigned current_warp_ = 0;
  std::uint64_t random_state_ = 0, stickiness_ = 0;
  std::exception_ptr failure_;
  bool unwinding_ = false;
};

}  // namespace simt::detail
