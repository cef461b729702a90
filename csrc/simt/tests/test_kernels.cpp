// Correct kernels: every seed gives the right result.
#include <algorithm>
#include <numeric>
#include <set>
#include <thread>

#include "check.h"

namespace {

constexpr unsigned kFull = 0xffffffffu;
constexpr int kSeeds = 8;

__device__ float warp_sum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFull, value, offset);
  return value;
}

// ---------------------------------------------------------------------------------------------- reductions and scans

// y = W x, one row per block; W [rows, columns] row-major, columns a multiple of 8.
template <class T>
__global__ void __launch_bounds__(128) gemv(const T* w, const T* x, T* y, int columns) {
  SQ_SHARED(float, partial, 4);
  const T* row = w + std::int64_t{blockIdx.x} * columns;
  float sum = 0.0f;
  for (int i = static_cast<int>(threadIdx.x) * 4; i < columns; i += static_cast<int>(blockDim.x) * 4) {
    const auto a = sq::load_vec_stream<4>(row + i);
    const auto b = sq::load_vec_nc<4>(x + i);
    SQ_UNROLL
    for (int j = 0; j < 4; ++j) sum += sq::to_float(a.v[j]) * sq::to_float(b.v[j]);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % warpSize == 0) partial[threadIdx.x / warpSize] = sum;
  __syncthreads();
  if (threadIdx.x == 0) sq::store(y + blockIdx.x, sq::from_float<T>(partial[0] + partial[1] + partial[2] + partial[3]));
}

template <class T>
void check_gemv() {
  const int rows = 5, columns = 456;
  std::vector<T> w(rows * columns), x(columns), y(rows);
  for (int i = 0; i < rows * columns; ++i) w[i] = sq::from_float<T>(static_cast<float>(i * 37 % 17 - 8));
  for (int i = 0; i < columns; ++i) x[i] = sq::from_float<T>(static_cast<float>(i * 11 % 7 - 3) / 4.0f);
  for_seeds(kSeeds, [&] {
    SQ_LAUNCH((gemv<T>), rows, 128, 0, nullptr, w.data(), x.data(), y.data(), columns);
    for (int r = 0; r < rows; ++r) {
      double exact = 0.0;  // exact in fp32 too, in any order
      for (int i = 0; i < columns; ++i) exact += double{sq::to_float(w[r * columns + i])} * sq::to_float(x[i]);
      CHECK_EQ(sq::to_float(y[r]), sq::to_float(sq::from_float<T>(static_cast<float>(exact))));
    }
  });
}

CASE(gemv_with_shuffles) {
  check_gemv<float>();
  check_gemv<sq::bf16>();
  check_gemv<sq::fp16>();
}

__global__ void tree_sum(const int* x, int* total, int n) {
  SQ_DYNAMIC_SHARED(int, partial);
  const int i = static_cast<int>(threadIdx.x);
  partial[i] = i < n ? sq::load(x + i) : 0;
  __syncthreads();
  for (int half = static_cast<int>(blockDim.x) / 2; half > 0; half /= 2) {
    if (i < half) partial[i] += partial[i + half];
    __syncthreads();
  }
  if (i == 0) sq::store(total, partial[0]);
}

CASE(block_reduction_in_dynamic_shared_memory) {
  std::vector<int> x(700);
  std::iota(x.begin(), x.end(), 3);
  for_seeds(kSeeds, [&] {
    int total = 0;
    SQ_LAUNCH(tree_sum, 1, 1024, 1024 * sizeof(int), nullptr, x.data(), &total, 700);
    CHECK_EQ(total, std::accumulate(x.begin(), x.end(), 0));
  });
}

// Writes the indices of the set flags in order, with one ballot per warp and a scan over the warps.
__global__ void compact(const int* flags, int* indices, int* count) {
  SQ_SHARED(int, warp_counts, 8);
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool flag = sq::load(flags + threadIdx.x) != 0;
  const unsigned votes = __ballot_sync(kFull, flag);
  if (lane == 0) warp_counts[warp] = __popc(votes);
  __syncthreads();
  int before = __popc(votes & ((1u << lane) - 1));
  for (unsigned w = 0; w < warp; ++w) before += warp_counts[w];
  if (flag) sq::store(indices + before, static_cast<int>(threadIdx.x));
  const int total = __syncthreads_count(flag);
  if (threadIdx.x == 0) sq::store(count, total);
}

