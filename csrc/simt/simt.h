// SIMT emulator: the CUDA vocabulary for a host compiler. Every CUDA thread is a fiber, blocks run one after another on
// the calling thread, and the order in which warps and lanes resume is drawn from a seed. See README.md in this folder.
#pragma once

#include <bit>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>

// `__shared__` and `__constant__` are left undefined on purpose: use SQ_SHARED and kernel arguments.
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern constinit thread_local uint3 threadIdx;
extern constinit thread_local uint3 blockIdx;
extern constinit thread_local dim3 blockDim;
extern constinit thread_local dim3 gridDim;
inline constexpr int warpSize = 32;

// ------------------------------------------------------------------------------------------------------- host
// interface

namespace simt {

using Site = std::source_location;

/// A fault of a kernel or of its launch; the message names kernel, block and thread.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// What launches did. Bytes count what moved through sq::load*, sq::store* and atomics on global memory.
struct Stats {
  std::uint64_t load_bytes = 0;
  std::uint64_t store_bytes = 0;
  std::uint64_t launches = 0;
  std::uint64_t barriers = 0;  ///< completed block barriers
};

struct LaunchConfig {
  const char* kernel;
  dim3 grid;
  dim3 block;
  std::size_t shared_bytes;
};

/// Seed of every later launch in this process. The same seed gives the same schedule.
void set_seed(std::uint64_t seed);

/// Totals of this process since the start or the last reset; failed launches count what they did.
Stats stats();
void reset_stats();

/// The most recent launch of the calling OS thread.
Stats last_launch();

/// While any scope lives on this OS thread, global accesses outside all scoped memory are errors.
class MemoryScope {
 public:
  MemoryScope(const void* begin, std::size_t bytes);
  ~MemoryScope();
  MemoryScope(const MemoryScope&) = delete;
  MemoryScope& operator=(const MemoryScope&) = delete;
};

namespace detail {

void launch(const LaunchConfig& config, void (*body)(const void*), const void* args);

void* static_shared(const void* identity, const char* name, std::size_t bytes, std::size_t alignment);
void* dynamic_shared();
void global_access(const void* address, std::size_t bytes, bool is_store);
void atomic_access(const void* address, std::size_t bytes);

unsigned lane();
int block_barrier(const char* name, int predicate, int (*reduce)(int, int), Site site);
unsigned vote(const char* name, unsigned mask, bool predicate, Site site);
std::uint64_t shuffle(const char* name, unsigned mask, std::uint64_t value, unsigned source, Site site);
[[noreturn]] void fault(const char* what, Site site);

}  // namespace detail

/// Runs the kernel to its end on the calling OS thread.
///
/// Raises: Error for a refused launch, a deadlock, a divergent barrier or a faulty access; any exception a kernel
/// throws.
template <class... Params, class... Args>
void launch(const LaunchConfig& config, void (*kernel)(Params...), Args&&... args) {
  using Call = std::pair<void (*)(Params...), std::tuple<std::remove_cv_t<Params>...>>;
  const Call call{kernel, {static_cast<Params>(std::forward<Args>(args))...}};
  detail::launch(
      config,
      [](const void* c) { std::apply(static_cast<const Call*>(c)->first, static_cast<const Call*>(c)->second); },
      &call);
}

}  // namespace simt

// ------------------------------------------------------------------------------------------- barriers, votes, shuffles

