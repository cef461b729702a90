// Kernels and launches that are wrong on purpose: each must be caught.
#include <cmath>
#include <memory>

#include "check.h"

namespace {

constexpr unsigned kFull = 0xffffffffu;
constexpr int kSeeds = 32;

// Hides from the compiler which array a pointer points into, so that bounds are left to AddressSanitizer.
template <class T>
T* opaque(T* p) {
  asm volatile("" : "+r"(p));
  return p;
}

// ---------------------------------------------------------------------------------------------- missing
// synchronisation

template <bool correct>
__global__ void reverse(int* out) {
  SQ_SHARED(int, value, 64);
  const int i = static_cast<int>(threadIdx.x);
  value[i] = i;
  if constexpr (correct) __syncthreads();
  out[i] = value[63 - i];
}

template <bool correct>
bool reverse_is_wrong() {
  int out[64];
  SQ_LAUNCH((reverse<correct>), 1, 64, 0, nullptr, out);
  for (int i = 0; i < 64; ++i) {
    if (out[i] != 63 - i) return true;
  }
  return false;
}

CASE(missing_barrier) {
  CHECK_EQ(seeds_where(kSeeds, reverse_is_wrong<true>), 0);
  CHECK_EQ(seeds_where(kSeeds, reverse_is_wrong<false>), kSeeds);
}

// The second barrier keeps a fast warp from overwriting what a slow one still has to read.
template <bool correct>
__global__ void rotate_rounds(int* out, int rounds) {
  SQ_SHARED(int, value, 128);
  const int i = static_cast<int>(threadIdx.x);
  int mine = i;
  for (int round = 0; round < rounds; ++round) {
    value[i] = mine;
    __syncthreads();
    mine = value[(i + 33) % 128];
    if constexpr (correct) __syncthreads();
  }
  out[i] = mine;
}

template <bool correct>
bool rotation_is_wrong() {
  int out[128];
  SQ_LAUNCH((rotate_rounds<correct>), 1, 128, 0, nullptr, out, 3);
  for (int i = 0; i < 128; ++i) {
    if (out[i] != (i + 99) % 128) return true;
  }
  return false;
}

CASE(missing_barrier_before_overwriting) {
  CHECK_EQ(seeds_where(kSeeds, rotation_is_wrong<true>), 0);
  CHECK(seeds_where(kSeeds, rotation_is_wrong<false>) > kSeeds / 2);
}

// Warps that meet in warp operations only: nothing keeps the reader behind the writer.
template <bool correct>
__global__ void handed_to_next_warp(int* out) {
  SQ_SHARED(int, value, 1);
  if (threadIdx.x < 32) {
    for (int i = 0; i < 4; ++i) __syncwarp();
    if (threadIdx.x == 0) value[0] = 5;
  }
  if constexpr (correct) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  if (threadIdx.x == 32) out[0] = value[0];
}

template <bool correct>
bool hand_over_is_wrong() {
  int out = 0;
  SQ_LAUNCH((handed_to_next_warp<correct>), 1, 64, 0, nullptr, &out);
  return out != 5;
}

CASE(warp_barrier_instead_of_block_barrier) {
  CHECK_EQ(seeds_where(kSeeds, hand_over_is_wrong<true>), 0);
  CHECK(seeds_where(kSeeds, hand_over_is_wrong<false>) > 0);
}

template <bool correct>
__global__ void warp_exchange(int* out) {
  SQ_SHARED(int, value, 32);
  const int lane = static_cast<int>(threadIdx.x);
  int mine = lane;
  for (int offset = 16; offset > 0; offset /= 2) {
    value[lane] = mine;
    __syncwarp();
    mine += value[lane ^ offset];
    if constexpr (correct) __syncwarp();
  }
  out[lane] = mine;
}

template <bool correct>
bool exchange_is_wrong() {
  int out[32];
  SQ_LAUNCH((warp_exchange<correct>), 1, 32, 0, nullptr, out);
  for (int value : out) {
    if (value != 496) return true;
  }
  return false;
}

CASE(missing_syncwarp) {
  CHECK_EQ(seeds_where(kSeeds, exchange_is_wrong<true>), 0);
  CHECK(seeds_where(kSeeds, exchange_is_wrong<false>) > kSeeds / 2);
}

__global__ void add_in_any_order(float* sum) { atomicAdd(sum, threadIdx.x == 0 ? 1e8f : 1.0f); }

CASE(float_atomics_depend_on_the_order) {
  CHECK(seeds_where(kSeeds, [] {
          float sum = 0.0f, first = 0.0f;
          SQ_LAUNCH(add_in_any_order, 1, 256, 0, nullptr, &sum);
          simt::set_seed(1000);
          SQ_LAUNCH(add_in_any_order, 1, 256, 0, nullptr, &first);
          return sum != first;
        }) > 0);
}

__global__ void chain_of_blocks(int* value) { value[blockIdx.x + 1] = value[blockIdx.x] + 1; }

CASE(block_that_relies_on_an_earlier_block) {
  CHECK(seeds_where(kSeeds, [] {
          int value[9] = {};
          SQ_LAUNCH(chain_of_blocks, 8, 1, 0, nullptr, value);
          return value[8] != 8;
        }) > kSeeds / 2);
}

// ------------------------------------------------------------------------------------------- unwritten shared memory

__global__ void unwritten_static(float* out, int* large) {
  SQ_SHARED(float, single, 3);
  SQ_SHARED(double, twice, 3);
  SQ_SHARED(sq::bf16, brain, 3);
  SQ_SHARED(sq::fp16, half, 3);
  SQ_SHARED(int, word, 3);
  out[0] = single[2];
  out[1] = static_cast<float>(twice[1]);
  out[2] = sq::to_float(brain[1]);
  out[3] = sq::to_float(half[2]);
  large[0] = word[0];
}

__global__ void unwritten_dynamic(float* out) {
  SQ_DYNAMIC_SHARED(float, value);
  if (blockIdx.x == 0) value[threadIdx.x] = 1.0f;  // must not be seen by the other blocks
  out[blockIdx.x * blockDim.x + threadIdx.x] = value[threadIdx.x];
}

CASE(unwritten_shared_memory) {
  for_seeds(4, [] {
    float out[4];
    int large;
    SQ_LAUNCH(unwritten_static, 1, 1, 0, nullptr, out, &large);
    for (float value : out) CHECK(std::isnan(value));
    CHECK(large > 1'000'000'000);
    float seen[3 * 64];
    SQ_LAUNCH(unwritten_dynamic, 3, 64, 64 * sizeof(float), nullptr, seen);
    for (int i = 0; i < 3 * 64; ++i) CHECK_EQ(std::isnan(seen[i]), i >= 64);
  });
}

// ------------------------------------------------------------------------------------------------------ out of bounds

__global__ void write_shared(int index) {
  SQ_SHARED(float, guarded, 33);
  opaque(&guarded[0])[index] = 1.0f;
  __syncthreads();
}

__global__ void write_dynamic(int index) {
  SQ_DYNAMIC_SHARED(float, value);
  SQ_SHARED(float, other, 8);
  other[0] = 0.0f;
  value[index] = 1.0f;
}

__global__ void read_shared(int index, float* out) {
  SQ_SHARED(float, value, 33);
  value[threadIdx.x] = 0.0f;
  out[0] = opaque(&value[0])[index];
}

void overrun_shared(int index) { SQ_LAUNCH(write_shared, 1, 32, 0, nullptr, index); }
void overrun_dynamic(int index) { SQ_LAUNCH(write_dynamic, 1, 1, 40 * sizeof(float), nullptr, index); }

CASE(shared_overrun_is_seen_by_the_redzone) {
  if (kSanitized) return;  // stops earlier, see below
  for (int index : {33, 60, -1, -20}) {
    check_contains(error_of([=] { overrun_shared(index); }),
                   {"write_shared", "block (0, 0, 0)", "bounds of shared array"});
  }
  check_contains(error_of([] { overrun_shared(33); }), {"`guarded`"});
  check_contains(error_of([] { overrun_dynamic(40); }), {"write_dynamic", "dynamic shared memory"});
  float out = 0.0f;
  SQ_LAUNCH(read_shared, 1, 1, 0, nullptr, 34, &out);
  CHECK(std::isnan(out));
}

FATAL(shared_write_past_the_end, "use-after-poison") {
  SQ_LAUNCH(write_shared, 1, 32, 0, nullptr, 32);  // the last element is fine
  overrun_shared(33);
}
FATAL(shared_write_before_the_start, "use-after-poison") { overrun_shared(-1); }
FATAL(dynamic_write_past_the_end, "use-after-poison") { overrun_dynamic(40); }
FATAL(shared_read_past_the_end, "use-after-poison") {
  float out;
  SQ_LAUNCH(read_shared, 1, 1, 0, nullptr, 40, &out);
}

__global__ void load_vec_at(const float* x, float* out, int index) { out[0] = sq::load_vec<4>(x + index).v[0]; }

template <bool checked>
__global__ void read_global(const float* x, float* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i <= n) out[0] += checked ? sq::load(x + i) : x[i];  // off by one
}

CASE(global_read_outside_of_the_scope) {
  const auto x = std::make_unique<float[]>(100);
  float out = 0.0f;
  const auto run = [&](int n) { SQ_LAUNCH((read_global<true>), 4, 32, 0, nullptr, x.get(), &out, n); };
  const simt::MemoryScope other(&out, sizeof(out)), scope(x.get(), 100 * sizeof(float));
  run(99);
  check_contains(error_of([&] { run(100); }), {"read_global<true>", "block (3, 0, 0), thread (4, 0, 0)",
                                               "global load of 4 bytes", "outside of the memory of this launch"});
}

CASE(vector_load_across_the_end_of_the_scope) {
  alignas(16) float x[4] = {};
  float out = 0.0f;
  const simt::MemoryScope results(&out, sizeof(out)), scope(x, 3 * sizeof(float));
  check_contains(error_of([&] { SQ_LAUNCH(load_vec_at, 1, 1, 0, nullptr, x, &out, 0); }),
                 {"global load of 16 bytes", "outside of the memory of this launch"});
}

FATAL(global_read_past_the_end, "heap-buffer-overflow") {
  const auto x = std::make_unique<float[]>(100);
  float out = 0.0f;
  SQ_LAUNCH((read_global<true>), 4, 32, 0, nullptr, x.get(), &out, 100);
}
FATAL(plain_global_read_past_the_end, "heap-buffer-overflow") {
  const auto x = std::make_unique<float[]>(100);
  float out = 0.0f;
  SQ_LAUNCH((read_global<false>), 4, 32, 0, nullptr, x.get(), &out, 100);
}

__global__ void overrun_local(int index, int* out) {
  int local[8] = {};
  __syncthreads();
  out[0] = opaque(&local[0])[index];
}

FATAL(local_array_past_the_end, "stack-buffer-overflow") {
  int out;
  SQ_LAUNCH(overrun_local, 1, 64, 0, nullptr, 8, &out);
}

__global__ void overflow(int* out, int value) { out[0] = value * static_cast<int>(blockDim.x); }

FATAL(signed_overflow, "signed integer overflow") {
  int out;
  SQ_LAUNCH(overflow, 1, 64, 0, nullptr, &out, 1 << 28);
}

__global__ void store_vec_at(float* x, int index) { sq::store_vec(x + index, sq::Vec<float, 2>{{1.0f, 2.0f}}); }
__global__ void load_null(const float* x, float* out) { out[0] = sq::load(x + threadIdx.x); }
__global__ void load_from_shared(float* out) {
  SQ_SHARED(float, value, 1);
  value[0] = 0.0f;
  out[0] = sq::load(value);
}

CASE(bad_addresses) {
  alignas(16) float x[16] = {};
  float out;
  SQ_LAUNCH(load_vec_at, 1, 1, 0, nullptr, x, &out, 4);
  check_contains(error_of([&] { SQ_LAUNCH(load_vec_at, 1, 1, 0, nullptr, x, &out, 6); }),
                 {"load_vec_at", "global load of 16 bytes", "misaligned", "is 8"});
  check_contains(error_of([&] { SQ_LAUNCH(store_vec_at, 1, 1, 0, nullptr, x, 3); }),
                 {"global store of 8 bytes", "misaligned"});
  check_contains(error_of([&] { SQ_LAUNCH(load_null, 1, 8, 0, nullptr, nullptr, &out); }),
                 {"load_null", "null pointer"});
  check_contains(error_of([&] { SQ_LAUNCH(load_from_shared, 1, 1, 0, nullptr, &out); }), {"address in shared memory"});
}

// ---------------------------------------------------------------------------------------------------------- deadlocks

const std::string kFile = "test_faults.cpp:";

constexpr int kLineOfFirstBarrier = __LINE__ + 3;
__global__ void two_barriers() {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

CASE(divergent_barrier) {
  for_seeds(4, [] {
    check_contains(error_of([] { SQ_LAUNCH(two_barriers, 3, 64, 0, nullptr); }),
                   {"kernel two_barriers, block (", "thread (", "divergent barrier", "__syncthreads",
                    kFile + std::to_string(kLineOfFirstBarrier), kFile + std::to_string(kLineOfFirstBarrier + 2)});
  });
}

constexpr int kLineOfShuffle = __LINE__ + 4;
__global__ void barrier_and_shuffle(float* out) {
  float value = 1.0f;
  if (threadIdx.x >= 30) __syncthreads();
  value += __shfl_xor_sync(kFull, value, 1);
  out[threadIdx.x] = value;
}

CASE(barrier_against_shuffle) {
  for_seeds(4, [] {
    float out[64];
    check_contains(
        error_of([&] { SQ_LAUNCH(barrier_and_shuffle, dim3(1, 2), 64, 0, nullptr, out); }),
        {"deadlock in kernel barrier_and_shuffle, block (0, ", "30 wait at __shfl_xor_sync with mask 0xffffffff",
         kFile + std::to_string(kLineOfShuffle), "thread (0, 0, 0)", "absent: lane 30 waits at __syncthreads",
         "34 wait at __syncthreads", kFile + std::to_string(kLineOfShuffle - 1), "thread (30, 0, 0)"});
  });
}

__global__ void shuffle_after_exit(int* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(kFull, 1, 1);
}
__global__ void full_mask(int* out) { out[threadIdx.x] = static_cast<int>(__ballot_sync(kFull, 1)); }
__global__ void foreign_mask(int* out) { out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 0); }
__global__ void read_beyond_mask(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1, 16);
}
__global__ void odd_width(int* out) { out[threadIdx.x] = __shfl_sync(kFull, 1, 0, 12); }
__global__ void two_shuffles(int* out) {
  out[threadIdx.x] = threadIdx.x < 7 ? __shfl_sync(kFull, 1, 0) : __shfl_sync(kFull, 2, 0);
}
__global__ void converged_hopefully(int* out) {
  if (threadIdx.x % 2 == 0) out[threadIdx.x] = __shfl_sync(__activemask(), 1, 0);
}