CASE(prefix_sum_with_ballot) {
  std::vector<int> flags(256), expected;
  for (int i = 0; i < 256; ++i) {
    flags[i] = i * 7919 % 5 < 2;
    if (flags[i]) expected.push_back(i);
  }
  for_seeds(kSeeds, [&] {
    std::vector<int> indices(256, -1);
    int count = 0;
    SQ_LAUNCH(compact, 1, 256, 0, nullptr, flags.data(), indices.data(), &count);
    indices.resize(count);
    CHECK(indices == expected);
  });
}

// ------------------------------------------------------------------------------------------------------------ atomics

__global__ void count_up(unsigned* counter, int* largest, unsigned long long* bits, float* sum) {
  SQ_SHARED(int, in_block, 1);
  if (threadIdx.x == 0) in_block[0] = 0;
  __syncthreads();
  atomicAdd(in_block, 1);
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(counter, in_block[0]);
  const int id = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicMax(largest, id);
  atomicOr(bits, 1ull << (id % 64));
  unsigned* word = reinterpret_cast<unsigned*>(sum);
  unsigned seen = *word, assumed;
  do {
    assumed = seen;
    seen = atomicCAS(word, assumed, __float_as_uint(__uint_as_float(assumed) + 0.5f));
  } while (seen != assumed);
}

CASE(atomics) {
  for_seeds(kSeeds, [] {
    unsigned counter = 0;
    int largest = -1;
    unsigned long long bits = 0;
    float sum = 0.0f;
    SQ_LAUNCH(count_up, 6, 96, 0, nullptr, &counter, &largest, &bits, &sum);
    CHECK_EQ(counter, 6u * 96u);
    CHECK_EQ(largest, 6 * 96 - 1);
    CHECK_EQ(bits, ~0ull);
    CHECK_EQ(sum, 288.0f);
  });
}

__global__ void atomic_values(int* v, float* f) {
  v[0] = atomicAdd(v + 1, 1);
  v[2] = atomicMin(v + 3, -5);
  v[4] = atomicExch(v + 5, 77);
  f[0] = atomicAdd(f + 1, 1.5f);
}

CASE(atomics_return_the_old_value_and_wrap) {
  int v[] = {0, 2147483647, 0, 4, 0, 6};
  float f[] = {0.0f, 2.0f};
  SQ_LAUNCH(atomic_values, 1, 1, 0, nullptr, v, f);
  CHECK_EQ(v[0], 2147483647);
  CHECK_EQ(v[1], -2147483647 - 1);
  CHECK_EQ(v[2], 4);
  CHECK_EQ(v[3], -5);
  CHECK_EQ(v[4], 6);
  CHECK_EQ(v[5], 77);
  CHECK_EQ(f[0], 2.0f);
  CHECK_EQ(f[1], 3.5f);
}