inline void __syncthreads(simt::Site site = simt::Site::current()) {
  simt::detail::block_barrier("__syncthreads", 0, [](int a, int) { return a; }, site);
}
inline int __syncthreads_or(int predicate, simt::Site site = simt::Site::current()) {
  return simt::detail::block_barrier("__syncthreads_or", predicate != 0, [](int a, int b) { return a | b; }, site);
}
inline int __syncthreads_and(int predicate, simt::Site site = simt::Site::current()) {
  return simt::detail::block_barrier("__syncthreads_and", predicate != 0, [](int a, int b) { return a & b; }, site);
}
inline int __syncthreads_count(int predicate, simt::Site site = simt::Site::current()) {
  return simt::detail::block_barrier("__syncthreads_count", predicate != 0, [](int a, int b) { return a + b; }, site);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Site site = simt::Site::current()) {
  simt::detail::vote("__syncwarp", mask, false, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
  return simt::detail::vote("__ballot_sync", mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
  return simt::detail::vote("__any_sync", mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
  return simt::detail::vote("__all_sync", mask, predicate != 0, site) == mask;
}
/// CUDA promises no more than the calling lane; code that relies on more is wrong, and fails here.
inline unsigned __activemask() { return 1u << simt::detail::lane(); }

namespace simt::detail {

template <class T>
concept Shuffled = std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

template <Shuffled T>
T shuffle_as(const char* name, unsigned mask, T value, unsigned source, Site site) {
  using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  return std::bit_cast<T>(static_cast<Bits>(shuffle(name, mask, std::bit_cast<Bits>(value), source, site)));
}

/// First lane of the caller's segment of `width` lanes.
inline unsigned segment(int width, Site site) {
  if (width < 1 || width > 32 || (width & (width - 1))) fault("shuffle width is not a power of two in [1, 32]", site);
  return lane() & ~static_cast<unsigned>(width - 1);
}

}  // namespace simt::detail

template <simt::detail::Shuffled T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, simt::Site site = simt::Site::current()) {
  const unsigned from = simt::detail::segment(width, site) | (static_cast<unsigned>(source) & (width - 1));
  return simt::detail::shuffle_as("__shfl_sync", mask, value, from, site);
}
template <simt::detail::Shuffled T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Site site = simt::Site::current()) {
  const unsigned lane = simt::detail::lane(), first = simt::detail::segment(width, site);
  return simt::detail::shuffle_as("__shfl_up_sync", mask, value, delta > lane - first ? lane : lane - delta, site);
}
template <simt::detail::Shuffled T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Site site = simt::Site::current()) {
  const unsigned lane = simt::detail::lane(), last = simt::detail::segment(width, site) + width - 1;
  return simt::detail::shuffle_as("__shfl_down_sync", mask, value, delta > last - lane ? lane : lane + delta, site);
}
template <simt::detail::Shuffled T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, simt::Site site = simt::Site::current()) {
  const unsigned lane = simt::detail::lane(), last = simt::detail::segment(width, site) + width - 1;
  const unsigned from = lane ^ static_cast<unsigned>(lane_mask);
  return simt::detail::shuffle_as("__shfl_xor_sync", mask, value, from > last ? lane : from, site);
}

// ------------------------------------------------------------------------------------------------------------- atomics

namespace simt::detail {

template <class T, class... Types>
concept OneOf = (std::same_as<T, Types> || ...);

// Fibers cannot interrupt each other, so a plain read-modify-write is atomic.
template <class T, class Update>
T atomic(T* address, Update update) {
  atomic_access(address, sizeof(T));
  const T old = *address;
  *address = update(old);
  return old;
}

template <class T>
T wrapping_add(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    using U = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<U>(a) + static_cast<U>(b));
  } else {
    return a + b;
  }
}

}  // namespace simt::detail

// The types are those CUDA accepts; note that uint64_t is `unsigned long` on Linux, which it does not.
template <simt::detail::OneOf<int, unsigned, unsigned long long, float, double> T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return simt::detail::atomic(address, [=](T old) { return simt::detail::wrapping_add(old, value); });
}
template <simt::detail::OneOf<int, unsigned, long long, unsigned long long> T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return simt::detail::atomic(address, [=](T old) { return old > value ? old : value; });
}
template <simt::detail::OneOf<int, unsigned, long long, unsigned long long> T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return simt::detail::atomic(address, [=](T old) { return old < value ? old : value; });
}
template <simt::detail::OneOf<int, unsigned, unsigned long long> T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return simt::detail::atomic(address, [=](T old) { return old | value; });
}
template <simt::detail::OneOf<int, unsigned, unsigned long long, float> T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return simt::detail::atomic(address, [=](T) { return value; });
}
template <simt::detail::OneOf<int, unsigned, unsigned long long> T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return simt::detail::atomic(address, [=](T old) { return old == compare ? value : old; });
}

inline void __threadfence() {}
inline void __threadfence_block() {}

// --------------------------------------------------------------------------------------------------------- arithmetic

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline int __ffsll(long long x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(x)) + 1; }

inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }

template <std::integral T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <std::integral T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