CASE(masks_that_name_the_wrong_lanes) {
  for_seeds(4, [] {
    int out[32];
    check_contains(error_of([&] { SQ_LAUNCH(shuffle_after_exit, 1, 32, 0, nullptr, out); }),
                   {"deadlock", "shuffle_after_exit", "absent: lane 5 has exited", "1 have exited"});
    check_contains(error_of([&] { SQ_LAUNCH(full_mask, 1, 24, 0, nullptr, out); }),
                   {"deadlock", "__ballot_sync", "absent: lane 24 does not exist", "4 lanes more"});
    check_contains(error_of([&] { SQ_LAUNCH(foreign_mask, 1, 32, 0, nullptr, out); }),
                   {"__shfl_sync with mask 0xffff", "does not name the calling lane"});
    check_contains(error_of([&] { SQ_LAUNCH(read_beyond_mask, 1, 32, 0, nullptr, out); }),
                   {"thread (0, 0, 0)", "reads lane 16, which its mask does not name"});
    check_contains(error_of([&] { SQ_LAUNCH(odd_width, 1, 32, 0, nullptr, out); }), {"width is not a power of two"});
    check_contains(error_of([&] { SQ_LAUNCH(two_shuffles, 1, 32, 0, nullptr, out); }),
                   {"divergent warp", "__shfl_sync"});
    check_contains(error_of([&] { SQ_LAUNCH(converged_hopefully, 1, 32, 0, nullptr, out); }),
                   {"reads lane 0, which its mask does not name"});
  });
}