// Every block leaves a partial result; the block that arrives last adds them up in order.
__global__ void last_block_sums(float* partials, unsigned* arrived, float* total) {
  SQ_SHARED(int, is_last, 1);
  if (threadIdx.x == 0) {
    sq::store(partials + blockIdx.x, static_cast<float>(blockIdx.x));
    __threadfence();
    is_last[0] = atomicAdd(arrived, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last[0] || threadIdx.x != 0) return;
  float sum = 0.0f;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += sq::load(partials + b);
  sq::store(total, sum);
}

CASE(last_block_reduction) {
  for_seeds(kSeeds, [] {
    std::vector<float> partials(9);
    unsigned arrived = 0;
    float total = 0.0f;
    SQ_LAUNCH(last_block_sums, 9, 64, 0, nullptr, partials.data(), &arrived, &total);
    CHECK_EQ(total, 36.0f);
  });
}

// ------------------------------------------------------------------------------------------------ barriers and votes

__global__ void exit_early(int* out, int n) {
  SQ_SHARED(int, value, 128);
  const int i = static_cast<int>(threadIdx.x);
  if (i >= n) return;
  value[i] = i;
  __syncthreads();
  out[i] = value[n - 1 - i];
  __syncthreads();
  value[i] = out[i];
}

CASE(exited_threads_do_not_count_at_barriers) {
  for_seeds(kSeeds, [] {
    for (int n : {1, 31, 32, 33, 100, 128}) {
      std::vector<int> out(128, -1);
      SQ_LAUNCH(exit_early, 1, 128, 0, nullptr, out.data(), n);
      for (int i = 0; i < 128; ++i) CHECK_EQ(out[i], i < n ? n - 1 - i : -1);
    }
  });
}

__global__ void barrier_reductions(int* out) {
  const int i = static_cast<int>(threadIdx.x);
  const int count = __syncthreads_count(i % 3 == 0 ? 5 : 0);
  const int any = __syncthreads_or(i == 77 ? 4 : 0), none = __syncthreads_or(0);
  const int all = __syncthreads_and(i + 1), not_all = __syncthreads_and(i);
  out[i] = count * 16 + any * 8 + none * 4 + all * 2 + not_all;
}

CASE(barriers_that_reduce) {
  for_seeds(kSeeds, [] {
    std::vector<int> out(100);
    SQ_LAUNCH(barrier_reductions, 1, 100, 0, nullptr, out.data());
    for (int value : out) CHECK_EQ(value, 34 * 16 + 8 + 2);
  });
}

// The two halves of each warp run different operations at the same time.
__global__ void half_warps(int* out) {
  const int i = static_cast<int>(threadIdx.x), lane = i % 32;
  int value = 0;
  if (lane < 16) {
    for (int offset = 8; offset > 0; offset /= 2) value += __shfl_xor_sync(0x0000ffffu, i, offset);
    value += __any_sync(0x0000ffffu, lane == 20) ? 1000 : 0;
  } else {
    value = static_cast<int>(__ballot_sync(0xffff0000u, lane % 2));
    value ^= __all_sync(0xffff0000u, lane >= 16);
  }
  __syncwarp();
  out[i] = value + __shfl_sync(kFull, i, 0);
}

CASE(masks_of_divergent_halves) {
  for_seeds(kSeeds, [] {
    std::vector<int> out(64);
    SQ_LAUNCH(half_warps, 1, 64, 0, nullptr, out.data());
    for (int i = 0; i < 64; ++i) {
      const int low = (i ^ 8) + (i ^ 4) + (i ^ 2) + (i ^ 1), high = static_cast<int>(0xaaaa0000u) ^ 1;
      CHECK_EQ(out[i], (i % 32 < 16 ? low : high) + i / 32 * 32);
    }
  });
}

__global__ void partial_warp(int* out) {
  const unsigned mask = (1u << 20) - 1;
  const int i = static_cast<int>(threadIdx.x);
  out[i] = __shfl_down_sync(mask, i, 3, 4) + 100 * __all_sync(mask, i < 20);
}

CASE(warp_of_twenty_lanes) {
  std::vector<int> out(20);
  for_seeds(kSeeds, [&] {
    SQ_LAUNCH(partial_warp, 1, 20, 0, nullptr, out.data());
    for (int i = 0; i < 20; ++i) CHECK_EQ(out[i], (i % 4 == 0 ? i + 3 : i) + 100);
  });
}

// ----------------------------------------------------------------------------------------------------------- shuffles

template <class T>
__global__ void shuffle_kinds(T* out, int width) {
  const int lane = static_cast<int>(threadIdx.x);
  const T value = static_cast<T>(lane) - static_cast<T>(7);
  out[lane] = __shfl_sync(kFull, value, lane * 5 + 3, width);
  out[32 + lane] = __shfl_up_sync(kFull, value, 3, width);
  out[64 + lane] = __shfl_down_sync(kFull, value, 5, width);
  out[96 + lane] = __shfl_xor_sync(kFull, value, 6, width);
}

template <class T>
void check_shuffles() {
  for (int width = 1; width <= 32; width *= 2) {
    std::vector<T> out(128);
    SQ_LAUNCH((shuffle_kinds<T>), 1, 32, 0, nullptr, out.data(), width);
    for (int lane = 0; lane < 32; ++lane) {
      const int first = lane / width * width, last = first + width - 1;
      const int indexed = first + (lane * 5 + 3) % width;
      const int up = lane - 3 < first ? lane : lane - 3;
      const int down = lane + 5 > last ? lane : lane + 5;
      const int crossed = (lane ^ 6) > last ? lane : lane ^ 6;
      CHECK_EQ(out[lane], static_cast<T>(indexed) - static_cast<T>(7));
      CHECK_EQ(out[32 + lane], static_cast<T>(up) - static_cast<T>(7));
      CHECK_EQ(out[64 + lane], static_cast<T>(down) - static_cast<T>(7));
      CHECK_EQ(out[96 + lane], static_cast<T>(crossed) - static_cast<T>(7));
    }
  }
}

CASE(shuffles_of_every_kind_and_width) {
  check_shuffles<int>();
  check_shuffles<unsigned>();
  check_shuffles<float>();
  check_shuffles<long long>();
  check_shuffles<double>();
}

// ------------------------------------------------------------------------------------------------------ shared memory

template <int Tag>
__device__ int exchange(int value) {
  SQ_SHARED(int, slot, 1);
  __syncthreads();
  if (threadIdx.x == 0) slot[0] = value;
  __syncthreads();
  return slot[0];
}

template <int Tag>
__device__ std::uintptr_t slot_address() {
  SQ_SHARED(char, slot, 1);
  return reinterpret_cast<std::uintptr_t>(slot);
}

template <class T>
__global__ void shared_identities(std::uintptr_t* out, int* values) {
  SQ_SHARED(T, own, 2);
  SQ_SHARED(T, other, 2);
  SQ_DYNAMIC_SHARED(char, dynamic);
  if (threadIdx.x == 33) {
    out[0] = reinterpret_cast<std::uintptr_t>(own);
    out[1] = reinterpret_cast<std::uintptr_t>(other);
    out[2] = reinterpret_cast<std::uintptr_t>(dynamic);
    out[3] = slot_address<1>();
    out[4] = slot_address<2>();
    out[5] = slot_address<1>();
  }
  const int first = exchange<1>(10), second = exchange<1>(20), third = exchange<2>(30);
  values[threadIdx.x] = first + second + third;
}

CASE(shared_arrays_have_one_place_per_declaration) {
  for_seeds(kSeeds, [] {
    std::uintptr_t a[6], b[6];
    std::vector<int> values(64);
    SQ_LAUNCH((shared_identities<float>), 1, 64, 16, nullptr, a, values.data());
    for (int value : values) CHECK_EQ(value, 60);
    SQ_LAUNCH((shared_identities<double>), 3, 64, 16, nullptr, b, values.data());
    for (const auto* p : {a, b}) {
      CHECK_EQ(std::set<std::uintptr_t>(p, p + 5).size(), 5u);
      CHECK_EQ(p[3], p[5]);
      CHECK_EQ(p[2] % 16, 0u);
    }
  });
}

// --------------------------------------------------------------------------------------------- coordinates and orders

__global__ void coordinates(int* visits) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  __syncthreads();
  visits[block * (blockDim.x * blockDim.y * blockDim.z) + thread] += 1 + static_cast<int>(threadIdx.z);
}

