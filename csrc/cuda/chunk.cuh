// Chunks of consecutive elements as fp32 registers: the unit in which a lane reads and writes global memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/integers.h"
#include "cuda/portable.cuh"

namespace subquad::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

/// Elements of T in one 16-byte access.
template <class T>
constexpr int kVecElems = 16 / static_cast<int>(sizeof(T));

/// How a chunk is read: weights are used once, activations by every block.
enum class Reuse { kStream, kKeep };

/// p[0 .. count) with zeros beyond; count may be <= 0 or exceed K.
/// kAligned: p is aligned to the chunk and count is never strictly between 0 and K; otherwise element by element. Lanes
/// own the same elements either way, so both give the same bits.
template <Reuse kReuse, bool kAligned, int K, class T>
__device__ __forceinline__ sq::Vec<T, K> load_chunk(const T* p, int64_t count) {
  constexpr bool kStream = kReuse == Reuse::kStream;
  sq::Vec<T, K> raw{};
  if constexpr (kAligned) {
    if (count > 0) raw = kStream ? sq::load_vec_stream<K>(p) : sq::load_vec_nc<K>(p);
  } else {
    SQ_UNROLL
    for (int j = 0; j < K; ++j) {
      if (j < count) raw.v[j] = kStream ? sq::load_stream(p + j) : sq::load_nc(p + j);
    }
  }
  return raw;
}

template <int K, class T>
__device__ __forceinline__ void to_floats(const sq::Vec<T, K>& raw, float (&out)[K]) {
  SQ_UNROLL
  for (int j = 0; j < K; ++j) out[j] = sq::to_float(raw.v[j]);
}

/// p[j] = values[j] rounded to T for j < count.
template <bool kAligned, int K, class T>
__device__ __forceinline__ void store_chunk(T* p, int64_t count, const float (&values)[K]) {
  if constexpr (kAligned) {
    sq::Vec<T, K> raw;
    SQ_UNROLL
    for (int j = 0; j < K; ++j) raw.v[j] = sq::from_float<T>(values[j]);
    if (count > 0) sq::store_vec<K>(p, raw);
  } else {
    SQ_UNROLL
    for (int j = 0; j < K; ++j) {
      if (j < count) sq::store(p + j, sq::from_float<T>(values[j]));
    }
  }
}

/// p, but the compiler cannot see where it came from: in an unrolled loop that steps a pointer it then keeps one
/// running pointer, where it would hoist every step into a register pair of its own and spill.
template <class T>
__device__ __forceinline__ T* running_pointer(T* p) {
#ifdef __CUDA_ARCH__
  asm("" : "+l"(p));
#endif
  return p;
}

/// v, but the compiler cannot see that it is v: what depends on it is computed again, where keeping it would spill.
__device__ __forceinline__ int again(int v) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(v));
#endif
  return v;
}

/// 1 / v to a unit in the last place, for v that is not subnormal. A division calls a function, around which values
/// spill.
__device__ __forceinline__ float reciprocal(float v) {
#ifdef __CUDA_ARCH__
  float r;
  asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
#else
  return 1.0f / v;
#endif
}

/// The largest of the warp, for every lane.
__device__ __forceinline__ float warp_max(float v) {
  SQ_UNROLL
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(kFullWarp, v, offset));
  return v;
}

/// Sum over the warp; every lane gets the same bits (a butterfly adds in one fixed order).
__device__ __forceinline__ float warp_sum(float v) {
  SQ_UNROLL
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kFullWarp, v, offset);
  return v;
}

inline bool is_aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

/// fn(true_type) or fn(false_type): a run-time condition as a template argument.
template <class Fn>
void with_flag(bool flag, Fn&& fn) {
  flag ? fn(std::true_type{}) : fn(std::false_type{});
}

}  // namespace subquad::cuda