// ---------------------------------------------------------------------------------- what a failed launch leaves behind

int live_objects = 0;

struct Counted {
  Counted() { ++live_objects; }
  ~Counted() { --live_objects; }
};

__global__ void throws_late(int* out) {
  const Counted counted;
  __syncthreads();
  if (threadIdx.x == 9) throw std::out_of_range("thread nine");
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void hangs() {
  const Counted counted;
  if (threadIdx.x % 2) __syncwarp();
  __syncthreads();
}

CASE(failed_launches_are_cleaned_up) {
  for_seeds(4, [] {
    int out[64] = {};
    bool thrown = false;
    try {
      SQ_LAUNCH(throws_late, 2, 64, 0, nullptr, out);
    } catch (const std::out_of_range& error) {
      thrown = std::string(error.what()) == "thread nine";
    }
    CHECK(thrown);
    for (int value : out) CHECK_EQ(value, 0);  // no thread went on past the barrier it waited at
    CHECK_EQ(live_objects, 0);
    error_of([] { SQ_LAUNCH(hangs, 1, 96, 0, nullptr); });
    CHECK_EQ(live_objects, 0);
    CHECK(!reverse_is_wrong<true>());
  });
}

__global__ void launches_again(int* out) { SQ_LAUNCH(full_mask, 1, 32, 0, nullptr, out); }

CASE(device_code_out_of_place) {
  int out[32];
  check_contains(error_of([&] { SQ_LAUNCH(launches_again, 1, 1, 0, nullptr, out); }), {"full_mask", "inside a kernel"});
  SQ_LAUNCH(full_mask, 1, 32, 0, nullptr, out);
  check_contains(error_of([] { __syncthreads(); }), {"outside of a kernel"});
  check_contains(error_of([&] { sq::load(out); }), {"outside of a kernel"});
}

// ------------------------------------------------------------------------------------------------------------- limits

__global__ void nothing() {}

__global__ void large_static() {
  SQ_SHARED(char, first, 40 * 1024);
  SQ_SHARED(char, second, 8 * 1024 + 1);
  first[0] = second[0];
}

__global__ void some_static() {
  SQ_SHARED(char, value, 1024);
  value[0] = 0;
}

CASE(launch_limits) {
  const auto launch = [](dim3 grid, dim3 block, std::size_t shared_bytes) {
    SQ_LAUNCH(nothing, grid, block, shared_bytes, nullptr);
  };
  launch(dim3(1, 65535), 1, 0);
  launch(1, dim3(16, 1, 64), 227 * 1024);
  launch(1, dim3(1, 1024), 0);
  const auto refused = [&](dim3 grid, dim3 block, std::size_t shared_bytes, const char* why) {
    check_contains(error_of([&] { launch(grid, block, shared_bytes); }), {"launch of kernel nothing refused", why});
  };
  refused(0, 1, 0, "grid must be");
  refused(dim3(1, 65536), 1, 0, "grid must be");
  refused(dim3(1, 1, 65536), 1, 0, "got (1, 1, 65536)");
  refused(0x80000000u, 1, 0, "grid must be");
  refused(1, 0, 0, "block must be");
  refused(1, 1025, 0, "at most 1024 threads, got (1025, 1, 1)");
  refused(1, dim3(32, 33), 0, "block must be");
  refused(1, dim3(1, 1, 65), 0, "block must be");
  refused(1, 1, 227 * 1024 + 1, "at most 232448 bytes, got 232449");
  check_contains(error_of([] { SQ_LAUNCH(large_static, 1, 1, 0, nullptr); }), {"large_static", "`second`", "48 KiB"});
  SQ_LAUNCH(some_static, 1, 1, 226 * 1024, nullptr);
  check_contains(error_of([] { SQ_LAUNCH(some_static, 1, 1, 226 * 1024 + 1, nullptr); }), {"`value`", "227 KiB"});

  for (const std::int64_t blocks : {std::int64_t{0}, std::int64_t{-1}, (std::int64_t{1} << 32) + 1}) {
    std::string message;
    try {
      SQ_LAUNCH(nothing, blocks, 1, 0, nullptr);
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    check_contains(message, {"launch of nothing", "[1, 2^31)", "got " + std::to_string(blocks)});
  }
}

}  // namespace
