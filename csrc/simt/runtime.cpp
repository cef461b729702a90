// Launches, statistics, checks of global accesses, and the C interface.
#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "scheduler.h"
#include "simt.h"

namespace simt {
namespace {

std::atomic<std::uint64_t> process_seed{1};
std::atomic<std::uint64_t> total_load_bytes, total_store_bytes, total_launches, total_barriers;

constinit thread_local detail::Scheduler* running = nullptr;  // set while a launch is under way
thread_local Stats latest;

struct Region {
  const MemoryScope* owner;
  std::uintptr_t begin;
  std::size_t bytes;
};
thread_local std::vector<Region> regions;

void add(const Stats& launch) {
  latest = launch;
  total_load_bytes += launch.load_bytes;
  total_store_bytes += launch.store_bytes;
  total_launches += launch.launches;
  total_barriers += launch.barriers;
}

std::string to_string(dim3 d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

void check_limits(const LaunchConfig& config) {
  const auto refuse = [&](const std::string& why) {
    throw Error("launch of kernel " + std::string(config.kernel) + " refused: " + why);
  };
  const dim3 grid = config.grid, block = config.block;
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    refuse("grid must be in [1, 2^31) x [1, 65535] x [1, 65535], got " + to_string(grid));
  }
  if (block.x < 1 || block.y < 1 || block.z < 1 || block.x > 1024 || block.y > 1024 || block.z > 64 ||
      block.x * block.y * block.z > 1024) {
    refuse("block must be in [1, 1024] x [1, 1024] x [1, 64] with at most 1024 threads, got " + to_string(block));
  }
  if (config.shared_bytes > detail::SharedMemory::kCapacity) {
    refuse("dynamic shared memory must be at most 232448 bytes, got " + std::to_string(config.shared_bytes));
  }
}

}  // namespace

void set_seed(std::uint64_t seed) { process_seed = seed; }

Stats stats() { return {total_load_bytes, total_store_bytes, total_launches, total_barriers}; }

void reset_stats() { total_load_bytes = total_store_bytes = total_launches = total_barriers = 0; }

Stats last_launch() { return latest; }

MemoryScope::MemoryScope(const void* begin, std::size_t bytes) {
  regions.push_back({this, reinterpret_cast<std::uintptr_t>(begin), bytes});
}

MemoryScope::~MemoryScope() {
  std::erase_if(regions, [this](const Region& region) { return region.owner == this; });
}

namespace detail {
namespace {

// Emulated device code may only run inside a launch.
Scheduler& scheduler() {
  if (!running) throw Error("device code was called outside of a kernel");
  return *running;
}

// Checks one access and tells whether it goes to global memory.
bool check_access(const void* address, std::size_t bytes, const char* what) {
  const auto begin = reinterpret_cast<std::uintptr_t>(address);
  const auto refuse = [&](const std::string& why) {
    throw scheduler().error(std::string(what) + " of " + std::to_string(bytes) + " bytes at " + std::to_string(begin) +
                            " " + why);
  };
  if (begin % bytes != 0) refuse("is misaligned: address modulo size is " + std::to_string(begin % bytes));
  if (begin < 4096) refuse("goes through a null pointer");
  if (scheduler().shared_memory().contains(address)) return false;
  const auto holds = [&](const Region& r) { return begin - r.begin < r.bytes && bytes <= r.bytes - (begin - r.begin); };
  if (!regions.empty() && std::none_of(regions.begin(), regions.end(), holds)) {
    refuse("is outside of the memory of this launch");
  }
  return true;
}

}  // namespace

void launch(const LaunchConfig& config, void (*body)(const void*), const void* args) {
  check_limits(config);
  if (running) throw Error("kernel " + std::string(config.kernel) + " was launched from inside a kernel");
  static thread_local Scheduler scheduler;
  struct Finally {
    ~Finally() {
      running = nullptr;
      add(scheduler.counters());
    }
  } finally;
  running = &scheduler;
  scheduler.run(config, process_seed, body, args);
}

void* static_shared(const void* identity, const char* name, std::size_t bytes, std::size_t alignment) {
  return scheduler().static_shared(identity, name, bytes, alignment);
}

void* dynamic_shared() { return scheduler().shared_memory().dynamic(); }

void global_access(const void* address, std::size_t bytes, bool is_store) {
  if (!check_access(address, bytes, is_store ? "global store" : "global load")) {
    throw scheduler().error("a global load or store was given an address in shared memory");
  }
  Stats& counters = running->counters();
  (is_store ? counters.store_bytes : counters.load_bytes) += bytes;
}

void atomic_access(const void* address, std::size_t bytes) {
  if (check_access(address, bytes, "atomic")) {
    running->counters().load_bytes += bytes;
    running->counters().store_bytes += bytes;
  }
  running->maybe_yield();
}

unsigned lane() { return scheduler().lane(); }

int block_barrier(const char* name, int predicate, int (*reduce)(int, int), Site site) {
  return scheduler().block_barrier(name, predicate, reduce, site);
}

unsigned vote(const char* name, unsigned mask, bool predicate, Site site) {
  return scheduler().vote(name, mask, predicate, site);
}

std::uint64_t shuffle(const char* name, unsigned mask, std::uint64_t value, unsigned source, Site site) {
  return scheduler().shuffle(name, mask, value, source, site);
}

void fault(const char* what, Site site) {
  throw scheduler().error(std::string(what) + " (" + site.file_name() + ":" + std::to_string(site.line()) + ")");
}

}  // namespace detail
}  // namespace simt

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

SIMT_EXPORT void subquad_simt_set_seed(std::uint64_t seed) { simt::set_seed(seed); }

SIMT_EXPORT void subquad_simt_reset_stats() { simt::reset_stats(); }

/// Totals: bytes loaded, bytes stored, launches, block barriers.
SIMT_EXPORT void subquad_simt_stats(std::uint64_t out[4]) {
  const simt::Stats total = simt::stats();
  out[0] = total.load_bytes;
  out[1] = total.store_bytes;
  out[2] = total.launches;
  out[3] = total.barriers;
}