CASE(three_dimensional_coordinates) {
  for_seeds(kSeeds, [] {
    std::vector<int> visits(2 * 3 * 5 * 4 * 3 * 2);
    SQ_LAUNCH(coordinates, dim3(2, 3, 5), dim3(4, 3, 2), 0, nullptr, visits.data());
    for (std::size_t i = 0; i < visits.size(); ++i) CHECK_EQ(visits[i], 1 + static_cast<int>(i) % 24 / 12);
  });
}

__global__ void record_order(int* tickets, int* order) {
  __syncthreads();
  order[atomicAdd(tickets, 1)] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

std::vector<int> recorded_order(int blocks, int threads) {
  std::vector<int> order(blocks * threads);
  int tickets = 0;
  SQ_LAUNCH(record_order, blocks, threads, 0, nullptr, &tickets, order.data());
  return order;
}

CASE(seed_decides_the_order) {
  std::set<std::vector<int>> blocks, warps, lanes;
  for_seeds(20, [&] {
    const std::vector<int> order = recorded_order(1, 128);
    CHECK(order == recorded_order(1, 128));
    std::vector<int> sorted = order;
    std::sort(sorted.begin(), sorted.end());
    for (int i = 0; i < 128; ++i) CHECK_EQ(sorted[i], i);
    blocks.insert(recorded_order(9, 1));
    warps.insert(order);
    lanes.insert(recorded_order(1, 32));
  });
  CHECK(blocks.size() > 10);
  CHECK_EQ(warps.size(), 20u);
  CHECK_EQ(lanes.size(), 20u);
}

__global__ void active_mask(unsigned* out) { out[threadIdx.x] = __activemask(); }

CASE(activemask_promises_the_calling_lane_only) {
  std::vector<unsigned> out(64);
  SQ_LAUNCH(active_mask, 1, 64, 0, nullptr, out.data());
  for (unsigned i = 0; i < 64; ++i) CHECK_EQ(out[i], 1u << (i % 32));
}

// ---------------------------------------------------------------------------------------------- counters and OS
// threads

template <int N>
__global__ void copy(const sq::bf16* x, sq::bf16* y, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * N;
  if (i + N <= n) {
    sq::store_vec(y + i, sq::load_vec<N>(x + i));
  } else {
    for (int j = i; j < n; ++j) sq::store(y + j, sq::load(x + j));
  }
  __syncthreads();
}

CASE(byte_counters_are_exact) {
  const int n = 2051;
  alignas(16) static sq::bf16 x[n], y[n];
  for (int i = 0; i < n; ++i) x[i].bits = static_cast<std::uint16_t>(i);
  simt::reset_stats();
  SQ_LAUNCH((copy<8>), 3, 128, 0, nullptr, x, y, n);
  for (int i = 0; i < n; ++i) CHECK_EQ(y[i].bits, i);
  for (const simt::Stats& stats : {simt::stats(), simt::last_launch()}) {
    CHECK_EQ(stats.load_bytes, n * 2u);
    CHECK_EQ(stats.store_bytes, n * 2u);
    CHECK_EQ(stats.launches, 1u);
    CHECK_EQ(stats.barriers, 3u);
  }
  SQ_LAUNCH((copy<2>), 2, 64, 0, nullptr, x, y, 100);
  CHECK_EQ(simt::last_launch().load_bytes, 200u);
  CHECK_EQ(simt::stats().load_bytes, n * 2u + 200u);
  CHECK_EQ(simt::stats().launches, 2u);
  CHECK_EQ(simt::stats().barriers, 5u);
}

__global__ void touch_once(unsigned* counter) {
  SQ_SHARED(unsigned, local, 1);
  if (threadIdx.x == 0) local[0] = 0;
  __syncthreads();
  atomicAdd(local, 1u);
  if (threadIdx.x == 0) atomicAdd(counter, 1u);
}

CASE(atomics_on_shared_memory_are_not_traffic) {
  unsigned counter = 0;
  SQ_LAUNCH(touch_once, 2, 64, 0, nullptr, &counter);
  CHECK_EQ(simt::last_launch().load_bytes, 8u);
  CHECK_EQ(simt::last_launch().store_bytes, 8u);
}

CASE(launches_from_many_os_threads) {
  std::vector<std::string> failures(4);
  std::vector<std::thread> threads;
  for (std::string& failure : failures) {
    threads.emplace_back([&failure] {
      try {
        check_gemv<float>();
      } catch (const std::exception& error) {
        failure = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& failure : failures) CHECK_EQ(failure, "");
}

}  // namespace
