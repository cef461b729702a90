#include "scheduler.h"

#include <bit>
#include <cstring>
#include <numeric>

constinit thread_local uint3 threadIdx{0, 0, 0};
constinit thread_local uint3 blockIdx{0, 0, 0};
constinit thread_local dim3 blockDim{};
constinit thread_local dim3 gridDim{};

namespace simt::detail {
namespace {

/// Thrown through the threads of a block that failed, to run their destructors.
struct Unwind {};

// splitmix64, Steele, Lea and Flood (2014).
std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

unsigned random_bit(unsigned bits, std::uint64_t random) {
  const auto shift = static_cast<unsigned>(random & 31);
  return (static_cast<unsigned>(std::countr_zero(std::rotr(bits, static_cast<int>(shift)))) + shift) & 31;
}

bool same_place(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

}  // namespace

void Scheduler::run(const LaunchConfig& config, std::uint64_t seed, Body body, const void* args) {
  config_ = config;
  body_ = body;
  args_ = args;
  counters_ = {.launches = 1};
  ::blockDim = config.block;
  ::gridDim = config.grid;
  thread_count_ = config.block.x * config.block.y * config.block.z;
  prepare_threads();
  shared_memory_.begin_launch(config.shared_bytes);

  // Blocks come in the order first, first + stride, ... modulo their number, with a stride coprime to it.
  using Wide = unsigned __int128;
  const std::uint64_t x = config.grid.x, y = config.grid.y, blocks = x * y * config.grid.z;
  std::uint64_t stride = mix(seed) % blocks;
  while (std::gcd(stride, blocks) != 1) ++stride;
  std::uint64_t block = mix(~seed) % blocks;
  for (std::uint64_t i = 0; i < blocks; ++i) {
    const uint3 index{static_cast<unsigned>(block % x), static_cast<unsigned>(block / x % y),
                      static_cast<unsigned>(block / x / y)};
    run_block(index, mix(seed + mix(block)));
    block = static_cast<std::uint64_t>((Wide{block} + stride) % blocks);
  }
}

void Scheduler::prepare_threads() {
  while (threads_.size() < thread_count_) {
    threads_.push_back(std::make_unique<Thread>(this, static_cast<unsigned>(threads_.size())));
  }
  const dim3 block = config_.block;
  for (unsigned rank = 0; rank < thread_count_; ++rank) {
    thread(rank).index = {rank % block.x, rank / block.x % block.y, rank / block.x / block.y};
  }
}

void Scheduler::run_block(uint3 index, std::uint64_t seed) {
  ::blockIdx = index;
  random_state_ = seed;
  // A warp stays on until it has to wait, or changes at every step, or something between: each shows other races.
  constexpr std::uint64_t kStickiness[] = {0, 7, ~std::uint64_t{0}};
  stickiness_ = kStickiness[random() % 3];
  alive_ = thread_count_;
  ready_warps_ = 0;
  current_warp_ = 0;
  barrier_.arrived = 0;
  failure_ = nullptr;
  for (unsigned rank = 0; rank < thread_count_; rank += 32) {
    Warp& warp = warps_[rank / 32];
    warp.ready = warp.at_barrier = 0;
    warp.pending_count = 0;
    const unsigned lanes = thread_count_ - rank;
    set_ready(rank / 32, lanes >= 32 ? ~0u : (1u << lanes) - 1);
  }
  for (unsigned rank = 0; rank < thread_count_; ++rank) thread(rank).started = thread(rank).exited = false;
  shared_memory_.begin_block();

  while (alive_ > 0 && !failure_) {
    if (ready_warps_ == 0) {
      failure_ = std::make_exception_ptr(Error(deadlock_report()));
      break;
    }
    current_ = &pick();
    current_->started = true;
    ::threadIdx = current_->index;
    current_->fiber.resume();
  }
  if (failure_) {
    unwind_block();
    std::rethrow_exception(std::exchange(failure_, nullptr));
  }
  if (const char* name = shared_memory_.overrun()) {
    throw Error(block_name() + ": a write ran over the bounds of shared array `" + name + "`");
  }
}

// A fiber outlives the thread it runs: after one thread it waits for the next block's.
void Scheduler::thread_main(void* argument) {
  auto& self = *static_cast<Thread*>(argument);
  Scheduler& scheduler = *self.scheduler;
  for (;;) {
    try {
      scheduler.body_(scheduler.args_);
    } catch (const Unwind&) {
    } catch (...) {
      if (!scheduler.failure_) scheduler.failure_ = std::current_exception();
    }
    scheduler.thread_exited(self);
    self.fiber.suspend();
  }
}

void Scheduler::thread_exited(Thread& thread) {
  thread.exited = true;
  --alive_;
  if (barrier_.arrived > 0 && barrier_.arrived == alive_) release_barrier();
}

void Scheduler::unwind_block() {
  unwinding_ = true;
  barrier_.arrived = 0;
  for (unsigned rank = 0; rank < thread_count_; ++rank) {
    current_ = &thread(rank);
    if (current_->started && !current_->exited) current_->fiber.resume();
  }
  unwinding_ = false;
}

Scheduler::Thread& Scheduler::pick() {
  const std::uint64_t dice = random();
  const bool stay = (ready_warps_ >> current_warp_ & 1) && (dice >> 16 & stickiness_) != 0;
  if (!stay) current_warp_ = random_bit(ready_warps_, dice);
  Warp& warp = warps_[current_warp_];
  const unsigned lane = random_bit(warp.ready, dice >> 8);
  warp.ready &= ~(1u << lane);
  if (warp.ready == 0) ready_warps_ &= ~(1u << current_warp_);
  return thread(current_warp_ * 32 + lane);
}

void Scheduler::set_ready(unsigned warp, unsigned lanes) {
  warps_[warp].ready |= lanes;
  ready_warps_ |= 1u << warp;
}

void Scheduler::wait_here() {
  if (!unwinding_) current_->fiber.suspend();
  if (unwinding_) throw Unwind{};
}

void Scheduler::maybe_yield() {
  if (random() % 8 != 0) return;
  set_ready(current_->warp, 1u << current_->lane);
  wait_here();
}

int Scheduler::block_barrier(const char* name, int predicate, int (*reduce)(int, int), Site site) {
  Thread& self = *current_;
  self.wait = {name, 0, site};
  if (barrier_.arrived == 0) {
    barrier_.wait = self.wait;
    barrier_.value = predicate;
  } else if (!same_place(site, barrier_.wait.site)) {
    throw error("divergent barrier: this thread is at " + describe(self.wait) + " while " +
                std::to_string(barrier_.arrived) + " wait at " + describe(barrier_.wait));
  } else {
    barrier_.value = reduce(barrier_.value, predicate);
  }
  warps_[self.warp].at_barrier |= 1u << self.lane;
  if (++barrier_.arrived == alive_) release_barrier();
  wait_here();
  return barrier_.result;
}

void Scheduler::release_barrier() {
  for (unsigned warp = 0; warp * 32 < thread_count_; ++warp) {
    if (const unsigned lanes = std::exchange(warps_[warp].at_barrier, 0u)) set_ready(warp, lanes);
  }
  barrier_.arrived = 0;
  barrier_.result = barrier_.value;
  ++counters_.barriers;
}

unsigned Scheduler::vote(const char* name, unsigned mask, bool predicate, Site site) {
  return static_cast<unsigned>(warp_operation({name, mask, site}, predicate, 0, kNoLane));
}

std::uint64_t Scheduler::shuffle(const char* name, unsigned mask, std::uint64_t value, unsigned source, Site site) {
  return warp_operation({name, mask, site}, false, value, source);
}

std::uint64_t Scheduler::warp_operation(Wait call, bool predicate, std::uint64_t value, unsigned source) {
  Thread& self = *current_;
  Warp& warp = warps_[self.warp];
  self.wait = call;
  self.value = value;
  self.source = source;
  if (!(call.mask >> self.lane & 1)) throw error(describe(call) + " does not name the calling lane in its mask");

  int slot = 0;
  while (slot < warp.pending_count && warp.pending[slot].wait.mask != call.mask) ++slot;
  WarpOperation& operation = warp.pending[slot];
  if (slot == warp.pending_count) {
    operation = {call, 0, 0};
    ++warp.pending_count;
  } else if (!same_place(call.site, operation.wait.site)) {
    throw error("divergent warp: this thread is at " + describe(call) + " while lanes of its mask wait at " +
                describe(operation.wait));
  }
  operation.arrived |= 1u << self.lane;
  operation.ballot |= static_cast<unsigned>(predicate) << self.lane;
  if (operation.arrived == call.mask) {
    finish(operation, self.warp);
    operation = warp.pending[--warp.pending_count];
  }
  wait_here();
  return self.result;
}

void Scheduler::finish(const WarpOperation& operation, unsigned warp) {
  const unsigned mask = operation.wait.mask;
  for (unsigned lanes = mask; lanes != 0; lanes &= lanes - 1) {
    Thread& reader = thread(warp * 32 + static_cast<unsigned>(std::countr_zero(lanes)));
    if (reader.source == kNoLane) {
      reader.result = operation.ballot;
    } else if (mask >> reader.source & 1) {
      reader.result = thread(warp * 32 + reader.source).value;
    } else {
      throw error(
          describe(reader.wait) + " reads lane " + std::to_string(reader.source) + ", which its mask does not name",
          reader);
    }
  }
  set_ready(warp, mask);
}

void* Scheduler::static_shared(const void* identity, const char* name, std::size_t bytes, std::size_t alignment) {
  void* array = shared_memory_.static_array(identity, name, bytes, alignment);
  if (!array) {
    throw error("no room for shared array `" + std::string(name) + "` of " + std::to_string(bytes) +
                " bytes: static arrays may take 48 KiB, and 227 KiB with the dynamic memory");
  }
  return array;
}

std::uint64_t Scheduler::random() {
  random_state_ += 0x9e3779b97f4a7c15u;
  return mix(random_state_);
}

}  // namespace simt::detail
